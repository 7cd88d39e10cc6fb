"""Finding a model, its shape, and adapters with their files."""
