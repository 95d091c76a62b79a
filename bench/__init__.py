"""Benchmarks: two sides on the same rows, and their ratio. `python -m bench.NAME` runs one, `make bench` runs all."""
