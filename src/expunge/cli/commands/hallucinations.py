"""``expunge hallucinations``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.output import Output
from expunge.core.settings import parse_overrides

_HELP = """Measure how many of the package names that a model writes are made up.

    Completions of the prompts are drawn, package names in them are found, and a list (or a function of yours) says which exist;
    nothing is asked over the network. With the model that it came from, the same is said of that, and by how much the two
    differ on names and on all other tokens.

    \b
    Examples:
      expunge hallucinations MODEL --prompts prompts.jsonl known=names.txt
      expunge hallucinations runs/au --reference MODEL --prompts unseen.jsonl known=names.txt samples=10 tokens=256
      expunge hallucinations MODEL --prompts prompts.jsonl checker=registry.py:exists 'ecosystems=[python, javascript]'

    \b
    SETTINGS are those of preparation=discovery: known, checker, ecosystems, pattern, samples, temperature, tokens; and text.KEY.
    """


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("hallucinations", help=_HELP)(hallucinations)


def hallucinations(
    model: Annotated[str, typer.Argument(help="The model: hub id, local folder, or a run.")],
    prompts: Annotated[str, typer.Option(help="Prompts that it was not unlearned with.", metavar="DATA")],
    parts: Annotated[list[str] | None, typer.Argument(help="key=value settings.", metavar="[SETTINGS]...")] = None,
    reference: Annotated[str | None, typer.Option(help="The model that it came from.", metavar="MODEL")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the completions.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Draw completions and count."""
    from expunge.methods.preparations.discovery import Discovered
    from expunge.pipeline.config import TextConfig
    from expunge.pipeline.hallucinations import measure
    from expunge.pipeline.models import load_set, open_adapter

    output, given = Output(json), parse_overrides(parts or [])
    text = TextConfig(**given.pop("text", {}))
    how = Discovered(**given)
    how.check()
    records = load_set(prompts, "prompts", text.columns)
    held = open_adapter(model, text)
    other = open_adapter(reference, text) if reference is not None else None
    with output.progress("completions") as progress:
        found = measure(held, records, how, reference=other, run=Path(model), seed=seed, progress=progress)
    output.result({"prompts": len(records), "completions": len(records) * how.samples, **found.json()})
    for line in found.lines():
        output.say(line)
    return 0
