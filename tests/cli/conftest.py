"""The small town, the desk and the command line for every test in this folder."""

from tests.command import expunge, server, town
from tests.entries import desk

__all__ = ["desk", "expunge", "server", "town"]
