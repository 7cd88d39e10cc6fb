"""Rewards of responses, and where they come from."""
