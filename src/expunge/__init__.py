"""Expunge makes a trained model forget, and proves it."""

__version__ = "0.1.0"
