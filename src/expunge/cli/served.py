"""What ``expunge audit --served`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.cli.output import Output
from expunge.core.errors import InputError

if TYPE_CHECKING:
    from expunge.audit.document import AuditDocument

_NEEDED = {"model": "--model-name", "forget": "--forget", "out": "--out"}


def given(server: Mapping[str, Any], audit: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an audit of what is served.

    Args:
        server: options of the command line about the server and the data.
        audit: what is compared with, and what is measured.
        more: settings ``served`` and ``text`` that were given as words.

    Raises:
        InputError: something that is needed is missing.
    """
    for name, option in _NEEDED.items():
        if not server.get(name):
            raise InputError(f"An audit of what is served needs {option}.", "See `expunge audit --help` for an example.")
    served = {"url": server["url"], "model": server["model"], **more.get("served", {})}
    served |= {k: server[k] for k in ("key_env", "refusals") if server.get(k)}
    data = {k: server[k] for k in ("target", "forget", "retain", "holdout") if server.get(k)}
    return {"served": served, **data, "text": more.get("text", {}), "audit": dict(audit)}


def audit_served(
    server: Mapping[str, Any], audit: Mapping[str, Any], more: Mapping[str, Any], *, dry_run: bool, output: Output
) -> AuditDocument | None:
    """Audit what is served; nothing comes back of a dry run, which says what it would cost. See :func:`given`."""
    from expunge.pipeline import served_audit

    config = served_audit.ServedConfig(**given(server, audit, more))
    made = served_audit.plan(config, server["out"], resume=server["resume"])
    for note in made.notes:
        output.note(note)
    output.note(f"audit: {made.text()}")
    if dry_run:
        cost = {"models": made.models, "questions": made.questions}
        output.result({"cost": cost, "sets": {name: len(records) for name, records in made.sets.items()}})
        return None
    with output.progress("audit") as progress:
        return served_audit.audit_served(made, progress=progress, say=output.note)


def split_words(words: Sequence[str], run: Path | None, served: str | None) -> tuple[list[str], Path | None]:
    """Settings and folder of a run; where there can be no folder, what stands first is a setting.

    Raises:
        InputError: both are given.
    """
    if served is None or run is None:
        return list(words), run
    if "=" not in str(run):
        raise InputError("--served and the folder of a run exclude each other.", "Give one of them.")
    return [str(run), *words], None
