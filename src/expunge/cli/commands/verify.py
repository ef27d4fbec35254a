"""``expunge verify`` and ``expunge evidence``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError, MissingExtra

_HELP = """Check the log of a guarded server, and answer what is disputed.

    For an auditor: nothing of the server is needed but the log, the checkpoints and the public key. Exit code 0 if they hold, 3
    if not.

    \b
    Examples:
      expunge verify state/log --public state/sign.pem.pub --checkpoints checkpoints.jsonl
      expunge verify log --public sign.pem.pub --checkpoints heads.jsonl --entries registry.jsonl --target ID --at 2026-11-28
      expunge verify log --public sign.pem.pub --checkpoints heads.jsonl --text disputed.txt --keys keys.json
    """

_EVIDENCE = """Export what an auditor needs of a server's state: the entries of the registry, what its canaries have found, and
    keys of periods that are named.

    The entries hold no name and no text. The key of a period lets its holder try any text against the records of that period.

    \b
    Examples:
      expunge evidence state --out evidence
      expunge evidence state --out evidence --period 2026-11-28
    """


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("verify", help=_HELP)(verify)
    app.command("evidence", help=_EVIDENCE)(evidence)


def verify(
    log: Annotated[Path, typer.Argument(help="Folder of the log.")],
    public: Annotated[Path, typer.Option(help="Public key of the signatures.", metavar="FILE")],
    checkpoints: Annotated[Path, typer.Option(help="Signed heads of the log.", metavar="FILE")],
    entries: Annotated[Path | None, typer.Option(help="Entries of the registry, as exported.", metavar="FILE")] = None,
    target: Annotated[str | None, typer.Option(help="Was it hidden ...", metavar="ID")] = None,
    at: Annotated[datetime | None, typer.Option(help="... then?")] = None,
    text: Annotated[Path | None, typer.Option(help="A disputed question or answer.", metavar="FILE")] = None,
    keys: Annotated[Path | None, typer.Option(help="Keys of periods, as exported; for --text.", metavar="FILE")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Check a log."""
    from json import loads

    output, auditing = Output(json), _ledger().auditing
    try:
        disputed = None if text is None else text.read_text(encoding="utf-8").strip("\n")
        held = None if keys is None else loads(keys.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"A file cannot be read: {type(error).__name__}.", "Check --text and --keys.") from None
    moment = at.astimezone() if at is not None and at.tzinfo is None else at
    found = auditing.audit(log, public, checkpoints, ledger=entries, text=disputed, keys=held, target=target, at=moment)
    output.result(found.described())
    for line in found.lines():
        output.say(line)
    return int(found.exit_code)


def evidence(
    state: Annotated[Path, typer.Argument(help="Folder of the server's state.")],
    out: Annotated[Path, typer.Option(help="Folder for the files.", metavar="FOLDER")],
    period: Annotated[list[str] | None, typer.Option(help="Export its key; may be repeated.", metavar="PERIOD")] = None,
    registry: Annotated[
        str | None, typer.Option(help="Database of forget requests, if it is not in the folder.", metavar="URL")
    ] = None,
    master: Annotated[
        Path | None, typer.Option("--master-key-file", help="The master key, if it is not in the folder.", metavar="FILE")
    ] = None,
    key_folder: Annotated[
        Path | None, typer.Option(help="Folder of kept keys, if they are not in the folder.", metavar="FOLDER")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Export evidence."""
    output, ledger = Output(json), _ledger()
    if out.exists() and any(out.iterdir()):
        raise InputError(f"The folder {str(out)!r} is not empty.", "Choose another --out.")
    places = ledger.places.Places(state, master, key_folder)
    found = ledger.evidence.export(state, out, list(period or []), registry=registry, places=places)
    output.result({"files": [str(p) for p in found]})
    for path in found:
        output.say(str(path))
    return 0


def _ledger() -> Any:
    try:
        from expunge import ledger
        from expunge.ledger import auditing, evidence, places  # noqa: F401  (now they are attributes of the package)
    except ImportError as error:
        raise MissingExtra("The log of a guarded server", "serve") from error
    return ledger
