"""Benchmarks of training steps, and of steps under caps of memory."""
