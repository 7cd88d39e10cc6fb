"""Merging an adapter, checking the result, GGUF, Ollama, the hub."""
