"""mlx-lm, on Apple silicon or on a CPU."""
