"""From a row of a data file to an Example: sources, formats, messages, tokens."""
