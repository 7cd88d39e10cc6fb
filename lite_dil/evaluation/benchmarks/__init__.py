"""Benchmarks by lm-eval: a policy as its language model, tasks, and a store of what was computed."""
