"""Benchmarks: each `bench_*.py` is a program (`python -m benchmarks.bench_grouped_forward`); `gpu` measures on a GPU."""
