"""The tools around the code do what they are for: file checks, make targets, continuous check, hooks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # make may be running us
CHECK = [sys.executable, str(ROOT / "scripts" / "check_files.py")]


def check(folder: Path, *names: str) -> tuple[int, str]:
    done = subprocess.run([*CHECK, *names], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.py", "x = 1  \n", "line 1: trailing white space"),
        ("a.py", "x = 1", "exactly one newline"),
        ("a.py", "x = 1\n" * 501, "501 lines"),
        ("a.md", "<<<<<<< here\n", "conflict mark"),
        ("a.txt", "one\r\n", "carriage returns"),
        ("a.json", "{,}\n", "cannot be parsed"),
        ("a.yaml", "a: [\n", "cannot be parsed"),
        ("a.toml", "a = \n", "cannot be parsed"),
        ("a.txt", "x" * 700_000 + "\n", "the limit is 600,000"),
    ],
)
def test_each_fault_of_a_file_is_found(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    status, said = check(tmp_path, name)
    assert status == 1
    assert f"{name}: " in said
    assert complaint in said


def test_good_files_pass(tmp_path: Path) -> None:
    good = {
        "a.py": "x = 1\n" * 500,
        "a.json": "{}\n",
        "a.yaml": "a: 1\n",
        "mkdocs.yml": "a: !!python/name:b.c\n",
        "b.bin": "\0\r",
    }
    for name, content in good.items():
        (tmp_path / name).write_bytes(content.encode())
    assert check(tmp_path, *good) == (0, "")


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no git checkout")
def test_the_files_of_the_project_pass() -> None:
    assert check(ROOT) == (0, "")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_torch_first_and_by_its_own_variable(tmp_path: Path) -> None:
    words = ["make", "-n", "demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", "TORCH=torch==9.9 --index-url X"]
    said = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=60).stdout
    steps = ["-m venv", "install -c", "torch==9.9 --index-url X", "-e '.[dev]'", "expunge demo"]
    places = [said.index(step) for step in steps]
    assert places == sorted(places)
    assert "grep -v '^torch=='" in said, "the pin of torch must not stand against the choice"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("python", "complaint"),
    [("no-such-python", "was not found"), ("old", "needs Python 3.11 or newer"), ("bare", "venv package")],
)
def test_make_says_what_is_wrong_with_python(tmp_path: Path, python: str, complaint: str) -> None:
    fakes = {"old": 'case "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac', "bare": 'case "$2" in *ensurepip*) exit 1;; esac'}
    if python in fakes:
        (tmp_path / python).write_text(f"#!/bin/sh\n{fakes[python]}\n", encoding="utf-8")
        (tmp_path / python).chmod(0o755)
        python = str(tmp_path / python)
    words = ["make", "env", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_continuous_check_runs_both_targets_and_is_honest() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    assert "set -euo pipefail" in text
    assert re.search(r"^make check$", text, re.MULTILINE)
    assert re.search(r"^make test ", text, re.MULTILINE)
    assert text.rstrip().endswith('exit "$status"')


def test_hooks_are_local_and_their_commands_exist() -> None:
    held = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [h for repo in held["repos"] for h in repo["hooks"]]
    assert {repo["repo"] for repo in held["repos"]} == {"local"}
    assert {"files", "ruff", "ruff-format", "mypy", "import-linter", "docs"} == {h["id"] for h in hooks}
    for hook in hooks:
        words = hook["entry"].split()
        assert hook["language"] == "system"
        assert words[0].startswith(".venv/bin/")
        assert all((ROOT / w).exists() for w in words if w.startswith("scripts/"))
