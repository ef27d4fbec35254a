"""What is written of a request: which guards looked, what they decided, and nothing that was said.

Never part of a record: prompts, answers (neither as sent nor before a guard has changed them), terms, tokens, embeddings, states,
probabilities, texts that a guard or a user wrote (labels, reasons), messages of errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from expunge.core.errors import InputError
from expunge.core.version import __version__

if TYPE_CHECKING:
    from expunge.guards.decoding import Answer
    from expunge.guards.policy import Plan, Policy, Row

_DIGEST = re.compile(r"[0-9a-f]{16,128}")
_COUNT = re.compile(r"[a-z][a-z_]{0,39}")
_OPAQUE = re.compile(r"[0-9a-f]{16,64}")
_KIND = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")

_DIGITS = 3  #: of scores: more could tell what was asked


@dataclass(frozen=True)
class Versions:
    """What answered and what decided, as digests.

    Attributes:
        model: of the weights; of the name of an upstream server, where there are none here.
        tokenizer, template: of the files, of the template's text.
        assets: of whatever else decides (a classifier, a bank of prompts), by name.
        software: version of Expunge.

    Raises:
        InputError: one is no digest: a name or a text must not stand in the log.
    """

    model: str
    tokenizer: str = ""
    template: str = ""
    assets: Mapping[str, str] = field(default_factory=dict)
    software: str = __version__

    def __post_init__(self) -> None:
        for name, value in {"model": self.model, "tokenizer": self.tokenizer, "template": self.template, **self.assets}.items():
            if value and not _DIGEST.fullmatch(value):
                raise InputError(f"The version of {name} is no digest.", "Give 16 to 128 hexadecimal digits (SHA-256).")

    def described(self) -> dict[str, Any]:
        """As it stands in records."""
        parts: dict[str, Any] = {"model": self.model, "tokenizer": self.tokenizer, "template": self.template}
        return {**{k: v for k, v in parts.items() if v}, "assets": dict(self.assets), "software": self.software}


@dataclass(frozen=True)
class Request:
    """What the server knows of a request beside its plan and its answer.

    Attributes:
        tenant: who asks (an account, a key); written as a pseudonym.
        prompt_tokens: length of the prompt; none: not known.
        seed: by which the answer was drawn; committed to. None: nothing was drawn.
        counts: numbers that guards have counted, by name: ``positions_corrupted``, ``candidates_penalised``, ``hard_bans``,
            ``regenerations``, ``held_back``...
        error: class name of the error that ended it.
        canary: whether the server has asked itself; such a record counts for nobody, and is never kept in full.
    """

    tenant: str = ""
    prompt_tokens: int | None = None
    seed: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    canary: bool = False


def coarse(at: datetime) -> str:
    """A moment to the minute: ``2026-11-28T16:18Z``."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%MZ")


def named(target: str, pseudonym: Callable[[str], str]) -> str:
    """An id as it may stand in the log: one of the registry as it is, any other (it may be a name) as a pseudonym."""
    return target if not target or _OPAQUE.fullmatch(target) else pseudonym(target)


def decisions(plan: Plan, rows: Sequence[Row], pseudonym: Callable[[str], str]) -> list[dict[str, Any]]:
    """What each row of the policy decided, in the order of the rows.

    ``decision`` is ``acted``, ``failed`` (then ``error`` and the fail mode say how and what followed) or ``passed``.
    """
    out = []
    for at, row in enumerate(rows):
        fired = [f for f in plan.fired if f.row == row.title]
        errors = [kind for title, kind in plan.failed if title == row.title]
        made: dict[str, Any] = {
            "row": at, "detector": row.detector.name, "action": row.action.name,
            "decision": "failed" if errors else "acted" if fired else "passed",
            "hits": [{"target": named(f.target, pseudonym), "score": rounded(f.score), "hook": f.hook.value} for f in fired],
        }  # fmt: skip
        fitted = plan.bounds.get(row.title)
        threshold = fitted.value if fitted is not None else getattr(row.detector, "threshold", None)
        if isinstance(threshold, (int, float)) and not isinstance(threshold, bool):
            made["threshold"] = rounded(float(threshold), 6)
        if errors:
            made |= {"error": _kind(errors[0]), "fail_mode": row.on_error}
        out.append(made)
    return out


def thresholds(policy: Policy) -> list[dict[str, Any]]:
    """From which score on each row that scores notices something, and what that promises of ordinary prompts.

    ``rate`` is what was asked for, ``promised`` what the number of ordinary prompts allows to promise on average, ``upper`` the
    bound at 95 % for this very threshold; none of them where the threshold was given. Of the prompts only their number stands
    there.
    """
    rows = {row.title: (at, row) for at, row in enumerate(policy.rows)}
    out = []
    for title, bound in policy.bounds.items():
        at, row = rows[title]
        promise = {"rate": bound.rate, "promised": bound.promised, "upper": bound.upper()}
        out.append({
            "row": at, "detector": row.detector.name, "threshold": rounded(bound.value, 6), "ordinary": len(bound.scores),
            **{k: rounded(v, 6) for k, v in promise.items()},
        })  # fmt: skip
    return out


def outcome(plan: Plan | None, request: Request) -> str:
    """``error``, ``refused``, ``modified`` or ``passed``."""
    if plan is None or request.error:
        return "error"
    if plan.say is not None:
        return "refused"
    changed = plan.conversation is not plan.asked or plan.embeddings or plan.hidden or plan.scores or plan.revisions
    return "modified" if changed else "passed"


def request_fields(
    plan: Plan | None, answer: Answer | None, rows: Sequence[Row], request: Request, pseudonym: Callable[[str], str]
) -> dict[str, Any]:
    """The part of a record that comes from a request, without times, versions and commitments.

    Raises:
        InputError: a count is no number or its name no word.
    """
    for name, value in request.counts.items():
        if not _COUNT.fullmatch(name) or not isinstance(value, int) or isinstance(value, bool):
            raise InputError("A count in the log must be a whole number under a lower-case name.", "Text is never logged.")
    counts = dict(request.counts)
    made: dict[str, Any] = {"outcome": outcome(plan, request), "tenant": pseudonym(request.tenant) if request.tenant else ""}
    made |= {"canary": True} if request.canary else {}
    if request.error:
        made["error"] = _kind(request.error)
    if plan is not None:
        made["rows"] = decisions(plan, rows, pseudonym)
        made["hooks_ms"] = {hook.value: round(seconds * 1000, 1) for hook, seconds in plan.seconds.items()}
        edits: dict[str, Sequence[object]] = {
            "embeddings": plan.embeddings,
            "hidden": plan.hidden,
            "scores": plan.scores,
            "text": plan.revisions,
        }
        counts |= {f"edits_{name}": len(held) for name, held in edits.items() if held}
    if answer is not None:
        made["finish"] = answer.finish
        made["answer_tokens"] = answer.tokens
    if request.prompt_tokens is not None:
        made["prompt_tokens"] = request.prompt_tokens
    return {**made, "counts": counts}


def rounded(score: float, digits: int = _DIGITS) -> float | None:
    """A score to a few digits; none for one that is no number."""
    return round(float(score), digits) + 0.0 if math.isfinite(score) else None


def _kind(error: str) -> str:
    """Name of a class of errors; anything else could quote the request."""
    return error if _KIND.fullmatch(error) else "Error"
