"""Labels, the pairs on offer, and their file."""
