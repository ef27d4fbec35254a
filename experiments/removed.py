"""Removed, or only suppressed: every run of :mod:`experiments.llm_methods` under the protocol removal-v1.

Usage, from the repository root, after (or during) that experiment::

    OMP_NUM_THREADS=1 python -m experiments.removed --data FOLDER --out runs/llm-methods --page PAGE.md

The runs are judged as they are: nothing is trained again but copies under attack. Each method's audit is a run folder beside its
own (``methods/NAME/removal-v1-seed-1``): what is done is not done again, what failed stands as failed. The sets are those of that
experiment, without the records that its sweeps measured on.
"""

from __future__ import annotations

import argparse
import os
import string
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.llm_methods import Plan, audit_runs, done
from experiments.stages import Stages
from experiments.verdicts import ORDER, link, ordered
from expunge.audit.document import AuditDocument, ModelEntry
from expunge.audit.protocol import load_protocol
from expunge.audit.settings import AuditSettings
from expunge.core.files import write_text
from expunge.pipeline.audit import DOCUMENT, read
from expunge.pipeline.config import TextConfig
from expunge.pipeline.models import open_adapter
from expunge.report.text import DASH

PROTOCOL = "removal-v1"


@dataclass(frozen=True)
class Course:
    """What is judged: the runs of which seeds, and how.

    Attributes:
        plan: of the experiment whose runs they are.
        seeds: of the runs.
        audit: under the protocol.
    """

    plan: Plan
    seeds: tuple[int, ...] = (1,)
    audit: AuditSettings = field(default_factory=lambda: AuditSettings.under(PROTOCOL, samples_forget=0, samples_retain=0))

    @property
    def folder(self) -> str:
        """Name of an audit's folder, beside the runs of a method."""
        return f"{PROTOCOL}-seed-{'-'.join(map(str, self.seeds))}"

    def methods(self) -> list[str]:
        """Those with a run that has ended, by name."""
        found = sorted(p.name for p in (self.plan.out / "methods").iterdir() if p.is_dir())
        return [m for m in found if any(done(self.plan.out / "methods" / m / f"seed-{s}") for s in self.seeds)]


def experiment(course: Course, stages: Stages) -> None:
    """Audit every method, or what is left of them."""
    for method in course.methods():
        place = course.plan.out / "methods" / method
        stages.do(
            f"{method}: {PROTOCOL}",
            lambda m=method: audit_runs(course.plan, m, course.folder, course.seeds, course.audit),
            place / f"{course.folder}.failed",
        )  # type: ignore[misc]


# ---- the page


def found(course: Course) -> tuple[dict[str, AuditDocument], dict[str, str]]:
    """Audits by method, and what failed."""
    held, failed = {}, {}
    for method in course.methods():
        place = course.plan.out / "methods" / method
        if (place / course.folder / DOCUMENT).is_file():
            held[method] = read(place / course.folder)
        elif (place / f"{course.folder}.failed").is_file():
            failed[method] = (place / f"{course.folder}.failed").read_text(encoding="utf-8").strip()
    return held, failed


def write_page(course: Course, path: Path) -> None:
    """Write the page from what there is."""
    held, failed = found(course)
    template = string.Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    write_text(path, template.substitute(gaps(course, held, failed)))


def gaps(course: Course, held: Mapping[str, AuditDocument], failed: Mapping[str, str]) -> dict[str, str]:
    """What the template leaves open."""
    entries = [e for document in held.values() for e in document.models if e.role == "unlearned" and e.judgement]
    first = next(iter(held.values()))
    protocol = load_protocol(PROTOCOL)
    verdicts = Counter(e.judgement.verdict for e in entries if e.judgement)
    missing = [m for m in course.methods() if m not in held and m not in failed]
    return {
        "count": str(len(entries)), "protocol": protocol.label,
        "verdicts": ", ".join(f"{verdicts[v]} {v.value}" for v in ORDER if verdicts[v]),
        "criteria": "\n".join(f"- **{d.id}**, {d.criterion} ({d.needs}): {d.text}" for d in protocol.criteria),
        "controls": table([e for e in first.models if e.role in ("target", "retrained")], protocol_ids(course)),
        "table": table(ordered(entries), protocol_ids(course)),
        "failed": "\n".join(f"- `{m}`: {why}" for m, why in failed.items()) or "Nothing failed.",
        "missing": f"Not judged yet: {', '.join(missing)}." if missing else "",
        "seeds": " and ".join(map(str, course.seeds)), "seed_list": " ".join(map(str, course.seeds)),
        "seconds": f"{sum(float(d.cost['seconds']) for d in held.values()) / max(1, len(held)):.0f}",
        "parameters": f"{_parameters(course):,}",
        "sets": ", ".join(f"{d['records']} records in the {n} set" for n, d in first.data.items()),
    }  # fmt: skip


def _parameters(course: Course) -> int:
    folder = course.plan.target
    return sum(p.numel() for p in open_adapter(str(folder), TextConfig()).model.parameters()) if folder.is_dir() else 0


def protocol_ids(course: Course) -> list[str]:
    """Names of the criteria, in order."""
    assert course.audit.protocol is not None
    return [d.id for d in course.audit.protocol.criteria]


def table(entries: Sequence[ModelEntry], ids: Sequence[str]) -> str:
    """A row per model: verdict, criteria, weakest link."""
    lines = [f"| model | verdict | {' | '.join(ids)} | weakest link |", f"| --- | --- | {' | '.join('---' for _ in ids)} | --- |"]
    for entry in entries:
        judgement = entry.judgement
        if judgement is None:
            continue
        outcomes = {f.id: _SHORT[f.outcome] for f in judgement.criteria}
        cells = " | ".join(outcomes.get(i, DASH) for i in ids)
        lines.append(f"| {entry.label} | {judgement.verdict.value} | {cells} | {link(judgement)} |")
    return "\n".join(lines)


_SHORT = {"held": "+", "failed": "**no**", "undecided": "?", "tells nothing": "0", "reported": "(r)", "not run": DASH}


def main(words: Sequence[str] | None = None) -> int:
    """Judge the runs, write the page."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(prog="python -m experiments.removed", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of TOFU's files; else EXPUNGE_DATA, else the hub")
    parser.add_argument("--out", type=Path, default=Path("runs/llm-methods"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="Markdown file for the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="seeds of the runs that are judged")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one audit may take")
    parser.add_argument("--only-page", action="store_true", help="run nothing: write the page from what there is")
    given = parser.parse_args(words)
    if given.data:
        os.environ["EXPUNGE_DATA"] = str(given.data)
    if not (given.out / "methods").is_dir():
        sys.stderr.write(
            f"Error: There are no runs in {str(given.out)!r}. Make them: python -m experiments.llm_methods --out {given.out}\n"
        )
        return 2
    course = Course(Plan(given.out), tuple(given.seeds))
    if not given.only_page:
        experiment(course, Stages(given.limit))
    write_page(course, given.page or given.out / "removed.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
