"""``expunge guards``."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from expunge.cli.output import Output
from expunge.core.errors import unknown

_HELP = """List guards, or show one with its parts and settings; of a detector or an action its settings.

    A guard stands before a model and changes no weights: a detector that notices, and an action. Any detector can be joined to
    any action in a guard file (expunge serve --help).

    \b
    Examples:
      expunge guards
      expunge guards filter
      expunge guards --parts
      expunge guards terms
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("guards", help=_HELP)(guards)


def guards(
    name: Annotated[str | None, typer.Argument(help="A guard, a detector or an action.")] = None,
    parts: Annotated[bool, typer.Option("--parts", help="List detectors and actions.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """List or show."""
    from expunge.guards.named import GUARDS
    from expunge.guards.parts import ACTIONS, DETECTORS

    output = Output(json)
    if name is not None:
        if name not in GUARDS and name not in DETECTORS and name not in ACTIONS:
            raise unknown("guard", name, [*GUARDS.names(), *DETECTORS.names(), *ACTIONS.names()])
        _show(name, output)
        return 0
    if not parts:
        held = [(n, g) for n, g in GUARDS.items()]
        output.result({"guards": [{"name": n, "title": g.title, "hooks": _hooks(g.rows())} for n, g in held]})
        table = Table("guard", "what it is", "detectors and actions", "works on")
        for n, g in held:
            rows = g.rows()
            table.add_row(
                n, Text(g.title), ", ".join(f"{r.detector.name} x {r.action.name}" for r in rows), ", ".join(_hooks(rows))
            )
        output.say(table)
        return 0
    both: dict[str, Any] = {"detectors": DETECTORS, "actions": ACTIONS}
    output.result({k: [{"name": n, "title": c.title} for n, c in registry.items()] for k, registry in both.items()})
    for kind, registry in both.items():
        table = Table(kind[:-1], "what it is", "works on")
        for n, c in registry.items():
            table.add_row(n, Text(c.title), ", ".join(sorted(c.sees if kind == "detectors" else c.acts)))
        output.say(table)
    return 0


def _hooks(rows: Any) -> list[str]:
    return sorted({str(h) for r in rows for h in r.hooks})


def _show(name: str, output: Output) -> None:
    from expunge.guards.named import GUARDS
    from expunge.guards.parts import ACTIONS, DETECTORS

    if name in GUARDS:
        found = GUARDS.get(name)
        rows = found.rows()
        described = [r.described() for r in rows]
        output.result({"name": name, "title": found.title, "text": found.text, "paper": found.paper.url, "rows": described})
        paper = f"{found.paper.title}, {found.paper.authors} {found.paper.year}, {found.paper.url}"
        output.say(f"{name}: {found.title}\n\n{found.text}\n\nPaper: {paper}")
        for row in rows:
            for kind, part in (("detector", row.detector), ("action", row.action)):
                output.say(f"\n{kind} = {part.name}: {part.title}")
                _parameters(part, output)
        for caveat in found.caveats:
            output.say(f"Note: {caveat}")
        output.say("Note: What a guard hides is in the weights still: suppressed at best, never forgotten.")
        return
    for kind, registry in (("detector", DETECTORS), ("action", ACTIONS)):
        if name in registry:
            cls: Any = registry.get(name)
            declared = [vars(p) for p in cls.declared()]
            output.result({"name": name, "kind": kind, "title": cls.title, "parameters": declared})
            output.say(f"{name} ({kind}): {cls.title}\n\n{inspect.getdoc(cls) or ''}\n")
            _parameters(cls, output)


def _parameters(part: Any, output: Output) -> None:
    declared = part.declared()
    if declared:
        table = Table("parameter", "allowed", "default", "meaning", box=None, padding=(0, 2))
        for p in declared:
            table.add_row(p.name, *map(Text, (p.allowed, p.default, p.text)))
        output.say(table)
