"""One page per kind of part, with every parameter of every part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from docgen.text import inline, markdown, page, parameters, summary, table
from expunge.core.registry import Registry
from expunge.engine.balance import BALANCES
from expunge.engine.finish import FINISHES
from expunge.engine.gradient import GRADIENTS
from expunge.engine.parameters import PARAMETERS
from expunge.engine.parts import Recipe
from expunge.engine.penalty import PENALTIES
from expunge.engine.schedule import SCHEDULES
from expunge.methods.controls.registry import CONTROLS
from expunge.methods.preparations.registry import PREPARATIONS
from expunge.methods.registry import TERMS


@dataclass(frozen=True)
class Group:
    """A kind of part."""

    title: str
    file: str
    key: str
    registry: Registry[Any]
    text: str


GROUPS = (
    Group(
        "Loss terms",
        "terms",
        "forget",
        TERMS,
        "Summands of the loss, functions of per-target quantities: `forget=NAME`, `retain=NAME`. A term returns one value per "
        "target, example or token; the engine sums and divides by the count over the whole optimiser step, so neither "
        "accumulation nor distribution changes the result.",
    ),
    Group(
        "Preparations",
        "preparations",
        "preparation",
        PREPARATIONS,
        "What is made from the target and the data before training, for the terms to read: `preparation=NAME`.",
    ),
    Group("Parameters", "parameters", "parameters", PARAMETERS, "Which parameters move: `parameters=NAME`."),
    Group("Gradients", "gradients", "gradient", GRADIENTS, "What is done to the gradient before each step: `gradient=NAME`."),
    Group("Balances", "balances", "balance", BALANCES, "How forgetting and keeping are weighed: `balance=NAME`."),
    Group("Schedules", "schedules", "schedule", SCHEDULES, "How long, how fast, in which portions: `schedule=NAME`."),
    Group(
        "Controls",
        "controls",
        "control",
        CONTROLS,
        "Who looks at the forget examples as they are forgotten, lets some rest and ends training: `control=NAME`.",
    ),
    Group("Penalties", "penalties", "penalty", PENALTIES, "A summand of the loss on the weights: `penalty=NAME`."),
    Group("Finishes", "finishes", "finish", FINISHES, "A change of the weights after training: `finish=NAME`."),
)


def pages() -> dict[str, str]:
    """All pages about parts."""
    out = {f"parts/{g.file}.md": _page(g) for g in GROUPS}
    out["parts/index.md"] = _overview()
    return out


def _names(group: Group) -> list[str]:
    return [n for n in group.registry.names() if group.registry.origin(n) == "expunge"]


def _page(group: Group) -> str:
    known = [[f"[`{n}`](#{n})", summary(group.registry.get(n))] for n in _names(group)]
    blocks = [group.text, table(["name", "in one sentence"], known)]
    for name in _names(group):
        cls = group.registry.get(name)
        blocks.append(f"## `{name}` {{ #{name} }}")
        blocks.append(markdown(_doc(cls)))
        if group.file == "terms":
            blocks.append(f"One value per {cls.per}; normalised over the {_stream(cls)} examples.")
        if group.file == "preparations":
            blocks.append(f"It makes {_names_of(cls.makes)} and reads {_names_of(cls.reads) or 'no examples'}.")
        blocks.append(parameters(cls))
    return page(group.title, *blocks)


def _names_of(things: Any) -> str:
    return ", ".join(f"`{t}`" for t in sorted(map(str, things)))


def _doc(cls: Any) -> str:
    import inspect

    return inspect.cleandoc(cls.__doc__ or "")


def _stream(cls: Any) -> str:
    return str(cls().stream.value)


def _overview() -> str:
    rows = [
        [f"[{g.title}]({g.file}.md)", f"`{g.key}=`", ", ".join(f"`{n}`" for n in _names(g)), g.text.split(": ")[0].split(". ")[0]]
        for g in GROUPS
    ]
    return page(
        "Parts of a method",
        "```text\npreparation x forget terms x retain terms x reference x parameters x gradient x balance x schedule x control\n"
        "  x penalty x finish\n```",
        markdown(_doc(Recipe)),
        "Every part is immutable and typed; a wrong name or value is refused before anything starts, with the nearest valid one.",
        table(["kind", "chosen by", "there are", "what it decides"], rows),
        "## Fields of a recipe",
        table(["field", "meaning"], [[f"`{p.name}`", inline(p.text)] for p in Recipe.declared()]),
    )
