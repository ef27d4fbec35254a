"""Checks of the files themselves that no linter makes: size, line endings, conflict marks, parsable data, short modules.

Usage: ``python scripts/check_files.py [FILE...]``; without files, all that git tracks. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml

MAX_BYTES = 600_000  #: larger files belong into a release or a data set, not into the history
MAX_LINES = 500  #: of a Python module
MAX_RESULT_BYTES = 2_000_000  #: figures and tables under docs/results
CONFLICT = ("<<<<<<< ", ">>>>>>> ", "||||||| ")


class _Yaml(yaml.SafeLoader):
    """Accepts the tags that mkdocs.yml may carry."""


_Yaml.add_multi_constructor("", lambda loader, suffix, node: None)


def problems(path: Path) -> Iterator[str]:
    """What is wrong with a file, one sentence each."""
    raw = path.read_bytes()
    limit = MAX_RESULT_BYTES if path.as_posix().startswith("docs/results/") else MAX_BYTES
    if len(raw) > limit:
        yield f"{len(raw):,} bytes; the limit is {limit:,}"
    if b"\0" in raw[:8192]:
        return
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        yield "is neither binary nor UTF-8"
        return
    yield from _text(path, text)
    yield from _parse(path, text)


def _text(path: Path, text: str) -> Iterator[str]:
    lines = text.split("\n")
    if "\r" in text:
        yield "has carriage returns; lines end in a single newline"
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        yield "must end in exactly one newline"
    for number, line in enumerate(lines, 1):
        if line.startswith(CONFLICT):
            yield f"line {number}: conflict mark"
        if line != line.rstrip() and path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".cff", ".sh"):
            yield f"line {number}: trailing white space"
    if path.suffix == ".py" and len(lines) - 1 > MAX_LINES:
        yield f"{len(lines) - 1} lines; a module has at most {MAX_LINES}: split it"


def _parse(path: Path, text: str) -> Iterator[str]:
    try:
        if path.suffix == ".json":
            json.loads(text)
        elif path.suffix in (".yaml", ".yml", ".cff"):
            list(yaml.load_all(text, _Yaml))
        elif path.suffix == ".toml":
            tomllib.loads(text)
    except ValueError as error:  # JSON and TOML errors are ValueErrors
        yield f"cannot be parsed: {error}"
    except yaml.YAMLError as error:
        yield f"cannot be parsed: {str(error).splitlines()[0]}"


def tracked() -> list[str]:
    """The files that git tracks, or would if they were added."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")


def main(words: list[str]) -> int:
    """Print what is wrong; the exit status."""
    found = 0
    for name in words or tracked():
        path = Path(name)
        if not name or not path.is_file() or path.is_symlink() or path.name == "LICENSE":
            continue
        for problem in problems(path):
            print(f"{name}: {problem}")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
