"""Preference training of language models by Direct Imitation Learning (DIL) with (Q)LoRA, on one small machine."""

__version__ = "0.1.0"
