"""transformers and PEFT, on a CUDA GPU or on a CPU."""
