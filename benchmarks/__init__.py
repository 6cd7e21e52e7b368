"""Benchmarks of syncbn: kernels, layers and memory, each result checked before it is timed. See README.md."""
