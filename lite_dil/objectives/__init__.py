"""Losses as pure functions, the table of objectives, and the criterion that a backend differentiates."""
