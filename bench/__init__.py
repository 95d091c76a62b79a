"""Benchmarks: both sides on the same rows, and a ratio. `python -m bench.NAME` runs one, `make bench` all."""
