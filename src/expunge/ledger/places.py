"""Where a server's keys stand, and whether a copy of its state would open what it holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from expunge.core.errors import InputError
from expunge.ledger.keys import VARIABLE, KeyStore, MasterKey

_ENVIRONMENT = "the environment"


@dataclass(frozen=True)
class Places:
    """The folder of a server's state, and where its keys are.

    Attributes:
        state: the folder.
        master: file of the master key; none: :data:`~expunge.ledger.keys.VARIABLE` if it is set, else ``master.key`` in the
            folder.
        keys: folder of the wrapped keys; none: ``keys`` in the folder. Servers that share a registry share it.
    """

    state: Path
    master: Path | None = None
    keys: Path | None = None

    @property
    def master_file(self) -> Path | None:
        """File of the master key; none: it is in the environment."""
        if self.master is not None:
            return self.master
        return None if VARIABLE in os.environ else self.state / "master.key"

    @property
    def folder(self) -> Path:
        """Folder of the wrapped keys."""
        return self.keys or self.state / "keys"

    def store(self) -> KeyStore:
        """The keys; folder and master key are made if they are not there. A master key is not made beside keys that are there.

        Raises:
            InputError: the master key is missing or is none.
        """
        path = self.master_file
        if path is not None and not path.is_file() and self.folder.is_dir() and any(self.folder.glob("*.key")):
            raise InputError(f"The master key {str(path)!r} is missing, and there are keys under it.", "Put it back.")
        return KeyStore(self.folder, MasterKey.from_environment() if path is None else MasterKey.from_file(path))

    def existing(self) -> KeyStore:
        """The keys of a state that is there already.

        Raises:
            InputError: the folder is no state, or the master key is missing.
        """
        if not self.folder.is_dir():
            raise InputError(f"{str(self.state)!r} is no state of a server.", "Name the folder of expunge serve --state.")
        path = self.master_file
        if path is not None and not path.is_file():
            raise InputError(f"The master key of {str(self.state)!r} is missing.", f"Put it back, or set {VARIABLE}.")
        return self.store()

    @property
    def exposed(self) -> str:
        """What a copy of the state would give away, in a sentence with the remedy; empty: nothing."""
        path = self.master_file
        if path is None:
            return ""
        inside = path.resolve().is_relative_to(self.state.resolve())
        if not inside and path.resolve().parent != self.folder.resolve():
            return ""
        where = f"the state folder {str(self.state)!r}" if inside else f"the folder of keys {str(self.folder)!r}"
        return (
            f"The master key lies in {where}, beside what it locks: who copies that folder can read every target in it, and a "
            f"backup brings withdrawn ones back. Put it elsewhere with --master-key-file, or into {VARIABLE}."
        )
