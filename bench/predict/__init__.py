"""Counts of the work of each op, and predictions of the seconds that cards take for it."""
