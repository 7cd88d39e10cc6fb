"""What a step needs, what fits, and --auto."""
