"""What an auditor gets of a server's state."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from expunge.core.errors import InputError
from expunge.core.files import atomic_path
from expunge.ledger.canaries import history
from expunge.ledger.keys import KeyStore
from expunge.ledger.log import log_files
from expunge.ledger.periods import end_of
from expunge.ledger.places import Places
from expunge.ledger.registry import Registry
from expunge.ledger.verify import records

ENTRIES, KEYS, CANARIES = "registry.jsonl", "keys.json", "canaries.json"


def export(
    state: Path, out: Path, periods: Sequence[str] = (), *, registry: str | None = None, places: Places | None = None
) -> list[Path]:
    """Write entries of the registry, what the canaries have found, and keys of periods for an auditor.

    Args:
        state: folder of the server.
        out: folder for the files.
        periods: whose keys are handed over.
        registry: of a database; none: the file in the folder.
        places: where keys stand, if not in the folder.

    Raises:
        InputError: the folder is no state, or a period is none or has no key.
    """
    keys = (places or Places(state)).existing()
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
    if log_files(state / "log"):
        with atomic_path(out / CANARIES) as temporary:
            temporary.write_text(json.dumps(history(state / "log").described(), indent=2) + "\n", encoding="utf-8")
        made.append(out / CANARIES)
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
