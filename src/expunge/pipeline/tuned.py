"""Records that settings were chosen on, and what an audit does about them.

A setting that was the best of many on some records looks better on these than it is. So a sweep leaves a list of what it measured
on (content keys, no texts), the settings file that it writes names that list, an unlearning run keeps a copy, and the audit
of that run judges on the other records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from expunge.core.errors import InputError
from expunge.core.files import digest_file, digest_json, write_text
from expunge.core.settings import Settings
from expunge.data.records import Item, Record, RecordSet, content_key

USED = "used.json"  #: in the folder of a sweep
COPY = "tuned-on.json"  #: the same in the folder of an unlearning run
_VERSION = "1"
_LEAST = 2  #: records that a set must have to be judged


class Tuned(Settings):
    """Where settings come from."""

    name: ClassVar[str] = "tuned"

    sweep: str = Field(description="folder of the sweep that chose the settings")
    digest: str = Field(description="SHA-256 of its list of the records that it measured on")


def shipped_origin(folder: Path) -> Tuned:
    """Where the settings of a shipped set come from: its own folder, which holds the list of records too."""
    return Tuned(sweep=str(folder), digest=digest_file(folder / USED))


def key_of(record: Item) -> str:
    """Identity of what a record says, whatever file or id it came under: 16 hex digits."""
    if isinstance(record, Record):
        return content_key(record)
    return digest_json(record.content())[:16]


def used_text(sets: Mapping[str, Iterable[Item]]) -> str:
    """The list of the records that a sweep measured on, as the file that holds it: by set, their number, digest and keys."""
    held: dict[str, Any] = {"schema_version": _VERSION, "sets": {}}
    for name, records in sets.items():
        keys = sorted({key_of(r) for r in records})
        held["sets"][name] = {"records": len(keys), "digest": digest_json(keys), "keys": keys}
    return json.dumps(held, indent=1) + "\n"


def read_used(path: Path) -> dict[str, Any]:
    """By set, what :func:`used_text` wrote.

    Raises:
        InputError: it cannot be read.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        sets: dict[str, Any] = held["sets"]
        if held["schema_version"] != _VERSION or not all(isinstance(s["keys"], list) for s in sets.values()):
            raise ValueError("it is of another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The list {str(path)!r} of records that settings were chosen on cannot be read: {error}.", _REMEDY
        ) from None
    return sets


_REMEDY = "Put it back, or take the settings without their line 'tuned': the audit will then not know what they were chosen on."


def check_tuned(tuned: Tuned | None) -> None:
    """Check that the list of records is there and is the one that the settings file means.

    Raises:
        InputError: it is missing, or has changed.
    """
    if tuned is None:
        return
    path = Path(tuned.sweep) / USED
    if not path.is_file():
        raise InputError(f"The settings were chosen by a sweep, whose list of records {str(path)!r} is missing.", _REMEDY)
    if digest_file(path) != tuned.digest:
        raise InputError(f"{str(path)!r} is not the list of records that these settings were chosen on.", _REMEDY)


def keep_copy(tuned: Tuned | None, folder: Path) -> None:
    """Leave the list of records in an unlearning run, so that its audit needs nothing else."""
    if tuned is not None and not (folder / COPY).is_file():
        write_text(folder / COPY, (Path(tuned.sweep) / USED).read_text(encoding="utf-8"))


def _keys(path: Path) -> set[str]:
    return {key for held in read_used(path).values() for key in held["keys"]}


def check_left(tuned: Tuned | None, forget: RecordSet[Any]) -> None:
    """Check that a request leaves something to judge by, before it is carried out.

    Raises:
        InputError: settings were chosen on all of its records, or on all but one.
    """
    if tuned is None:
        return
    seen = _keys(Path(tuned.sweep) / USED)
    if sum(key_of(r) not in seen for r in forget) < min(_LEAST, len(forget)):
        raise InputError(
            f"The settings were chosen on the {len(forget)} records of {forget.name!r}: none would be left to judge by.",
            "Take settings that were chosen on other records.",
        )


def unseen(
    folder: Path,
    tuned: Tuned | None,
    sets: Mapping[str, RecordSet[Any]],
    *,
    everything: bool = False,
    leave_out: str | None = None,
) -> tuple[dict[str, RecordSet[Any]], list[str]]:
    """The sets of an audit without the records that the settings of a run were chosen on, and what the report must say.

    Args:
        folder: of the run.
        tuned: where its settings come from; None: from no sweep.
        sets: by name.
        everything: leave nothing out, and say by how many records the judgement is biased.
        leave_out: folder of a sweep whose records are left out too: a run whose settings it has not chosen is then judged on the
            same records as one whose settings it has.

    Raises:
        InputError: the list was changed, or too little is left of a set to judge.
    """
    seen = set() if leave_out is None else _keys(Path(leave_out) / USED)
    if tuned is not None:
        path = folder / COPY
        if path.is_file() and digest_file(path) != tuned.digest:
            raise InputError(f"{str(path)!r} is not what the run has written.", "Put it back, or unlearn again.")
        seen |= _keys(path)
    if not seen:
        return dict(sets), []
    kept = {name: RecordSet(s.name, tuple(r for r in s if key_of(r) not in seen), s.source) for name, s in sets.items()}
    gone = {name: len(s) - len(kept[name]) for name, s in sets.items() if len(kept[name]) < len(s)}
    if not gone:
        return dict(sets), []
    counted = ", ".join(f"{n} of {len(sets[name])} {name} records" for name, n in gone.items())
    if everything:
        return dict(sets), [
            f"The settings were chosen by a sweep on {counted}, which are judged here too: on these the settings look better "
            "than they are. An audit without --all-records leaves them out."
        ]
    small = [name for name in gone if len(kept[name]) < _LEAST]
    if small:
        raise InputError(
            f"Settings were chosen on {counted}: too few {small[0]} records are left to judge.",
            "Audit with --all-records; the report will say that its verdict is biased.",
        )
    if tuned is None:
        return kept, [f"Left out were {counted}, on which the sweep {leave_out!r} chose settings of other runs."]
    return kept, [
        f"The settings were chosen by a sweep on {counted}; these were left out. Whether they are forgotten too is told by "
        "--all-records, with the bias of having been chosen on."
    ]
