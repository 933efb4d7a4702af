"""Benchmarks, one file each: readers and metrics. Only `launch/evaluate.py` brings a model."""
