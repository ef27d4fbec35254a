"""``expunge doctor``."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any

import typer
from rich.table import Table

from expunge.cli.output import Output
from expunge.core.files import size
from expunge.core.runs import cache_folder, versions

_HELP = """Say what is installed, which accelerators there are, and where the cache is.

    \b
    Example:
      expunge doctor
    """

_OPTIONAL = {
    "transformers": "llm",
    "peft": "llm",
    "datasets": "llm",
    "rouge_score": "llm",
    "diffusers": "diffusion",
    "matplotlib": "report",
    "detect_secrets": "secrets",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor", help=_HELP)(doctor)


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> int:
    """Print the state of the installation."""
    import psutil
    import torch

    from expunge.audit.metrics.registry import METRICS
    from expunge.methods.registry import METHODS

    output = Output(json)
    missing = []
    for package, extra in _OPTIONAL.items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{package} (pip install 'expunge[{extra}]')")
    folder = cache_folder()
    held = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0
    found: dict[str, Any] = {
        "versions": versions(),
        "missing": missing,
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "cache": {"folder": str(folder), "bytes": held},
        "broken plug-ins": {**METHODS.broken(), **METRICS.broken()},
    }
    output.result(found)
    table = Table(show_header=False, box=None)
    for name, version in found["versions"].items():
        table.add_row(name, version)
    table.add_row("accelerators", ", ".join(found["accelerators"]) or "none: everything runs on the CPU")
    table.add_row("threads", str(found["threads"]))
    table.add_row("memory", size(found["memory"]))
    table.add_row("cache", f"{folder} ({size(held)})")
    table.add_row("missing", ", ".join(missing) or "nothing")
    for name, why in found["broken plug-ins"].items():
        table.add_row("broken plug-in", f"{name}: {why}")
    output.say(table)
    return 0
