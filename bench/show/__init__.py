"""Results of benchmarks: read, compared, and shown as tables and as a page."""
