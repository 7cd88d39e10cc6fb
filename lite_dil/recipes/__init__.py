"""Whole trainings, put together from the other rooms."""
