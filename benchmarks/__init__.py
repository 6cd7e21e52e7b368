"""Benchmarks of syncbn, from kernels to training steps, each result checked before it is timed. See README.md."""
