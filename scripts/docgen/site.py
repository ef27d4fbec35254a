"""All generated pages together, the navigation block of mkdocs.yml, and the comparison with what is on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from docgen import attacks, benchmarks, methods, metrics, parts, reference
from docgen.text import MARK

_LABELS = {"cli": "Command line", "settings": "Settings", "python": "Python", "verdict": "How the verdict is reached"}
_BEGIN, _END = "  # begin generated navigation", "  # end generated navigation"


def pages(root: Path) -> dict[str, str]:
    """Every generated file by its path relative to ``root``."""
    out: dict[str, str] = {}
    for group in (methods.pages(), metrics.pages(), attacks.pages(), benchmarks.pages(), parts.pages(), reference.pages()):
        out |= {f"docs/{name}": text for name, text in group.items()}
    out["mkdocs.yml"] = _with_navigation(root, out)
    return out


def stale(root: Path, wanted: Mapping[str, str]) -> list[tuple[str, str]]:
    """Paths that differ from what is wanted, with the reason."""
    found = []
    for path, text in sorted(wanted.items()):
        on_disk = root / path
        if not on_disk.is_file():
            found.append((path, "is missing"))
        elif on_disk.read_text(encoding="utf-8") != text:
            found.append((path, "is stale"))
    return found + [(path, "is left over: nothing generates it any more") for path in _left_over(root, wanted)]


def write(root: Path, wanted: Mapping[str, str]) -> None:
    """Write what differs, remove what is left over."""
    for path in _left_over(root, wanted):
        (root / path).unlink()
    for path, text in wanted.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def _left_over(root: Path, wanted: Mapping[str, str]) -> list[str]:
    made = [p for p in sorted((root / "docs").rglob("*.md")) if MARK in p.read_text(encoding="utf-8")]
    return [p for p in (m.relative_to(root).as_posix() for m in made) if p not in wanted]


def _with_navigation(root: Path, made: Mapping[str, str]) -> str:
    held = (root / "mkdocs.yml").read_text(encoding="utf-8")
    before, begin, rest = held.partition(_BEGIN + "\n")
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"mkdocs.yml has lost its marks {_BEGIN.strip()!r} and {_END.strip()!r}.")
    return before + begin + "\n".join(_navigation(root, made)) + "\n" + end + after


def _navigation(root: Path, made: Mapping[str, str]) -> Iterator[str]:
    for title, folder, more in (
        ("Methods", "methods", (("Where each one runs", "matrix.md"), ("Papers", "papers.md"))),
        ("Metrics", "metrics", (("Attacks", "attacks.md"),)),
        ("Benchmarks", "benchmarks", ()),
        ("Parts of a method", "parts", ()),
        ("Reference", "reference", ()),
    ):
        yield f"  - {title}:"
        entries = sorted(p for p in made if p.startswith(f"docs/{folder}/"))
        entries.sort(key=lambda p: not p.endswith("/index.md"))
        for path in entries:
            if path.endswith("/index.md"):
                yield f"      - Overview: {path.removeprefix('docs/')}"
                for name, extra in more:
                    yield f"      - {name}: {extra}"
            else:
                yield f"      - {_LABELS.get(Path(path).stem, Path(path).stem)}: {path.removeprefix('docs/')}"
    results = sorted(p.relative_to(root / "docs").as_posix() for p in (root / "docs" / "results").glob("*.md"))
    if results:
        yield "  - Results:"
        yield from (f"      - {path}" for path in results)
