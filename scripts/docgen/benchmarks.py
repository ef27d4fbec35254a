"""One page per benchmark, and their overview."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from docgen.text import cite, code, markdown, page, parameters, table
from expunge.benchmarks.registry import BENCHMARKS, Benchmark, Source


def built_in() -> list[type[Benchmark]]:
    """The benchmarks that Expunge brings itself, by name."""
    return [kind for name, kind in BENCHMARKS.items() if BENCHMARKS.origin(name) == "expunge"]


def pages() -> dict[str, str]:
    """All pages about benchmarks."""
    out = {f"benchmarks/{kind.name}.md": _page(kind) for kind in built_in()}
    out["benchmarks/index.md"] = _overview()
    return out


def _overview() -> str:
    rows = [
        [f"[`{k.name}`]({k.name}.md)", k.title, str(len(k().axes())), _reference(k()), k.licence] for k in built_in()
    ]  # fmt: skip
    return page(
        "Benchmarks",
        "A benchmark is a published protocol, declared: its data, how the target is made, what is forgotten, and the numbers "
        "that are reported, each a metric with its published options. One command runs it.",
        code("expunge benchmark\nexpunge benchmark tofu\nexpunge benchmark tofu --smoke --method npo --out runs/smoke", "sh"),
        table(["benchmark", "title", "numbers", "compared with", "licence of the data"], rows),
        "See [how to run one, and how to add one](../howto/benchmarks.md).",
    )


def _reference(held: Benchmark) -> str:
    return {"retrained": "models retrained without the forget set", "none": "nothing: there is no retrained model"}.get(
        held.reference, f"the model of the step {held.reference!r}"
    )


def _page(kind: type[Benchmark]) -> str:
    held = kind()
    module = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
    blocks = [
        markdown(inspect.cleandoc(kind.__doc__ or "")),
        code(_example(held), "sh"),
        table(
            ["", ""],
            [["source", cite(held.paper)], ["data", held.home], ["licence", held.licence], ["compared with", _reference(held)]],
        ),
        "## Protocol",
        markdown(module.partition("\n")[2].strip() or module),
        "## Sets",
        table(["set", "what it is", "records", "needed"], [_source(n, s) for n, s in held.sources().items()]),
        "## Numbers",
        table(
            ["axis", "what it is", "metric", "number", "sets", "options"],
            [
                [
                    f"`{a.name}`", a.title + (f" ({a.note})" if a.note else ""), f"[{a.metric}](../metrics/{a.metric}.md)",
                    f"`{a.number}`" + (f" x {a.scale:g}" if a.scale != 1 else ""), _pairs(a.sets), _pairs(a.options),
                ]
                for a in held.axes()
            ],
        ),
    ]  # fmt: skip
    steps = [[t.name, ", ".join(t.sets), _pairs(_flat(t.parts)), t.base] for t in held.trainings()]
    if steps:
        blocks += ["## Training", table(["step", "sets", "published settings", "published on"], steps)]
    if held.unlearning():
        blocks += ["## Unlearning", f"Published settings: {_pairs(_flat(held.unlearning()))}."]
    if held.courses():
        rows = [[c.name, c.kind, ", ".join(c.sets), ", ".join(c.axes), c.text] for c in held.courses()]
        blocks += ["## Courses", table(["course", "kind", "forget sets", "axes", "what it shows"], rows)]
    rule = held.oracle()
    if rule is not None:
        tried = "; ".join(f"`{k}` in {', '.join(f'{v:g}' for v in values)}" for k, values in rule.values.items())
        blocks.append(
            f"Checkpoint rule (`--checkpoint oracle`): the first at which `{rule.axis}` is down to the reference; tried: {tried}."
            " It reads a test metric, so a result that it chose is called *oracle*."
        )
    blocks += ["## Options", parameters(kind)]
    if held.caveats:
        blocks += ["## Read with care", "\n".join(f"- {c}" for c in held.caveats)]
    return page(f"{held.title} (`{held.name}`)", *blocks)


def _example(held: Benchmark) -> str:
    method = " --method npo" if held.roles() is not None and held.reference == "retrained" else ""
    data = f"--data {held.name.split('-')[0]}"
    model = "--model BASE" if held.trainings() else "--target MODEL"
    name = held.name
    return (
        f"expunge benchmark {name}\nexpunge benchmark {name} --smoke{method} --out runs/{name}-smoke\n"
        f"expunge benchmark {name} {data} {model}{method} --out runs/{name}"
    )


def _source(name: str, source: Source) -> list[str]:
    needed = "if there" if source.optional else "yes"
    return [
        f"`{name}`",
        source.text,
        f"{source.rows:,}" if source.rows else "any",
        needed + ("; hazardous" if source.hazardous else ""),
    ]


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    out = {f"{k}.{n}": v for k, held in parts.items() if isinstance(held, Mapping) for n, v in held.items()}
    return out | {k: v for k, v in parts.items() if not isinstance(v, Mapping)}


def _pairs(held: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" if isinstance(v, str) and "\n" in v else f"{k}={v}" for k, v in held.items()).replace(
        "\n", "\\n"
    )
