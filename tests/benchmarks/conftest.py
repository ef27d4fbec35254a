"""The command line for tests in this folder."""

from tests.command import expunge, server

__all__ = ["expunge", "server"]
