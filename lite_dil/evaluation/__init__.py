"""Held-out figures."""
