"""What documents say about the code is true: pages are fresh, commands and options exist, links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import expunge
from expunge.adapters.endpoint import Endpoint
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.supervised import ClassifierAdapter
from expunge.audit.settings import AuditSettings
from expunge.core.entries import is_entry
from expunge.core.settings import parse_overrides
from expunge.data.spans import Spans
from expunge.data.tables import Reading
from expunge.engine.members import Training
from expunge.methods.catalogue import serves
from expunge.methods.edits.registry import EDITS
from expunge.methods.recipe import build
from expunge.pipeline.guarding import is_guard, shield

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from docgen import site, text  # noqa: E402
from docgen.reference import command_tree  # noqa: E402

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOT_OURS = {"--num_processes", "--check", "--strict"}  # options of accelerate, of our scripts and of mkdocs
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Fenced blocks of a language in all documents: (document, content)."""
    for path in DOCUMENTS:
        for found in FENCE.finditer(path.read_text(encoding="utf-8")):
            if found[1] == language:
                yield name(path), found[2]


def commands() -> list[tuple[str, list[str]]]:
    """Every line of a shell block that runs expunge: (document, words after ``expunge``)."""
    found = []
    for document, block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            at = next((i for i, w in enumerate(words) if w.rsplit("/", 1)[-1] == "expunge"), None)
            if at is not None:
                found.append((document, words[at + 1 :]))
    return found


# --- generated pages


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate_docs.py"), "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_notices_stale_missing_and_left_over_pages(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    wanted = site.pages(tmp_path)
    assert site.stale(tmp_path, wanted) == []
    page = tmp_path / "docs" / "methods" / "npo.md"
    page.write_text(page.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    (tmp_path / "docs" / "metrics" / "probability.md").unlink()
    (tmp_path / "docs" / "methods" / "gone.md").write_text(f"# Gone\n\n{text.MARK}\n", encoding="utf-8")
    found = dict(site.stale(tmp_path, wanted))
    assert set(found) == {"docs/methods/npo.md", "docs/metrics/probability.md", "docs/methods/gone.md"}
    site.write(tmp_path, wanted)
    assert site.stale(tmp_path, wanted) == []
    assert not (tmp_path / "docs" / "methods" / "gone.md").exists()


def test_docstrings_become_markdown() -> None:
    doc = """Do :func:`~a.b.go` with ``x``.

Args:
    x: the first,
        and more.
    y: the second.

Raises:
    InputError: bad."""
    arguments = "- `x`: the first, and more.\n- `y`: the second."
    shown = ["Do `go` with `x`.", "**Parameters**", arguments, "**Raises**", "- `InputError`: bad."]
    assert text.markdown(doc) == "\n\n".join(shown)
    assert "| a | b |" in text.markdown("==== ====\na    b\n==== ====\n1    2\n==== ====")
    assert text.table(["a"], [["x | y"]]).endswith("| x \\| y |")


# --- commands and code in documents


def test_there_are_commands_to_check() -> None:
    assert {words[0] for _, words in commands() if words} >= {"unlearn", "audit", "report"}


@pytest.mark.parametrize(("document", "words"), commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_commands_in_documents_exist(document: str, words: list[str]) -> None:
    tree = command_tree()
    if words[0].startswith("-"):
        assert words[0] in {o for p in tree.params for o in p.opts}
        return
    assert words[0] in tree.commands, f"{document}: there is no command {words[0]!r}"
    options = {o: p for p in tree.commands[words[0]].params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    given: dict[str, str] = {}
    values: set[str] = set()
    rest = iter(words[1:])
    for word in rest:
        if word.startswith("--"):
            option, eq, value = word.partition("=")
            assert option in options, f"{document}: {words[0]} has no option {option}"
            given[option] = value if eq or options[option].is_flag else next(rest)
            values.add(given[option])
    parts = [w for w in words[1:] if re.match(r"[a-z_.]+=", w) and w not in values]
    if words[0] == "unlearn" and given.get("--method", "npo") != "NAME":
        overrides = {k: v for k, v in parse_overrides(parts).items() if k not in ("engine", "text", "spans")}
        Spans(**parse_overrides(parts).get("spans", {}))
        name = given.get("--method", "npo")
        offers = LanguageAdapter.offers
        if is_entry(words[1]) or "--data" in given:  # a model of rows
            offers = ClassifierAdapter.offers
            Reading(**overrides.pop("reading", {}))
            if "training" in overrides:
                Training(**overrides.pop("training"))
        if is_guard(name):
            shield(name, overrides)
            return
        assert name == "custom" or serves(name, offers)[0], f"{document}: {name} does not run on such a model"
        EDITS.get(name)(**overrides) if name in EDITS.names() else build(name, overrides)
    if words[0] == "audit":
        overrides = parse_overrides(parts)
        if "--served" in given:
            Endpoint(url=given["--served"], model="NAME", **overrides.pop("served", {}))
        AuditSettings(**overrides)


def test_options_in_prose_exist() -> None:
    tree = command_tree()
    known = {o for c in [tree, *tree.commands.values()] for p in c.params for o in (*p.opts, *p.secondary_opts)} | NOT_OURS
    for path in DOCUMENTS:
        prose = FENCE.sub("", path.read_text(encoding="utf-8"))
        for code in re.findall(r"`([^`\n]+)`", prose):
            for option in re.findall(r"(?:^|\s)(--[a-z][a-z_-]*)", code):
                assert option in known or "pip" in code or "make" in code, f"{name(path)}: `{code}`"


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in [*DOCUMENTS, ROOT / ".ci" / "run"]:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert target in targets, f"{name(path)}: make {target}"


@pytest.mark.parametrize(("document", "block"), list(blocks("python")), ids=lambda v: v if len(v) < 60 else "code")
def test_python_in_documents_fits_the_package(document: str, block: str) -> None:
    """Code parses (signatures aside), what it imports exists, and calls of ``expunge.NAME`` use parameters that are there."""
    if "--8<--" in block or "..." in block or " -> " in block.split("\n")[-2]:
        return
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "expunge":
            module = __import__(node.module or "", fromlist=[a.name for a in node.names])
            assert all(hasattr(module, a.name) for a in node.names), f"{document}: {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "expunge":
            assert hasattr(expunge, node.attr), f"{document}: expunge.{node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("expunge."):
            function: Any = getattr(expunge, ast.unparse(node.func).removeprefix("expunge."))
            keywords: dict[str, Any] = {k.arg: None for k in node.keywords if k.arg}
            inspect.signature(function).bind_partial(*[None for _ in node.args], **keywords)


def test_the_example_in_contributing_is_the_one_that_is_tested() -> None:
    example = (ROOT / "tests" / "plugin" / "src" / "expunge_example" / "maximum_entropy.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


# --- links


def anchors(path: Path) -> set[str]:
    held = FENCE.sub("", path.read_text(encoding="utf-8"))
    found = set(re.findall(r"\{ #([\w-]+) \}", held))
    for title in re.findall(r"^#+ (.+)$", held, re.MULTILINE):
        plain = re.sub(r"\{ #.*\}", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).replace("`", "").strip().lower()
        found.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    held = re.sub(r"`[^`\n]*`", "code", FENCE.sub("", path.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", held):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{target} does not exist"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{target}: there is no such heading"


# --- one version, one set of dependencies


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "expunge.core.version.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == expunge.__version__
    assert citation["license"] == project["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    released = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == "Unreleased"
    if len(released) > 1:
        assert released[1] == expunge.__version__


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {re.sub(r"[-_.]+", "-", k).lower(): v for k, v in pins.items()}
    assert list(pins) == sorted(pins, key=str.lower)
    assert not any("+" in v for v in pins.values()), "local versions are not on an index"
    for word in [*project["dependencies"], *(w for e in project["optional-dependencies"].values() for w in e)]:
        needed = Requirement(word)
        key = re.sub(r"[-_.]+", "-", needed.name).lower()
        if key != "expunge":
            assert key in pinned, f"{needed.name} is not pinned in constraints.txt"
            assert needed.specifier.contains(pinned[key]), f"{word}: constraints.txt has {pinned[key]}"


def test_every_public_name_has_a_docstring() -> None:
    ruff = Path(sys.executable).parent / "ruff"
    if not ruff.exists():
        pytest.skip("ruff is not installed beside this Python")
    done = subprocess.run(
        [str(ruff), "check", "--select", "D1", "--ignore", "D105,D107", "src"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
