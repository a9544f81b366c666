"""Lean layers built from the ops."""
