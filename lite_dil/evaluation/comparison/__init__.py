"""Comparing losses side by side: settings, measurements, tables and the page."""

# Defaults: the losses compared, the number of held-out prompts answered, and the maximum tokens of an answer.
LOSSES = ("lsif", "ukl", "bce", "dpo", "simpo")
SAMPLE_PROMPTS, SAMPLE_TOKENS = 32, 128
