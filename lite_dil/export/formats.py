"""What an adapter can be made into."""

EXPORT_FORMATS = ("adapter", "merged", "mlx", "gguf", "ollama")
