"""Which of a verdict's checks carries it, and whether the controls came out as they must."""

from __future__ import annotations

import math

from expunge.audit.document import AuditDocument, ModelEntry
from expunge.core.results import Check, Judgement, Verdict

_FAILED = ("knows more", "knows less", "hides", "worse")


def used(check: Check) -> float:
    """The share of the margin that the interval reaches: 1 touches the margin, above 1 it crosses; 0 where unknown, and infinite
    where nothing is accepted.

    An end past the margin in a check that came out equivalent lies on a side that does not count against the model (a gain
    in utility, or the far side of knowing, which has a wider margin), so it is left out.
    """
    ends = [abs(v) for v in (check.difference, check.low, check.high) if v is not None]
    if check.margin == 0:
        return math.inf if check.outcome in _FAILED else 0.0
    if not ends or not check.margin:
        return 0.0
    shares = [end / check.margin for end in ends]
    return max((s for s in shares if s <= 1 or check.outcome != "equivalent"), default=0.0)


def weakest(judgement: Judgement) -> Check | None:
    """The check that the reason names; if it quotes none, the one nearest to, or furthest past, its limit.

    Then failed checks come before undecided ones, these before equivalent ones, and those not run last; among checks of the
    same kind the one that uses the largest share of its margin (:func:`used`). None if there are no checks.
    """
    quoted = [c for c in judgement.checks if c.text and c.text in judgement.reason]
    if quoted:
        return min(quoted, key=lambda c: judgement.reason.index(c.text))

    def rank(check: Check) -> tuple[int, float]:
        silent = check.outcome in ("not run", "shown")
        order = 3 if check.outcome in _FAILED else 2 if check.outcome == "undecided" else 0 if silent else 1
        return order, used(check)

    return max(judgement.checks, key=rank, default=None)


def only_doubts(document: AuditDocument) -> bool:
    """Whether every control that did not come out is undecided: too little evidence, and nothing that contradicts the audit."""
    below = below_weights(document)
    wrong = [m.judgement.verdict for m in document.models if m.judgement is not None and _fault(m, below)]
    return all(verdict is Verdict.UNDECIDED for verdict in wrong)


def control_faults(document: AuditDocument) -> list[str]:
    """One sentence per control whose verdict is not what it must be.

    A target model (trained on the forget set) must be judged not forgotten, a retrained one forgotten; where either fails,
    the verdicts beside it cannot be trusted. With less access than the weights nothing is called forgotten: a retrained model is
    then undecided at best. An audit without a gold standard has no controls.
    """
    below = below_weights(document)
    return [fault for model in document.models if (fault := _fault(model, below))]


def below_weights(document: AuditDocument) -> bool:
    """Whether the audit had less of the models than their weights."""
    return document.protocol.get("access", "weights") not in (None, "weights")


def _fault(model: ModelEntry, below: bool) -> str:
    if model.judgement is None or model.judgement.verdict is Verdict.NO_GOLD:
        return ""
    verdict = model.judgement.verdict
    if model.role == "target" and verdict is not Verdict.NOT_FORGOTTEN:
        return f"The target model {model.label!r}, which was trained on the forget set, is judged {verdict.value!r}."
    fine = (Verdict.FORGOTTEN, Verdict.UNDECIDED) if below else (Verdict.FORGOTTEN,)
    if model.role == "retrained" and verdict not in fine:
        return f"The retrained model {model.label!r}, which never saw the forget set, is judged {verdict.value!r}."
    return ""
