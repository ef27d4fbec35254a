"""A package outside of Expunge that adds a method and a metric to it."""
