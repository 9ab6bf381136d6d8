"""Benchmarks, run from a checkout."""
