"""One benchmark an op."""
