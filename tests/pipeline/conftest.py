"""The small town and the command line for every test in this folder."""

from tests.command import expunge, server, town

__all__ = ["expunge", "server", "town"]
