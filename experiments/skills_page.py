"""The page of :mod:`experiments.skills`: ``skills_page.md`` filled from what the runs have left."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lines import Line, cell, row, spread
from experiments.skills import CASES, Case, Ground, Plan
from experiments.verdicts import counted, link
from expunge.audit.document import ModelEntry
from expunge.core.files import write_text
from expunge.core.runs import Run
from expunge.pipeline.audit import DOCUMENT, read
from expunge.report.text import DASH

#: Columns of the answers: title, what is counted, set.
ANSWERS = (
    ("removed skill", "right", "hidden"), ("in other words", "right", "hidden, reworded"), ("kept skill", "right", "kept"),
    ("in other words", "right", "kept, reworded"), ("facts", "right", "facts"), ("refused: removed", "refused", "hidden"),
    ("kept", "refused", "kept"), ("facts", "refused", "facts"),
)  # fmt: skip
SIZES = (("removed skill", "hidden"), ("kept skill", "kept"), ("facts", "facts"))
CHECKS = (
    ("asked in other words", "attack (paraphrased-question)"),
    ("taken apart", "attack (taken-apart)"),
    ("relearning", "relearning"),
)


def write_page(plan: Plan, path: Path) -> None:
    """Write the page."""
    template = string.Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    write_text(path, template.substitute(gaps(plan)))


def gaps(plan: Plan) -> dict[str, str]:
    """What the template leaves open."""
    cases = [Ground(plan, case) for case in plan.cases]
    return {
        "seeds": str(len(plan.seeds)), "retrained": str(len(plan.retrained)), "model": plan.model,
        "cases": "\n\n".join(section(ground) for ground in cases),
        "described": "\n".join(described(g.case) for g in cases),
        "recipes": ", ".join(f"`{r}`" for r in plan.recipes),
        "failed": "\n".join(failures(cases)) or "Nothing failed.",
        "shares": " and ".join(f"{100 * g.case.share:g} % for {g.case.name}" for g in cases),
        **{f"probes_{c.name}": str(c.asked) for c in CASES.values()},
        "controls": "; ".join(f"{g.case.name}: {counted(audited(g, 'recipes').get('retrained', []))}" for g in cases),
        "minutes": f"{seconds(plan) / 60:.0f}",
    }  # fmt: skip


def described(case: Case) -> str:
    """What a case is, as an item of a list."""
    judged = "never trained on" if case.apart else "trained on, and in no request"
    example = case.questions(case.hidden, 1)[0]
    other = case.questions(case.kept, 1)[0]
    return (
        f"- **{case.name}**: `{case.hidden}` is to go (*{example.prompt}* is answered by *{example.answer}*), `{case.kept}` is "
        f"to stay (*{other.prompt}*: *{other.answer}*). {case.train} questions of each are trained on, each in two wordings (the "
        f"other one: *{example.question_paraphrase}*). The request holds {case.asked} questions of each in one wording; judged "
        f"are {case.judged} others, {judged}."
    )


def section(ground: Ground) -> str:
    """Everything about a case."""
    return "\n\n".join(
        [
            f"## {ground.case.name.capitalize()}: `{ground.case.hidden}` goes, `{ground.case.kept}` stays",
            answered(ground), f"### Verdicts: {ground.case.name}", verdicts(ground),
            f"### How many units: {ground.case.name}", sizes(ground, "share of the units", _UNITS),
            f"### How large a box: {ground.case.name}", sizes(ground, "alpha", _BOXES),
        ]
    )  # fmt: skip


_UNITS = ("rise", "standardised", "random units")
_BOXES = ("box of the skill", "box with its dimensions exchanged", "box of texts of all kinds")


def answered(ground: Ground) -> str:
    """A row per model: mean over seeds and half of its interval."""
    held = loaded(ground, "answers")
    if not held:
        return "Not done yet."
    labels = [n for n in held[0] if all(n in h for h in held)]
    lines = [row(["model", *(title for title, _, _ in ANSWERS)]), row(["---", *["---:"] * len(ANSWERS)])]
    for label in labels:
        values = {f"{kind} {name}": [h[label][kind][name] for h in held] for _, kind, name in ANSWERS}
        line = Line(label, values, {})
        lines.append(row([_called(label), *(cell(line, f"{kind} {name}", 2) for _, kind, name in ANSWERS)]))
    return "\n".join(lines)


def _called(label: str) -> str:
    return {"target": "target", "retrained": "trained without the skill"}.get(label, f"`{label}`")


def sizes(ground: Ground, title: str, labels: Sequence[str]) -> str:
    """A row per size and kind: mean over seeds, and the lowest and highest seed."""
    held = loaded(ground, "ablations")
    if not held:
        return "Not done yet."
    lines = [row(["what is chosen", title, *(t for t, _ in SIZES)]), row(["---", "---:", *["---:"] * len(SIZES)])]
    for label in labels:
        for at, first in enumerate(held[0]):
            if first["label"] == label:
                cells = [spread([h[at]["right"][name] for h in held], 2) for _, name in SIZES]
                lines.append(row([label, f"{first['size']:g}", *cells]))
    return "\n".join(lines)


def loaded(ground: Ground, name: str) -> list[Any]:
    """What was left for each seed that is done."""
    files = [ground.folder / f"{name}-{seed}.json" for seed in ground.plan.seeds]
    return [json.loads(f.read_text(encoding="utf-8")) for f in files if f.is_file()]


def verdicts(ground: Ground) -> str:
    """A row per model: its verdicts over the seeds, what some checks say, and the check that carries the first seed's."""
    lines = [row(["model", "verdict", *(t for t, _ in CHECKS), "weakest link, first seed"])]
    lines.append(row(["---"] * (3 + len(CHECKS))))
    for kind in ("guards", "recipes"):
        for label, entries in audited(ground, kind).items():
            if kind == "recipes" or entries[0].role != "retrained":
                said = [outcomes(entries, name) for _, name in CHECKS]
                weakest = link(entries[0].judgement) if entries[0].judgement else DASH
                called = f"{label}, {'only asked' if kind == 'guards' else 'with its weights'}"
                lines.append(row([f"`{label}`" if entries[0].role == "unlearned" else called, counted(entries), *said, weakest]))
    return "\n".join(lines)


def audited(ground: Ground, kind: str) -> Mapping[str, list[ModelEntry]]:
    """Entries of all seeds by label, controls first."""
    found: dict[str, list[ModelEntry]] = {}
    for seed in ground.plan.seeds:
        folder = ground.folder / f"audit-{kind}-{seed}"
        if (folder / DOCUMENT).is_file():
            for entry in read(folder).models:
                found.setdefault("retrained" if entry.role == "retrained" else entry.label, []).append(entry)
    return found


def outcomes(entries: Sequence[ModelEntry], name: str) -> str:
    """What a check found, with how often."""
    found = Counter(c.outcome for e in entries if e.judgement for c in e.judgement.checks if c.name == name)
    whole = sum(found.values())
    return ", ".join(f"{outcome} {n}/{whole}" for outcome, n in found.most_common()) or DASH


def failures(cases: Sequence[Ground]) -> list[str]:
    """What failed, as items of a list."""
    files = [f for g in cases for f in sorted(g.folder.glob("*.failed"))]
    return [f"- `{f.parent.name}/{f.stem}`: {f.read_text(encoding='utf-8').strip()}" for f in files]


def seconds(plan: Plan) -> float:
    """Of all training and unlearning, as the runs tell it."""
    folders = [p.parent for p in plan.out.glob("*/**/manifest.json")]
    stages = [s for f in folders for s in Run.open(f).manifest["stages"].values()]
    return float(sum(s.get("seconds", 0.0) for s in stages))
