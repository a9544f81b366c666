"""Benchmarks, predictions and reports: a checkout's own package, which is not installed."""
