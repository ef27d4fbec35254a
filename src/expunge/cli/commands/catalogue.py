"""``expunge methods``, ``expunge metrics``, ``expunge attacks`` and ``expunge protocols``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from expunge.cli.output import Output
from expunge.core.errors import InputError

_METHODS = """List the methods, or show one: what it does, formula, parameters with ranges and defaults, needs, paper.

    \b
    Examples:
      expunge methods
      expunge methods npo
      expunge methods --matrix
    """

_METRICS = """List the metrics, or show one: what it measures, formula, direction, range, needs, paper.

    \b
    Examples:
      expunge metrics
      expunge metrics extraction-strength
    """


_ATTACKS = """List the attacks, or show one: what it does, access that it needs, cost, what it is meant to bring back, paper.

    \b
    Examples:
      expunge attacks
      expunge attacks prefix-injection
      expunge audit runs/npo --retrain 3 attacks=prefix-injection
      expunge audit runs/npo --retrain 3 attacks=all
    """


_PROTOCOLS = """List the protocols of an audit, or show one: its criteria, what each must show, its attacks and settings.

    What is printed for a name or a file with --yaml is a protocol file: change it, give it a name and version of its own, and use
    it by --protocol FILE.

    \b
    Examples:
      expunge protocols
      expunge protocols removal-v1
      expunge protocols removal-v1 --yaml > mine.yaml
      expunge audit runs/npo --retrain 3 --protocol removal-v1
    """


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("methods", help=_METHODS)(methods)
    app.command("metrics", help=_METRICS)(metrics)
    app.command("attacks", help=_ATTACKS)(attacks)
    app.command("protocols", help=_PROTOCOLS)(protocols)


def methods(
    name: Annotated[str | None, typer.Argument(help="A method.")] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Which method runs on which modality.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """List or show methods."""
    from expunge.adapters.registry import ADAPTERS
    from expunge.methods.catalogue import describe, find, known, serves
    from expunge.methods.prepared.registry import PREPARED
    from expunge.methods.registry import METHODS, Method

    output = Output(json)
    if name is not None and not isinstance(find(name), Method):
        return _prepared(name, output) if name in PREPARED else _edit(name, output)
    if name is not None:
        found = describe(name)
        output.result({**_plain(dataclasses.asdict(found)), "searched": _searched(name)})
        output.say(f"{found.name}: {found.title}\n\n{found.text}\n\n{found.formula}\n")
        needs = [*found.wants, *(f"reference {r}" for r in found.reads_reference), *(f"{n} of the model" for n in found.needs)]
        output.say("Needs: forget data" + "".join(f", {n}" for n in needs))
        output.say(f"Paper: {found.paper.title}, {found.paper.authors} {found.paper.year}, {found.paper.url}\n")
        for part in (*found.parts, found.published):
            output.say(f"{part.slot} = {part.name}")
            if part.parameters:
                output.say(_parameters(part.parameters))
        _say_searched(name, output)
        for caveat in found.caveats:
            output.say(f"Note: {caveat}")
        return 0
    adapters = dict(ADAPTERS.items())
    rows = {n: {a: serves(m, cls.offers)[0] for a, cls in adapters.items()} for n, m in known().items()}
    if matrix:
        output.result({"matrix": rows})
        table = Table("method", *adapters)
        for row, cells in rows.items():
            table.add_row(row, *("yes" if ok else "-" for ok in cells.values()))
        output.say(table)
        return 0
    output.result({"methods": [{"name": n, "title": m.title, "formula": m.formula} for n, m in known().items()]})
    table = Table("method", "what it is", "loss, or change of the weights")
    for method_name, method in known().items():
        table.add_row(method_name, Text(method.title), Text(method.formula))
    output.say(table)
    for broken, why in METHODS.broken().items():
        output.note(f"The plug-in {broken!r} could not be loaded: {why}")
    return 0


def _edit(name: str, output: Output) -> int:
    from expunge.methods.catalogue import describe_edit

    found = describe_edit(name)
    output.result({**_plain(dataclasses.asdict(found)), "searched": _searched(name)})
    output.say(f"{found.name}: {found.title}\n\n{found.text}\n\n{found.formula}\n")
    needs = [*found.wants, *(f"{n} of the model" for n in found.needs)]
    output.say("Needs: forget data" + "".join(f", {n}" for n in needs) + ". It edits the weights at once; nothing is trained.")
    output.say(f"Paper: {found.paper.title}, {found.paper.authors} {found.paper.year}, {found.paper.url}\n")
    output.say(_parameters(found.parameters))
    _say_searched(name, output)
    for caveat in found.caveats:
        output.say(f"Note: {caveat}")
    return 0


def _searched(name: str) -> dict[str, str]:
    """What ``expunge sweep`` searches of a method; nothing where its parts declare no ranges."""
    from expunge.core.errors import InputError
    from expunge.methods.search import space

    try:
        return {d.path: d.range.text() for d in space(name, {}, {})}
    except InputError:
        return {}


def _say_searched(name: str, output: Output) -> None:
    held = ", ".join(f"{path}={text}" for path, text in _searched(name).items())
    output.say(f"Searched by expunge sweep: {held}" if held else "It declares nothing for expunge sweep to search.")


def _prepared(name: str, output: Output) -> int:
    from expunge.methods.catalogue import describe_prepared

    found = describe_prepared(name)
    output.result(_plain(dataclasses.asdict(found)))
    output.say(f"{found.name}: {found.title}\n\n{found.text}\n\n{found.formula}\n\n{found.guarantee}\n")
    output.say(f"Needs: the training itself, {', '.join(found.needs)} of the model.")
    output.say(f"Paper: {found.paper.title}, {found.paper.authors} {found.paper.year}, {found.paper.url}\n")
    output.say(_parameters(found.parameters))
    for caveat in found.caveats:
        output.say(f"Note: {caveat}")
    return 0


def metrics(
    name: Annotated[str | None, typer.Argument(help="A metric.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """List or show metrics."""
    import inspect

    from expunge.audit.metrics.registry import METRICS

    output = Output(json)
    if name is not None:
        kind = METRICS.get(name)
        text = inspect.cleandoc(kind.__doc__ or "")
        value = {
            "name": kind.name, "title": kind.title, "formula": kind.formula,
            "direction": str(kind.direction), "range": list(kind.range),
            "needs": [str(n) for n in kind.needs], "text": text, "parameters": [dataclasses.asdict(p) for p in kind.declared()],
        }  # fmt: skip
        output.result(value)
        output.say(f"{kind.name}: {kind.title}\n\n{text}\n\n{kind.formula}\n")
        output.say(f"Direction: {kind.direction}; range {kind.range}; needs {', '.join(map(str, kind.needs)) or 'scores only'}")
        if kind.declared():
            output.say(_parameters(kind.declared()))
        return 0
    found = dict(METRICS.items())
    output.result({"metrics": [{"name": n, "title": k.title, "direction": str(k.direction)} for n, k in found.items()]})
    table = Table("metric", "what it measures", "direction")
    for metric_name, kind in found.items():
        table.add_row(metric_name, Text(kind.title), str(kind.direction))
    output.say(table)
    return 0


def attacks(
    name: Annotated[str | None, typer.Argument(help="An attack.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """List or show attacks."""
    import inspect

    from expunge.audit.attacks.registry import ATTACKS

    output = Output(json)
    if name is not None:
        kind = ATTACKS.get(name)
        text = inspect.cleandoc(kind.__doc__ or "")
        where = "on a copy of the model" if kind.copies else "on the model as it is"
        value = {
            "name": kind.name, "title": kind.title, "formula": kind.formula, "access": str(kind.access),
            "criterion": str(kind.criterion), "cost": kind.passes, "copies": kind.copies, "range": list(kind.range),
            "text": text, "parameters": [dataclasses.asdict(p) for p in kind.declared()],
        }  # fmt: skip
        output.result(value)
        output.say(f"{kind.name}: {kind.title}\n\n{text}\n\n{kind.formula}\n")
        output.say(f"Tests: {kind.criterion}. Needs {kind.access}. Cost per forget record: {kind.passes}, {where}.")
        output.say(f"Paper: {kind.paper.title}, {kind.paper.authors} {kind.paper.year}, {kind.paper.url}\n")
        if kind.declared():
            output.say(_parameters(kind.declared()))
        return 0
    found = dict(ATTACKS.items())
    rows = [{"name": n, "title": k.title, "access": str(k.access), "criterion": str(k.criterion)} for n, k in found.items()]
    output.result({"attacks": rows})
    table = Table("attack", "what it is", "tests", "needs", "cost per forget record")
    for attack_name, kind in found.items():
        table.add_row(attack_name, Text(kind.title), str(kind.criterion), str(kind.access), kind.passes)
    output.say(table)
    return 0


def protocols(
    name: Annotated[str | None, typer.Argument(help="A protocol, by name or file.")] = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print it as a file that can be changed.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """List or show protocols."""
    import yaml as library

    from expunge.audit.protocol import load_protocol, packaged

    output = Output(json)
    found = [load_protocol(n) for n in ([name] if name is not None else packaged())]
    plain = [p.model_dump(mode="json") for p in found]
    if yaml and name is None:
        raise InputError("--yaml prints one protocol.", f"Name it: {', '.join(packaged())}.")
    output.result(plain[0] if name is not None else {"protocols": [{"name": p.label, "title": p.title} for p in found]})
    if yaml:
        output.say(Text(library.safe_dump(plain[0], sort_keys=False, allow_unicode=True, width=120)))
        return 0
    if name is None:
        table = Table("protocol", "question", "criteria", "retrained models")
        for protocol in found:
            table.add_row(
                protocol.label, Text(protocol.title), ", ".join(d.id for d in protocol.criteria), str(protocol.references)
            )
        output.say(table)
        return 0
    protocol = found[0]
    output.say(f"{protocol.label}: {protocol.title}\n\n{protocol.text}\n\nRetrained models: at least {protocol.references}.")
    table = Table("criterion", "of", "needs", "attacks", "what holds if it holds")
    for demand in protocol.criteria:
        table.add_row(demand.id, str(demand.criterion), demand.needs, ", ".join(demand.attacks), Text(demand.text))
    output.say(table)
    for key, value in protocol.settings.items():
        output.say(Text(f"{key}: {value}"))
    return 0


def _parameters(parameters: Any) -> Table:
    table = Table("parameter", "allowed", "default", "meaning", box=None, padding=(0, 2))
    for parameter in parameters:
        table.add_row(parameter.name, *map(Text, (parameter.allowed, parameter.default, parameter.text)))
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
