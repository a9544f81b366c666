"""Models of a run: loaded, new, adapted, streamed."""
