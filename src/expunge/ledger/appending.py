"""Files that only grow, by whole lines: a line is there or is not, whatever happens while it is written."""

from __future__ import annotations

import os
from pathlib import Path

from expunge.ledger.errors import LedgerFailed, no_room
from expunge.ledger.keys import sync_folder


class Lines:
    """One file that is open for appending.

    A line that could not be written whole is taken back. What was written is handed to the system at once, so a killed process
    loses nothing; :meth:`sync` asks the disk to hold it.

    Args:
        path: made, for its owner alone, if it is not there.

    Raises:
        LedgerFailed: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            fresh = not path.exists()
            self._handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            if fresh:
                sync_folder(path.parent)
        except OSError as error:
            raise self._failed(error) from None
        self.size = os.fstat(self._handle).st_size
        self.broken = False

    def cut(self) -> bytes:
        """Take away a last line that does not end, and give it back; nothing if all lines do."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._handle, whole)
            os.fsync(self._handle)
            self.size = whole
        return data[whole:]

    def append(self, line: bytes) -> None:
        """Write a line.

        Raises:
            LedgerFailed: it could not be; the file is as it was.
        """
        if self.broken:
            raise LedgerFailed(f"{str(self.path)!r} has failed before.", "Look at the disk, then start anew.")
        try:
            done = 0
            while done < len(line):
                done += os.write(self._handle, line[done:])
        except OSError as error:
            try:
                os.ftruncate(self._handle, self.size)
            except OSError:
                self.broken = True
            raise self._failed(error) from None
        self.size += len(line)

    def sync(self) -> None:
        """Wait until the disk holds all.

        Raises:
            LedgerFailed: it says that it does not. What it holds then is not known, so nothing more is written.
        """
        try:
            os.fdatasync(self._handle)
        except OSError as error:
            self.broken = True
            raise self._failed(error) from None

    def close(self) -> None:
        """Close the file; nothing can be written any more."""
        self.broken = True  # the number of the handle may be another file's soon
        os.close(self._handle)

    def _failed(self, error: OSError) -> LedgerFailed:
        said = f"{str(self.path)!r} could not be written: {error.strerror}."
        return LedgerFailed(said, "Free some room; nothing is lost.", full=no_room(error))
