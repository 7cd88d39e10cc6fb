"""A loaded model with its adapter, and the responses that it generates."""
