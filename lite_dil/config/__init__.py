"""The options of a training run, from flags and YAML."""
