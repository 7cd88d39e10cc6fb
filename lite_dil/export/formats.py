"""What an adapter can be made into."""

FORMATS = ("adapter", "merged", "mlx", "gguf", "ollama")
