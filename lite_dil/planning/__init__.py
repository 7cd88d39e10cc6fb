"""Memory estimates, what fits, and --auto."""
