"""Several losses side by side: what is compared, what is measured, and the tables and the page that come of it."""

# What is compared where nothing else is asked for, and how many held-out prompts are answered, in how many tokens at most.
LOSSES = ("lsif", "ukl", "bce", "dpo", "simpo")
SAMPLE_PROMPTS, SAMPLE_TOKENS = 32, 128
