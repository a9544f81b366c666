"""Plans what fits where, for cards that need not be here and models of which nothing is downloaded.

models/ has the configs of published models, cut down to their shapes; ``rows`` makes the plans, ``tables`` shows them.
"""
