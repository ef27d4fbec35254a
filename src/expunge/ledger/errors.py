"""What can go wrong with a registry or a log."""

from __future__ import annotations

import errno

from expunge.core.errors import ExpungeError, InputError


class LedgerFailed(ExpungeError):
    """It could not be written or read: a disk is full, a database does not answer. What was acknowledged before is kept.

    Args:
        message, remedy: for the user.
        full: whether there is no room.
    """

    def __init__(self, message: str, remedy: str = "", *, full: bool = False) -> None:
        super().__init__(message, remedy)
        self.full = full


def no_room(error: OSError) -> bool:
    """Whether the system refuses to write for want of room: the disk, the quota, or the limit of a file's size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Conflict(InputError):
    """An idempotency key was used before, for something else."""


class NoSuchTarget(InputError):
    """There is no target with this id."""


class Shredded(InputError):
    """The key that opens it has been destroyed: what it opened cannot be read by anybody any more."""
