"""The page on attacks: scores of membership, attacks by name, and attacks that every audit tries on a copy of the model."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from docgen.text import cite, code, inline, markdown, page, parameters, table
from expunge.audit import attacks
from expunge.audit.attacks.membership import MEMBERSHIP
from expunge.audit.attacks.registry import ATTACKS, Attack
from expunge.core.settings import Settings


def pages() -> dict[str, str]:
    """The page on attacks."""
    names = [n for n in MEMBERSHIP.names() if MEMBERSHIP.origin(n) == "expunge"]
    head = inspect.cleandoc(inspect.getmodule(MEMBERSHIP.get(names[0])).__doc__ or "")
    rows = [[f"[`{n}`](#{n})", MEMBERSHIP.get(n).title, MEMBERSHIP.get(n).formula] for n in names]
    blocks = [
        "Three kinds of attack: *scores* read the same one pass over the data as every metric; attacks *by name* ask in other "
        "ways, look inside, or change a copy, and are run where they are asked for (`expunge audit ... attacks=NAME`); "
        "*relearning and rounding* are tried on a copy of the model in every audit. A verdict of *forgotten* has to survive all "
        "that were run.",
        "## Membership",
        markdown(head),
        table(["attack", "title", "score"], rows),
        *(block for n in names for block in _membership(n)),
        *_by_name(),
        "## Relearning, rounding, reading out",
        *_acting(),
    ]
    return {"attacks.md": page("Attacks", *blocks)}


def _membership(name: str) -> Iterator[str]:
    cls = MEMBERSHIP.get(name)
    yield f"### `{name}` {{ #{name} }}"
    yield markdown(inspect.cleandoc(cls.__doc__ or ""))
    yield code(cls.formula)
    yield f"Source: {cite(cls.paper)}"
    if cls.declared():
        yield parameters(cls)


def _by_name() -> Iterator[str]:
    """Each registered attack, after a table of all."""
    found = [ATTACKS.get(n) for n in ATTACKS.names() if ATTACKS.origin(n) == "expunge"]
    yield "## Attacks by name"
    yield markdown(inspect.cleandoc(inspect.getmodule(Attack).__doc__ or ""))
    rows = [[f"[`{a.name}`](#{a.name})", a.title, str(a.criterion), str(a.access), a.passes] for a in found]
    yield table(["attack", "title", "tests", "needs", "cost per forget record"], rows)
    for cls in found:
        yield f"### `{cls.name}` {{ #{cls.name} }}"
        yield markdown(inspect.cleandoc(cls.__doc__ or ""))
        yield code(cls.formula)
        yield f"Source: {cite(cls.paper)}"
        if cls.declared():
            yield parameters(cls)


def _acting() -> Iterator[str]:
    """Every other module of attacks: its docstring, and the settings that it declares."""
    for info in sorted(pkgutil.iter_modules(attacks.__path__), key=lambda i: i.name):
        module = importlib.import_module(f"{attacks.__name__}.{info.name}")
        settings = [
            c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Settings) and c.__module__ == module.__name__
        ]
        named = any(inspect.isclass(c) and issubclass(c, Attack) for c in vars(module).values())
        if info.name == "membership" or info.name.startswith("_") or named:
            continue
        yield f"### {info.name.replace('_', ' ').capitalize()} {{ #{info.name} }}"
        yield markdown(inspect.cleandoc(module.__doc__ or ""))
        for cls in (c for c in settings if not c.__name__.startswith("_")):
            yield f"Parameters (`{cls.__name__}`): {inline(inspect.cleandoc(cls.__doc__ or ''))}"
            yield parameters(cls)
