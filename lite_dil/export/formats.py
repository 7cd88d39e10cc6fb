"""The export formats."""

EXPORT_FORMATS = ("adapter", "merged", "mlx", "gguf", "ollama", "reward")
