"""What can go wrong with a registry or a log."""

from __future__ import annotations

from expunge.core.errors import ExpungeError, InputError


class LedgerFailed(ExpungeError):
    """It could not be written or read: a disk is full, a database does not answer. What was acknowledged before is kept."""


class Conflict(InputError):
    """An idempotency key was used before, for something else."""


class NoSuchTarget(InputError):
    """There is no target with this id."""


class Shredded(InputError):
    """The key that opens it has been destroyed: what it opened cannot be read by anybody any more."""
