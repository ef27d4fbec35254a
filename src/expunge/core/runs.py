"""Run folders: every stage leaves its files and an entry in one manifest, and is never done twice."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.core.errors import ExpungeError, InputError
from expunge.core.files import digest_file, digest_json, empty, write_json
from expunge.core.version import __version__

SCHEMA_VERSION = "1"
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "optuna",
)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python, Expunge and the packages that results depend on (those that are installed)."""
    found = {"python": platform.python_version(), "expunge": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def revision(folder: Path) -> str:
    """The git revision of the folder that the command ran in, ``+changes`` if files differ; empty outside of git."""
    git = shutil.which("git")
    if git is None:
        return ""

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", str(folder), *words], capture_output=True, text=True, check=False, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = ask("rev-parse", "HEAD")
    return head + ("+changes" if head and ask("status", "--porcelain", "--untracked-files=no") else "")


class Run:
    """A run folder and its ``manifest.json``.

    Every stage is recorded with the hash of its inputs, its outputs by content hash, seconds, peak memory and cost. A stage
    whose inputs are unchanged and whose outputs are still what was recorded is skipped.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.skipped: list[str] = []  #: stages that :meth:`stage` found done already

    @classmethod
    def start(
        cls, folder: Path, kind: str, config: Mapping[str, Any], *, resume: bool = False, command: Sequence[str] | None = None
    ) -> Run:
        """Create a run, or with ``resume`` go on with one of the same kind and configuration.

        Raises:
            InputError: the folder exists and ``resume`` was not given, is no run, or holds a run with another configuration.
        """
        path = folder / "manifest.json"
        if path.is_file():
            run = cls.open(folder)
            if not resume:
                raise InputError(
                    f"The run folder {str(folder)!r} exists already ({run.manifest['kind']}, {run.manifest['created']}).",
                    "Go on with it by --resume, or choose another --out.",
                )
            if run.manifest["kind"] != kind or run.manifest["config_digest"] != digest_json(config):
                differing = sorted(
                    k for k in {*config, *run.manifest["config"]} if config.get(k) != run.manifest["config"].get(k)
                )
                raise InputError(
                    f"The run folder {str(folder)!r} was started with other settings: {', '.join(differing) or 'kind'}.",
                    "Resume with the same settings, or choose another --out.",
                )
            return run
        if folder.exists() and not empty(folder):
            raise InputError(f"The folder {str(folder)!r} exists, is not empty and holds no run.", "Choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {
            "schema_version": SCHEMA_VERSION, "kind": kind, "created": now(), "command": list(command or sys.argv),
            "config": dict(config), "config_digest": digest_json(config), "versions": versions(),
            "revision": revision(Path.cwd()), "machine": {"system": platform.system(), "cpus": os.cpu_count() or 0},
            "inputs": {}, "stages": {},
        }  # fmt: skip
        run = cls(folder, manifest)
        run.write()
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open an existing run.

        Raises:
            InputError: there is none, or its manifest cannot be read.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            raise InputError(f"{str(folder)!r} is no run folder: it has no manifest.json.", "Give the folder that --out named.")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"The manifest of {str(folder)!r} cannot be read: {error}.", "Do the run again.") from None
        if not isinstance(manifest, dict):
            raise InputError(f"The manifest of {str(folder)!r} is no JSON object.", "Do the run again.")
        if manifest.get("schema_version") != SCHEMA_VERSION:
            written = manifest.get("schema_version")
            raise InputError(
                f"The run {str(folder)!r} is of format {written!r}; this version reads {SCHEMA_VERSION!r}.",
                "Do the run again, or read it with the version that wrote it.",
            )
        return cls(folder, manifest)

    def write(self) -> None:
        """Write the manifest atomically; of several processes only the first does."""
        if os.environ.get("RANK", "0") != "0":
            return
        write_json(self.folder / "manifest.json", self.manifest)

    def note_inputs(self, **inputs: Mapping[str, Any]) -> None:
        """Record inputs by name with their digests."""
        self.manifest["inputs"] |= {k: dict(v) for k, v in inputs.items()}
        self.write()

    def done(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether stage ``name`` is done for these inputs and its outputs are unchanged."""
        entry = self.manifest["stages"].get(name)
        if not entry or entry["state"] != "done" or entry["inputs_digest"] != digest_json(inputs):
            return False
        return all((self.folder / p).is_file() and digest_file(self.folder / p) == d for p, d in entry["outputs"].items())

    def check_same(self, name: str, inputs: Mapping[str, Any]) -> None:
        """Check that a stage that was begun is gone on with from the same inputs: a checkpoint belongs to its data.

        Raises:
            InputError: they differ; the message names them.
        """
        entry = self.manifest["stages"].get(name)
        if entry is None or entry["inputs_digest"] == digest_json(inputs):
            return
        held = entry["inputs"]
        differing = sorted(k for k in {*inputs, *held} if digest_json(inputs.get(k)) != digest_json(held.get(k)))
        raise InputError(
            f"Since the run {str(self.folder)!r} was started this has changed: {', '.join(differing)}.",
            "Put it back as it was, choose another --out, or remove that folder to begin anew.",
        )

    def stage(
        self, name: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], outputs: Sequence[str]
    ) -> dict[str, Any]:
        """Do a stage unless it is done.

        Args:
            name: of the stage.
            inputs: everything the result depends on, as JSON with content hashes.
            work: does it, and returns a JSON mapping to record (cost, summary).
            outputs: files or folders that it leaves, relative to the run folder.

        Returns:
            What ``work`` returned, now or when it was done.
        """
        if self.done(name, inputs):
            result: dict[str, Any] = self.manifest["stages"][name]["result"]
            self.skipped.append(name)
            return result
        entry: dict[str, Any] = {
            "state": "running",
            "inputs": dict(inputs),
            "inputs_digest": digest_json(inputs),
            "started": now(),
            "outputs": {},
        }
        self.manifest["stages"][name] = entry
        self.write()
        started = time.perf_counter()
        try:
            result = dict(work())
        except BaseException as error:
            entry |= {"state": "failed", "seconds": time.perf_counter() - started, "error": type(error).__name__}
            if isinstance(error, ExpungeError):
                entry["error"] = str(error)
            self.write()
            raise
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        files = [f for o in outputs for f in _files(self.folder / o)]
        entry |= {
            "state": "done", "seconds": time.perf_counter() - started, "peak_bytes": peak, "result": result,
            "outputs": {f.relative_to(self.folder).as_posix(): digest_file(f) for f in files},
        }  # fmt: skip
        self.write()
        return result

    def cost(self) -> dict[str, float]:
        """Seconds over all stages done, and the largest peak memory."""
        stages = [s for s in self.manifest["stages"].values() if s["state"] == "done"]
        return {"seconds": sum(s["seconds"] for s in stages), "peak_bytes": max((s["peak_bytes"] for s in stages), default=0)}


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def cache_folder() -> Path:
    """Where trained models and scores are kept for reuse: ``EXPUNGE_CACHE``, else ``~/.cache/expunge``."""
    return Path(os.environ.get("EXPUNGE_CACHE") or Path.home() / ".cache" / "expunge")
