"""Benchmarks of whole layers."""
