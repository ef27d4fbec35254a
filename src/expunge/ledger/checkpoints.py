"""Signed statements that a log was so long and ended so, kept in another place than the log.

Who holds the log could make its whole chain anew. Not so the checkpoints: they are signed (Ed25519), each names the digest of the
one before, and they stand where who changes the log cannot change them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.core.errors import InputError
from expunge.ledger.appending import Lines
from expunge.ledger.canonical import GENESIS, canonical
from expunge.ledger.chain import Problems
from expunge.ledger.keys import Public, Signer

_PURPOSE = b"expunge checkpoint 1\0"


@dataclass(frozen=True)
class Checkpoint:
    """One of them.

    Attributes:
        index: its number, from 1.
        log: id of the log.
        n: number of the last record.
        hash: digest of that record.
        at: when.
        anchors: other heads that are signed with it: of the registry, ``{"registry": "17:ab..."}``.
        line: as it stands in the file.
    """

    index: int
    log: str
    n: int
    hash: str
    at: str
    anchors: Mapping[str, str]
    line: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of its line: the next one names it."""
        return hashlib.sha256(self.line).hexdigest()


def _read(line: bytes, public: Public) -> tuple[Checkpoint, str]:
    said = json.loads(line)
    if not isinstance(said, dict) or canonical(said) + b"\n" != line:
        raise ValueError("it is not in its only spelling")
    signature = said.pop("signature", "")
    if said.get("key") != public.fingerprint:
        raise ValueError("it names another key")
    if not isinstance(signature, str) or not public.holds(_PURPOSE + canonical(said), signature):
        raise ValueError("its signature is not one of this key")
    made = Checkpoint(said["index"], said["log"], said["n"], said["hash"], said["at"], said["anchors"], line)
    return made, said["before"]


def read_checkpoints(path: Path, public: Public, problems: Problems) -> list[Checkpoint]:
    """Checkpoints of a file that are signed by a key; what is wrong with others is noted.

    Args:
        path: the file; one that is not there holds none.
        public: the key.
        problems: where it is noted.
    """
    found: list[Checkpoint] = []
    before, index = GENESIS, 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for at, line in enumerate(lines, 1):
        where = f"{path.name}:{at}"
        try:
            made, named = _read(line, public)
        except (ValueError, KeyError, TypeError) as error:
            why = str(error) if type(error) is ValueError else "it cannot be read"
            problems.add("signature", where, f"checkpoint {index + 1} does not count: {why}")
            index, before = index + 1, ""
            continue
        if made.index != index + 1 or (before and named != before):
            problems.add("signature", where, f"checkpoint {made.index} does not follow from the one before it: some are missing")
        found.append(made)
        before, index = made.digest, made.index
    return found


class Checkpoints:
    """The file of them, for the one who signs.

    Args:
        path: in another place than the log.
        signer: who signs.

    Raises:
        InputError: it holds checkpoints that this key has not signed.
        LedgerFailed: it cannot be opened.
    """

    def __init__(self, path: Path, signer: Signer) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._signer, self._file = signer, Lines(path)
        self._file.cut()  # what a killed process has not finished was never counted on
        problems = Problems()
        found = read_checkpoints(path, signer.public, problems)
        if problems.listed:
            self._file.close()
            raise InputError(
                f"The checkpoints do not hold: {problems.listed[0]}.", "Verify the log, keep it aside, and begin a new one."
            )
        self.last = found[-1] if found else None

    def add(self, log: str, n: int, head: str, *, at: str, anchors: Mapping[str, str]) -> Checkpoint:
        """Sign and keep one more; it is on the disk when this returns.

        Raises:
            LedgerFailed: it could not be kept.
        """
        index, before = (self.last.index, self.last.digest) if self.last else (0, GENESIS)
        said: dict[str, Any] = {
            "index": index + 1, "before": before, "log": log, "n": n, "hash": head, "at": at, "anchors": dict(anchors),
            "key": self._signer.public.fingerprint,
        }  # fmt: skip
        line = canonical({**said, "signature": self._signer.sign(_PURPOSE + canonical(said))}) + b"\n"
        made = Checkpoint(index + 1, log, n, head, at, anchors, line)
        self._file.append(made.line)
        self._file.sync()
        self.last = made
        return made

    def close(self) -> None:
        """Close the file."""
        self._file.close()
