"""The page on attacks: scores of membership, and attacks that act on a copy."""

from __future__ import annotations


def pages() -> dict[str, str]:
    """The page on attacks."""
    return {}
