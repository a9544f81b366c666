"""What each op has to do, counted, and the seconds that cards are predicted to take for it."""
