"""``expunge plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from expunge.cli.output import Output
from expunge.core.errors import InputError
from expunge.core.settings import parse_overrides

if TYPE_CHECKING:
    from expunge.pipeline.outlook import Outlook

_HELP = """Say how hard a request is, which methods can do it and what each costs, before anything is changed.

    \b
    Looked at, under the target as it is: whether it knows the records at all (loss and extraction strength against unseen
    records), how often the retain set says them too, how alike the forgotten answers and those in their place are to
    the model (CHES), and whether an audit of so few subjects could tell anything.

    \b
    If asked for: whether the paths by which the model gives an answer are like those of answers that were hard to erase
    (--circuits; anchors come from runs that are done, or from two short gradient ascents on copies of the target), and how
    long each method takes here (--time; a few of its own steps on a copy).

    \b
    Examples:
      expunge plan runs/target --forget people.jsonl --retain rest.jsonl --holdout unseen.jsonl
      expunge plan meta-llama/Llama-3.2-1B-Instruct --forget tofu:forget10 --retain tofu:retain90 --holdout tofu:holdout10
      expunge plan MODEL --forget F --retain R --method npo --method simnpo --out plan.json
      expunge plan MODEL --forget F --retain R --method npo schedule=paper parameters=lora
      expunge plan MODEL --forget F --retain R --method npo --method ssd --time
      expunge plan MODEL --forget F --retain R --circuits circuits.share=0.05
      expunge plan MODEL --forget F --retain R --anchors runs/earlier --anchors runs/another
      expunge plan MODEL --forget F --retain R --json

    \b
    It costs one forward pass of the forget records, of their other answers, and of up to 512 unseen records; --circuits and
    --time cost more, and need a second copy of the model. Methods come by kind and name: the order says nothing of their
    quality. Steps, tokens and memory are upper estimates.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan", help=_HELP)(plan)


def plan(
    model: Annotated[str, typer.Argument(help="The target model: hub id, local folder, or a run of `expunge train`.")],
    parts: Annotated[list[str] | None, typer.Argument(help="key=value pairs.", metavar="[PARTS]...")] = None,
    forget: Annotated[str | None, typer.Option(help="What to forget.", metavar="DATA")] = None,
    retain: Annotated[str | None, typer.Option(help="What to keep.", metavar="DATA")] = None,
    holdout: Annotated[str | None, typer.Option(help="Records that the model was never trained on.", metavar="DATA")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; may be repeated [default: all].", metavar="NAME")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write everything as JSON, record by record.", metavar="FILE")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file given by --out.")] = False,
    base: Annotated[str | None, typer.Option(help="The untrained base, for methods that start from it.", metavar="MODEL")] = None,
    circuits: Annotated[
        bool, typer.Option("--circuits", help="Compare circuits with those of records that were hard to erase.")
    ] = False,
    anchors: Annotated[
        list[str] | None,
        typer.Option(
            help="A finished run that began from this target: its records are anchors; may be repeated. Implies --circuits.",
            metavar="RUN",
        ),
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Time a few steps of each method that can run, on a copy.")] = False,
    alternatives: Annotated[
        str | None,
        typer.Option(help="Answers put in place: auto, refusals, given, others, passages, template, reasons.", metavar="KIND"),
    ] = None,
    alternative_template: Annotated[
        str | None, typer.Option(help="Their text; implies the kind template.", metavar="TEXT")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="role=name of your column; may be repeated.", metavar="ROLE=NAME")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of what is drawn.")] = None,
    drop_overlap: Annotated[bool, typer.Option("--drop-overlap", help="Leave shared records out of retain and holdout.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Look at a request."""
    from expunge.cli.commands.unlearn import columns_of
    from expunge.core.entries import is_entry
    from expunge.core.files import check_writable, write_json
    from expunge.pipeline.config import UnlearnConfig
    from expunge.pipeline.outlook import from_config, looks_of

    output = Output(json)
    if forget is None:
        raise InputError("The forget is missing.", "Give --forget DATA; see expunge plan --help.")
    if is_entry(model) and not Path(model).exists():
        raise InputError("A plan is made for language models.", "For rows: expunge unlearn MODEL ... --dry-run says the cost.")
    if out is not None and out.exists() and not force:
        raise InputError(f"The file {str(out)!r} exists.", "Add --force to replace it.")
    if out is not None:
        check_writable(out.parent)
    overrides = parse_overrides(parts or [])
    engine = {**overrides.pop("engine", {}), **({"seed": seed} if seed is not None else {})}
    text = {**overrides.pop("text", {}), **({"columns": columns_of(column)} if column else {})}
    looks = looks_of(circuits=circuits, anchors=anchors or (), timed=time, settings=overrides.pop("circuits", None))
    if alternative_template is not None and alternatives is None:
        alternatives = "template"
    given: dict[str, Any] = {
        "model": model, "forget": forget, "retain": retain, "holdout": holdout, "base": base, "alternatives": alternatives,
        "alternative_template": alternative_template, "drop_overlap": drop_overlap or None, "parts": overrides or None,
        "engine": engine or None, "text": text or None, "allow_overlap": True, "allow_large_forget": True,
    }  # fmt: skip
    config = UnlearnConfig(**{k: v for k, v in given.items() if v is not None})
    with output.progress("planning") as progress:
        found = from_config(config, method or (), looks=looks, progress=progress)
    value = {"model": model, "forget": forget, "retain": retain, "holdout": holdout, **found.json()}
    if out is not None:
        write_json(out, value)
    output.result(value)
    if not output.machine:
        _print(found, output)
    if out is not None:
        output.say(f"Plan: {out}")
    return 0


def _print(found: Outlook, output: Output) -> None:
    from expunge.pipeline.outlook import cost_text

    output.say(_totals(found))
    output.say(_records(found))
    runs = [m for m in found.methods if m.runs]
    timed = any(m.time is not None or m.untimed for m in runs)
    took = ["time here"] if timed else []
    table = Table("method", "kind", "steps", "tokens", "memory", *took, "mind", title="Methods that can run")
    notes = sorted({c for m in runs for c in m.cautions})
    for m in runs:
        cost = cost_text(m.cost) if m.cost is not None else ("-", "-", "-")
        took = [m.time.text() if m.time is not None else "not timed"] if timed else []
        table.add_row(m.name, m.kind, *cost, *took, " ".join(f"({notes.index(c) + 1})" for c in m.cautions))
    output.say(table)
    for reason in sorted({m.untimed for m in runs if m.untimed}):
        output.say(f"Not timed: {', '.join(m.name for m in runs if m.untimed == reason)}. {reason}")
    for number, note in enumerate(notes, 1):
        output.say(f"({number}) {note}")
    rest = Table("method", "why it cannot run", title="Methods that cannot run")
    reasons: dict[str, list[str]] = {}
    for m in found.methods:
        if not m.runs:
            reasons.setdefault(m.missing.replace(f"The method {m.name!r}", "It"), []).append(m.name)
    for reason, names in reasons.items():
        rest.add_row(", ".join(names), Text(reason))
    if reasons:
        output.say(rest)
    for caution in found.cautions:
        output.say(f"Mind: {caution}")


_UNSEEN = {"holdout": "held-out records", "swapped": "retain records with swapped answers", "none": "nothing unseen"}


def _totals(found: Outlook) -> Table:
    held = found.difficulty
    table = Table("of the request", "found", title="How hard it is")
    kind, subjects = _UNSEEN[held.source], len({r.subject for r in held.records})
    table.add_row("records to forget", f"{len(held.records):,} of {subjects:,} subjects, {held.tokens[0]:,} tokens")
    table.add_row("records to keep", f"{held.retain:,} of {held.retain_subjects:,} subjects, {held.tokens[1]:,} tokens")
    unseen = f"; {held.loss_unseen:.3f} of {held.unseen} {kind}" if held.unseen else ""
    table.add_row("loss (nats a token)", f"{held.loss:.3f}{unseen}")
    if held.separation is not None:
        low, high = held.separation.low, held.separation.high
        band = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        table.add_row("told apart by the loss (AUC)", f"{held.separation.value:.3f}{band}")
    table.add_row("extraction strength", f"{held.strength:.3f}")
    table.add_row("nothing to forget in", f"{len(held.unknown)} records")
    if held.retain:
        table.add_row(
            "said in the retain set too", f"{len(held.repeated)} answers; {len(held.told)} of them with their subject or prompt"
        )
    scored = [r.displacement.normalised for r in held.records if r.displacement is not None]
    if scored:
        table.add_row(
            f"normalised CHES ({held.alternatives})",
            f"{min(scored):.2f} to {max(scored):.2f}; {len(held.alike)} of {len(scored)} not negative",
        )
    if found.circuits is not None:
        check = found.circuits.foretold
        told = f"{check.value:.2f} (Spearman, {check.records} records; p {check.p:.3f})"
        table.add_row("circuits foretell what is hard by", told)
        table.add_row("the same, given the loss", f"{check.partial:.2f} (p {check.p_partial:.3f})")
    if held.power is not None and held.power.margin > 0:
        enough = "enough subjects" if held.power.enough else "too few subjects"
        table.add_row("audit", f"{enough}: +-{held.power.half_width:.2f} nats expected, +-{held.power.margin:.2f} accepted")
    return table


def _records(found: Outlook) -> Table:
    """The ten records that stand out most: unknown ones, those the retain set tells, those hard by circuits, the highest CHES."""
    records = found.difficulty.records
    hardness = {r.id: r.cud for r in found.circuits.records} if found.circuits is not None else {}

    def weight(i: int) -> tuple[bool, int, float, float]:
        r = records[i]
        return (
            r.known is False,
            r.repeats.told if r.repeats else 0,
            hardness.get(r.id, 0.0),
            r.displacement.normalised if r.displacement else float("-inf"),
        )

    chosen = sorted(range(len(records)), key=weight, reverse=True)[:10]
    title = "Records" if len(records) <= 10 else f"Records that stand out (10 of {len(records)}; all by --out)"
    more = ["circuits"] if found.circuits is not None else []
    table = Table("record", "loss", "extraction", "known", "in retain", "told there", *more, "CHES", title=title)
    for r in (records[i] for i in chosen):
        known = "?" if r.known is None else "yes" if r.known else "no"
        again = (str(r.repeats.mostly), str(r.repeats.told)) if r.repeats else ("-", "-")
        pair = f"{r.displacement.normalised:.2f}" if r.displacement else "-"
        like = [f"{hardness[r.id]:.2f}" if r.id in hardness else "-"] if more else []
        table.add_row(Text(r.id), f"{r.loss:.3f}", f"{r.strength:.2f}", known, *again, *like, pair)
    return table
