"""Tables of audited models: their verdicts, their numbers with intervals, and the check that carries the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.audit.document import ModelEntry
from expunge.core.results import Judgement, Verdict
from expunge.report.text import DASH
from expunge.report.weakest import weakest

ORDER = (
    Verdict.FORGOTTEN, Verdict.UNDECIDED, Verdict.SUPPRESSED, Verdict.NOT_FORGOTTEN, Verdict.DAMAGED, Verdict.NO_GOLD,
)  # fmt: skip


def ordered(entries: Sequence[ModelEntry]) -> list[ModelEntry]:
    """Best verdict first; of the same verdict the one with more criteria that hold."""

    def key(entry: ModelEntry) -> tuple[int, int, str]:
        assert entry.judgement is not None
        held = sum(f.outcome == "held" for f in entry.judgement.criteria)
        return ORDER.index(entry.judgement.verdict), -held, entry.label

    return sorted(entries, key=key)


def link(judgement: Judgement) -> str:
    """The check that carries the verdict, in words."""
    check = weakest(judgement)
    return DASH if check is None else f"{check.name}: {check.text}".replace("|", "/").replace("\n", " ")


def counted(entries: Sequence[ModelEntry]) -> str:
    """Verdicts with how often each was given, the best first."""
    given = [e.judgement.verdict for e in entries if e.judgement]
    return ", ".join(f"{v.value} {given.count(v)}/{len(given)}" for v in ORDER if v in given) or DASH


def between(entry: ModelEntry, key: str) -> str:
    """A number of a model with its interval."""
    number = entry.numbers.get(key)
    if number is None or number.value is None:
        return DASH
    ends = f" [{number.low:.2f}, {number.high:.2f}]" if number.low is not None and number.high is not None else ""
    return f"{number.value:.2f}{ends}"
