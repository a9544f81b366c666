"""The program, end to end, as a user runs it under a budget of memory: `python -m bench.product`."""
