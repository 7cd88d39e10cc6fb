"""Merge an adapter, check the result, convert to GGUF and Ollama, push to the hub."""
