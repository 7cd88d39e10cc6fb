"""What `import lite_dil` offers to programs."""
