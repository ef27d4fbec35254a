"""Metrics: each computed from the one pass."""
