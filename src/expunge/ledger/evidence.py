"""What an auditor gets of a server's state."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from expunge.core.errors import InputError
from expunge.core.files import atomic_path
from expunge.ledger.keys import VARIABLE, KeyStore, MasterKey
from expunge.ledger.log import log_files
from expunge.ledger.periods import end_of
from expunge.ledger.registry import Registry
from expunge.ledger.verify import records

ENTRIES, KEYS = "registry.jsonl", "keys.json"


def key_store(state: Path) -> KeyStore:
    """Keys of a state folder that is there already.

    Raises:
        InputError: the folder is no state, or the master key is missing.
    """
    if not (state / "keys").is_dir():
        raise InputError(f"{str(state)!r} is no state of a server.", "Name the folder of expunge serve --state.")
    given = VARIABLE in os.environ
    if not given and not (state / "master.key").is_file():
        raise InputError(f"The master key of {str(state)!r} is missing.", f"Put it back, or set {VARIABLE}.")
    return KeyStore(state / "keys", MasterKey.from_environment() if given else MasterKey.from_file(state / "master.key"))


def export(state: Path, out: Path, periods: Sequence[str] = (), *, registry: str | None = None) -> list[Path]:
    """Write entries of the registry and keys of periods for an auditor.

    Args:
        state: folder of the server.
        out: folder for the files.
        periods: whose keys are handed over.
        registry: of a database; none: the file in the folder.

    Raises:
        InputError: the folder is no state, or a period is none or has no key.
    """
    keys = key_store(state)
    for period in periods:
        end_of(period)
    found = _period_keys(state, keys, periods)
    out.mkdir(parents=True, exist_ok=True)
    held = Registry(registry or state / "registry.db", keys)
    try:
        held.export(out / ENTRIES)
    finally:
        held.close()
    made = [out / ENTRIES]
    if found:
        with atomic_path(out / KEYS) as temporary:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=2)
        made.append(out / KEYS)
    return made


def _period_keys(state: Path, keys: KeyStore, periods: Sequence[str]) -> dict[str, str]:
    if not periods:
        return {}
    if not log_files(state / "log"):
        raise InputError(f"There is no log in {str(state)!r}.", "Leave --period out.")
    log = next(str(r["log"]) for _, r in records(state / "log") if "log" in r)
    return {p: keys.get(f"period-{log}-{p}").hex() for p in periods}
