"""Labelling: draw two answers, keep the user's choices in a file."""
