"""A loaded model with its adapter, and the answers it gives."""
