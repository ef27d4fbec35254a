"""Records, sources, checks and the order in which examples are seen."""
