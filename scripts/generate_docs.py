"""Write the documentation pages that are derived from the code, or check that they are fresh.

Usage: ``python scripts/generate_docs.py [--check]``

Everything comes from the registries, the declared parameters and the docstrings, so the output is the same on every machine.
With ``--check`` nothing is written and the exit status is 1 if a page is stale, missing or left over.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "src")]  # this checkout's code, whatever is installed

from docgen import site  # noqa: E402


def main(words: list[str]) -> int:
    """Generate or check; the exit status."""
    if words not in ([], ["--check"]):
        print(__doc__)
        return 2
    wanted = site.pages(ROOT)
    stale = site.stale(ROOT, wanted)
    if not words:
        site.write(ROOT, wanted)
        print(f"{len(wanted)} pages, {len(stale)} changed")
        return 0
    for path, why in stale:
        print(f"{path}: {why}")
    if stale:
        print("The generated documentation is stale. Write it anew: python scripts/generate_docs.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
