"""The report: one self-contained, offline HTML file.

Nothing is loaded from elsewhere, and a content policy in the page forbids it: prompts and answers are untrusted text. They
are escaped by the template engine; the one script (sorting of tables, printing) is admitted by its hash, and without it
everything is still there to read.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.audit.document import AuditDocument
from expunge.core.errors import InputError, MissingExtra
from expunge.core.files import write_text
from expunge.core.version import __version__
from expunge.report import glossary, text, view
from expunge.report.compare import Comparison, compare
from expunge.report.drawings import Drawings, comparison_plot, draw
from expunge.report.strips import margin_strip
from expunge.report.weakest import control_faults, only_doubts

if TYPE_CHECKING:
    import jinja2

OPEN_SAMPLES = 3  #: prompts of each set that are shown unfolded


@dataclass(frozen=True)
class Section:
    """One document with everything its part of the page needs."""

    id: str
    document: AuditDocument
    drawings: Drawings
    comparison: Comparison | None


def html(documents: Sequence[AuditDocument], *, title: str | None = None) -> str:
    """The report on ``documents`` as the text of one HTML file.

    Args:
        documents: one audit, or several: these are compared where they can be (see :mod:`expunge.report.compare`), and the
            page says why where they cannot.
        title: headline; None takes the document's own, or "Comparison of N audits".

    Returns:
        The page; the same documents give the same text.

    Raises:
        InputError: there are no documents.
        MissingExtra: matplotlib or Jinja is not installed.
    """
    if not documents:
        raise InputError("There is no audit to report on.", "Give at least one audited run.")
    sections = [Section(f"d{i}", d, draw(d, f"d{i}"), _within(d)) for i, d in enumerate(documents, 1)]
    comparison, refusal = _between(documents)
    script = asset("page.js")
    return (
        environment()
        .get_template("page.html")
        .render(
            title=title or (documents[0].title if len(documents) == 1 else f"Comparison of {len(documents)} audits"),
            sections=sections,
            several=len(documents) > 1,
            comparison=comparison,
            comparison_plot=comparison_plot(comparison, documents[0], "compare") if comparison else None,
            refusal=refusal,
            style=asset("page.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
        )
        + "\n"
    )


def write(documents: Sequence[AuditDocument], path: Path, *, title: str | None = None) -> None:
    """Write the report on ``documents`` to ``path`` in one step; arguments and errors as for :func:`html`."""
    write_text(path, html(documents, title=title))


def _within(document: AuditDocument) -> Comparison | None:
    """The trade-off table within one document; None where a single method, or no usable number, leaves nothing to order."""
    if sum(m.role == "unlearned" for m in document.models) < 2:
        return None
    try:
        return compare([document])
    except InputError:  # no forget or no utility number: the table of all numbers says so
        return None


def _between(documents: Sequence[AuditDocument]) -> tuple[Comparison | None, str]:
    """The comparison of several documents, or the sentence that says why there is none."""
    if len(documents) < 2:
        return None, ""
    try:
        return compare(documents), ""
    except InputError as error:
        return None, error.message


def asset(name: str) -> str:
    """The text of a file beside the templates."""
    return (files("expunge.report") / "templates" / name).read_text(encoding="utf-8")


def _cleaned(value: Any) -> Any:
    return text.clean(value) if type(value) is str else value  # markup (a subclass) comes from our own drawings


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The template engine, which escapes all that it is not told to trust.

    Raises:
        MissingExtra: Jinja is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("The HTML report", "report") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("expunge.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_cleaned,
    )
    environment.filters |= {
        "signed": text.signed,
        "scalar": text.scalar,
        "duration": text.duration,
        "moment": text.moment,
        "yaml": text.yaml_text,
        "strip": margin_strip,
    }
    environment.globals |= {
        "view": view,
        "glossary": glossary,
        "plural": text.plural,
        "amount": text.amount,
        "check_text": view.check_text,
        "control_faults": control_faults,
        "only_doubts": only_doubts,
        "OPEN_SAMPLES": OPEN_SAMPLES,
    }
    return environment
