"""How an implementation is checked and timed."""
