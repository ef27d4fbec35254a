"""The page of :mod:`experiments.meta_evaluation`: ``meta_page.md`` filled with what was measured."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.meta_evaluation import LOST
from expunge.audit.trusted import fails
from expunge.core.files import write_text
from expunge.report.text import DASH

PACKAGES = ("python", "expunge", "torch", "transformers")


def write_page(found: Mapping[str, Any], path: Path) -> None:
    """Write the page."""
    template = string.Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    write_text(path, template.substitute(gaps(found)))


def gaps(found: Mapping[str, Any]) -> dict[str, str]:
    """What the template leaves open."""
    plan, rows = found["plan"], found["metrics"]
    failed = [key for key, row in rows.items() if row["toward"] and fails(row, found["faithful"])]
    judged = [key for key, row in rows.items() if row["toward"]]
    world = dict(part.split("=") for part in plan["world"].split("&"))
    out = {k: str(plan[k]) for k in ("each", "model", "bits", "steps")}
    return out | {
        "persons": world["forget"], "rates": " and ".join(f"{r:g}" for r in plan["rates"]),
        "epochs": " and ".join(map(str, plan["epochs"])), "references": str(len(plan["references"])),
        "methods": ", ".join(f"`{m}`" for m in found["unlearned"]), "lost": f"{LOST:.0%}",
        "left_out": f" (these: {', '.join(found['left_out'])})" if found["left_out"] else " (none did)",
        "faithful": f"{found['faithful']:g}", "table": table(rows, found["faithful"]), "passing": passing(judged, failed),
        "made": found["made"],
        "versions": ", ".join(f"{p} {v}" for p, v in found["versions"].items() if p in PACKAGES),
    }  # fmt: skip


def passing(judged: list[str], failed: list[str]) -> str:
    """One sentence on which metrics do not pass."""
    if not failed:
        return f"All {len(judged)} metrics pass."
    return f"Of {len(judged)} metrics {len(failed)} do not pass: {', '.join(f'`{k}`' for k in failed)}."


def table(rows: Mapping[str, Mapping[str, Any]], faithful: float) -> str:
    """Most faithful first, controls last."""
    head = "| metric | knowing more makes it | faithfulness | passes | relearning | rounding | robustness | unlearned models |"
    lines = [head, "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |"]
    for key, row in sorted(rows.items(), key=lambda pair: (not pair[1]["toward"], -pair[1]["auc"], pair[0])):
        way = {1: "larger", -1: "smaller", 0: "(control)"}[row["toward"]]
        auc = f"{row['auc']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        passes = ("no" if fails(row, faithful) else "yes") if row["toward"] else DASH
        rest = " | ".join(f"{row[k]:.2f}" if k in row else DASH for k in ("relearning", "rounding", "robustness"))
        lines.append(f"| `{key}` | {way} | {auc} | {passes} | {rest} | {row.get('models', DASH)} |")
    return "\n".join(lines)
