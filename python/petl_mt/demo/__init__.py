"""The demo: text made from Babel's CLDR data, a small multilingual parent, and ``petl-mt demo``."""
