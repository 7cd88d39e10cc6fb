"""From a row of somebody's file to an Example: sources, formats, messages, tokens."""
