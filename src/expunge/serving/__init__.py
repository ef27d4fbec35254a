"""Guarded models over HTTP, with the interface that clients of chat servers speak."""
