"""A run's folder and its history."""
