"""One page per method, their overview, the table of methods by modality, the index of papers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from docgen.text import cite, code, inline, page, parameters, summary, table
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.registry import ADAPTERS
from expunge.core.access import Of, Stream
from expunge.core.settings import Settings, describe_value
from expunge.engine.parts import Recipe
from expunge.engine.reference import choose
from expunge.methods.catalogue import (
    EditDescription,
    PreparedDescription,
    describe_edit,
    describe_prepared,
    offers_needed,
    serves,
)
from expunge.methods.compose import compose
from expunge.methods.edits.registry import EDITS
from expunge.methods.prepared.registry import PREPARED
from expunge.methods.registry import METHODS, PLACEHOLDER_LAYERS, TERMS, Method

_WANTS = {
    "retain": "a retain set (`--retain DATA`)",
    "alternatives": "other answers to the forget prompts",
    "holdout": "held-out rows with the classes of the forget set",
    "base": "the untrained base of the model (`--base MODEL`)",
    "oracle": "an oracle: a model trained without the forget set (`oracle=` from Python), or what it says "
    "(`preparation=given-outputs`)",
}
_REFERENCE = {
    "none": "none: no frozen copy of the target is read",
    "cached": "cached log-probabilities: computed once, no second model in memory",
    "adapter-off": "the same weights with the LoRA switched off: one more forward pass per step",
    "copy": "a second copy of the model in memory, or none with `parameters=lora`",
}
_MODELS = {
    Of.CURRENT: "current model",
    Of.REFERENCE: "frozen target",
    Of.INCOMPETENT: "untrained network",
    Of.ORACLE: "oracle",
}
_PLURALS = {"parameters": "parameters", "finish": "finishes", "penalty": "penalties"}
_PARTS = ("preparation", "parameters", "gradient", "balance", "schedule", "control", "penalty", "finish")
_PAGES = {p: _PLURALS.get(p, p + "s") for p in _PARTS}


Other = EditDescription | PreparedDescription  #: a method without parts


def built_in() -> list[Method]:
    """The methods that Expunge brings itself, by name: what other installed packages add is not documented here."""
    return [m for name, m in METHODS.items() if METHODS.origin(name) == "expunge"]


def pages() -> dict[str, str]:
    """All pages about methods."""
    known = built_in()
    edits = [describe_edit(name) for name, _ in EDITS.items() if EDITS.origin(name) == "expunge"]
    out = {f"methods/{m.name}.md": _page(m) for m in known}
    out |= {f"methods/{e.name}.md": _edit_page(e) for e in edits}
    prepared = [describe_prepared(name) for name, _ in PREPARED.items() if PREPARED.origin(name) == "expunge"]
    out |= {f"methods/{p.name}.md": _prepared_page(p) for p in prepared}
    others: list[Other] = [*edits, *prepared]
    out["methods/index.md"] = _overview(known, others)
    out["matrix.md"] = _matrix(known, others)
    out["papers.md"] = _papers(known, others)
    return out


def _link(m: Method | Other) -> str:
    return f"[`{m.name}`](methods/{m.name}.md)"


def _overview(known: list[Method], edits: list[Other]) -> str:
    every: list[Method | Other] = [*known, *edits]
    rows = [
        [
            f"[`{m.name}`]({m.name}.md)",
            m.title,
            inline(m.text.split("\n\n")[0]),
            "the training itself" if isinstance(m, PreparedDescription) else ", ".join(m.wants) or "nothing more",
            str(m.paper.year),
        ]
        for m in sorted(every, key=lambda m: m.name)
    ]
    return page(
        "Methods",
        "A method is a named recipe: a choice of [parts](../parts/index.md) with the published coefficients. Any part can be "
        "replaced and any parameter changed on the command line, in YAML or from Python, and any crossing of parts runs. An "
        "*edit* has no parts: it changes the weights at once, by a formula. A *prepared* method shapes the training, so that "
        "rows can be taken out later, exactly or with a certificate.",
        table(["method", "title", "in one sentence", "needs besides the forget set", "year"], rows),
        "By default every recipe runs on the adaptive schedule, which finds its step size on the model at hand and stops when "
        "the forget set looks unseen; `schedule=paper` gives the published fixed one. See [schedules](../parts/schedules.md).",
    )


def _page(m: Method) -> str:
    recipe = m.build()
    first, _, rest = m.text.partition("\n\n")
    return page(
        f"{m.title} (`{m.name}`)",
        inline(" ".join(first.split())),
        code(m.formula),
        inline(rest),
        f"Source: {cite(m.paper)}",
        "## Use",
        _use(m),
        "## What it needs",
        "\n".join(f"- {line}" for line in _needs(m, recipe)),
        "## Caveats" if m.caveats else "",
        "\n".join(f"- {inline(c)}" for c in m.caveats),
        "## Parts and parameters",
        "The column *here* is what the method sets; what differs from the part's own default is in bold. " + _together(m),
        *_parts(recipe),
        "## Published setting",
        _published(m),
    )


def _edit_page(e: EditDescription) -> str:
    first, _, rest = e.text.partition("\n\n")
    needs = "a forget set and a retain set (`--retain DATA`)" if e.wants else "a forget set"
    retain = " --retain DATA" if e.wants else ""
    return page(
        f"{e.title} (`{e.name}`)",
        inline(" ".join(first.split())),
        code(e.formula),
        inline(rest),
        f"Source: {cite(e.paper)}",
        "## Use",
        code(f"expunge unlearn MODEL --forget DATA{retain} --method {e.name} --out RUN", "sh")
        if set(e.needs) <= LanguageAdapter.offers
        else _on_rows(e.name),
        "## What it needs",
        f"- Data: {needs}.\n- It reads: {', '.join(e.needs)} of the model.",
        "- It is an edit: nothing is trained, no schedule applies.",
        "## Caveats",
        "\n".join(f"- {inline(c)}" for c in e.caveats),
        "## Parameters",
        parameters(EDITS.get(e.name)),
    )


def _prepared_page(p: PreparedDescription) -> str:
    first, _, rest = p.text.partition("\n\n")
    commands = f"expunge train ENTRY --method {p.name} --out RUN\nexpunge unlearn RUN --id ID"
    texts = f"expunge train MODEL --data DATA --method {p.name} --out RUN schedule.lr=1e-4\nexpunge unlearn RUN --subject NAME"
    on_texts = [f"On texts:\n\n{code(texts, 'sh')}"] if set(p.needs) <= LanguageAdapter.offers else []
    return page(
        f"{p.title} (`{p.name}`)",
        inline(" ".join(first.split())),
        code(p.formula),
        inline(rest),
        f"Source: {cite(p.paper)}",
        "## What is promised",
        inline(p.guarantee),
        "## Use",
        "On rows ([how, and from Python](../howto/prepared.md)):\n\n" + code(commands, "sh"),
        *on_texts,
        "## What it needs",
        f"- The training itself: rows are taken out of what it has trained.\n- It reads: {', '.join(p.needs)} of the model.",
        "## Caveats",
        "\n".join(f"- {inline(c)}" for c in p.caveats),
        "## Parameters",
        parameters(PREPARED.get(p.name)),
        *_inner(PREPARED.get(p.name)),
    )


def _inner(kind: type[Settings]) -> Iterator[str]:
    """What can be set within a setting."""
    for name, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            yield f"### `{name}.KEY`"
            yield inline(inspect.cleandoc(info.annotation.__doc__ or ""))
            yield parameters(info.annotation)


def _use(m: Method) -> str:
    """Commands for language models, Python for methods that only rows have."""
    return code("\n".join(_commands(m)), "sh") if serves(m, LanguageAdapter.offers)[0] else _on_rows(m.name)


def _on_rows(name: str) -> str:
    call = f'expunge.unlearn_rows(model, data, classes=["3"], holdout=unseen, method="{name}")'
    return f"On rows, from Python ([how](../howto/classifiers.md)):\n\n{code(call, 'python')}"


def _commands(m: Method) -> Iterator[str]:
    words = "expunge unlearn MODEL --forget DATA"
    if "retain" in m.wants:
        words += " --retain DATA"
    if "holdout" in m.wants:
        words += " --holdout DATA"
    if "base" in m.wants:
        words += " --base MODEL"
    yield f"{words} --method {m.name} --out RUN"
    yield f"{words} --method {m.name} --out RUN schedule=paper"


def _needs(m: Method, recipe: Recipe) -> Iterator[str]:
    yield "Data: the forget set" + "".join(f", {_WANTS[w]}" for w in m.wants) + "."
    if "alternatives" in m.wants:
        yield f"Other answers come from `{m.alternatives}`, unless said otherwise (`--alternatives`)."
    values = sorted({f"{_value(v)} of the {_MODELS[of]}" for _, of, v in _read(recipe)})
    yield "It reads: " + "; ".join(values) + "."
    yield "Reference: " + _REFERENCE[choose(recipe, recipe.needs(PLACEHOLDER_LAYERS))] + "."


def _value(value: str) -> str:
    return "features" if value.startswith("features:") else value


def _read(recipe: Recipe) -> frozenset[tuple[Stream, Of, str]]:
    return recipe.needs(PLACEHOLDER_LAYERS)


def _together(m: Method) -> str:
    if not m.together:
        return ""
    names = ", ".join(f"`{name}`" for name in m.together)
    return f"Several parts share {names}: the bare name sets them all."


def _chosen(recipe: Recipe) -> Iterator[tuple[str, Settings]]:
    for side in ("forget", "retain"):
        yield from ((f"{side} term", term) for term in getattr(recipe, side))
    yield from ((key, getattr(recipe, key)) for key in _PARTS if getattr(recipe, key) is not None)


def _anchor(slot: str, part: Settings) -> str:
    name = getattr(part, "name", "")
    return f"[`{name}`](../parts/{_PAGES.get(slot, 'terms')}.md#{name})"


def _parts(recipe: Recipe) -> Iterator[str]:
    """All parts in one table, then the parameters of those that are this method's own choice."""
    chosen = list(_chosen(recipe))
    yield table(["part", "choice", "what it does"], [[slot, _anchor(slot, part), summary(type(part))] for slot, part in chosen])
    usual = compose()
    for slot, part in chosen:
        if getattr(usual, slot, None) != part and type(part).declared():
            yield f"### {slot.capitalize()}: {_anchor(slot, part)}"
            yield parameters(type(part), part.model_dump())


def _published(m: Method) -> str:
    rows = [
        [f"`schedule.{p.name}`", describe_value(getattr(m.published, p.name)), inline(p.text)]
        for p in type(m.published).declared()
    ]
    rows += [[f"`{part}.{key}`", describe_value(value), ""] for part, held in m.with_paper.items() for key, value in _flat(held)]
    return f"`schedule=paper` stands for:\n\n{table(['parameter', 'value', 'meaning'], rows)}"


def _flat(held: object) -> list[tuple[str, object]]:
    return list(held.items()) if isinstance(held, dict) else [("name", held)]


def _matrix(known: list[Method], edits: list[Other]) -> str:
    modalities = [name for name, _ in ADAPTERS.items() if ADAPTERS.origin(name) == "expunge"]
    rows = []
    for m in known:
        cells = ["yes" if serves(m, ADAPTERS.get(name).offers)[0] else "no" for name in modalities]
        rows.append([_link(m), ", ".join(offers_needed(m.build(), m.alternatives)), *cells])
    for e in edits:
        cells = ["yes" if set(e.needs) <= ADAPTERS.get(name).offers else "no" for name in modalities]
        rows.append([_link(e), ", ".join(e.needs), *cells])
    rows.sort()
    offered = [[name, ", ".join(sorted(ADAPTERS.get(name).offers)), summary(ADAPTERS.get(name))] for name in modalities]
    return page(
        "Where each method runs",
        "A method runs on every modality whose adapter offers what the method's parts read. The table is derived from these "
        "declarations; nothing is listed by hand.",
        table(["method", "reads", *modalities], rows),
        "## What the adapters offer",
        table(["modality", "offers", "what it serves"], offered),
    )


def _papers(known: list[Method], edits: list[Other]) -> str:
    rows = [[cite(m.paper), _link(m), f"`--method {m.name} schedule=paper`"] for m in known]
    rows += [[cite(e.paper), _link(e), _how(e)] for e in edits]
    rows += [[text, link, f"`{how}`"] for text, link, how in _other_papers()]
    return page(
        "Papers",
        "One row per published method, with the configuration that reproduces it: the published coefficients are the defaults, "
        "and `schedule=paper` adds the published fixed schedule. Where sources disagree, the method's page says which one is "
        "followed.",
        table(["paper", "method", "configuration"], rows),
        "The full command is `expunge unlearn MODEL --forget DATA --retain DATA --method NAME --out RUN schedule=paper`.",
        f"Loss terms that no method above uses by default, to be crossed with anything: {_free_terms(known)}.",
    )


def _how(e: Other) -> str:
    return f"`expunge train ENTRY --method {e.name}`" if isinstance(e, PreparedDescription) else f"`--method {e.name}`"


def _other_papers() -> list[tuple[str, str, str]]:
    from docgen.parts import GROUPS

    out = []
    for group in GROUPS:
        for name, cls in group.registry.items():
            if group.file != "terms" and "arXiv" in (cls.__doc__ or "") and group.registry.origin(name) == "expunge":
                out.append((summary(cls), f"[`{name}`](parts/{group.file}.md#{name})", f"{group.key}={name}"))
    return out


def _free_terms(known: list[Method]) -> str:
    used = {t.name for m in known for t in m.build().terms()}
    free = [f"[`{n}`](parts/terms.md#{n})" for n, _ in TERMS.items() if n not in used and TERMS.origin(n) == "expunge"]
    return ", ".join(free) or "none"
