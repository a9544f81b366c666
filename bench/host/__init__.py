"""Benchmarks of the host's own time."""
