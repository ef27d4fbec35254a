"""Which numbers stand for the whole: one for forgetting, utility, privacy and relearning, the same for every model shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from expunge.audit.document import AuditDocument, ModelEntry
from expunge.core.errors import unknown
from expunge.core.results import Direction, Number

Kind = Literal["forget", "utility", "privacy", "relearn"]

#: the first that most models have is shown; names that are not listed come after, in alphabetical order
PREFERRED: dict[Kind, tuple[str, ...]] = {
    "forget": (
        "accuracy", "absolute-error", "probability", "verbatim-memorisation", "rouge-l-recall", "knowledge-memorisation",
        "exact-memorisation", "loss",
    ),
    "utility": (
        "model-utility", "test.accuracy", "test.skill", "retain.accuracy", "retain.skill", "retain.probability",
        "retain.rouge-l-recall", "retain.knowledge-memorisation",
    ),
    "privacy": ("privleak.min-k", "forget.looks-seen", "privleak.loss", "membership.min-k", "membership.loss"),
    "relearn": (),
}  # fmt: skip
PRIVACY = ("privleak", "membership")
SEEN = "forget.looks-seen"  #: evidence on single rows, where there are reference models
ACTIVE = ("relearn", "quantise", "read-out")


def family(key: str) -> str:
    """The part of a number's name before the first dot."""
    return key.split(".", 1)[0]


def is_kind(kind: Kind, key: str, number: Number) -> bool:
    """Whether the number called ``key`` can stand for ``kind``."""
    if kind == "forget":
        return family(key) == "forget" and key != SEEN and number.direction in (Direction.FORGET_DOWN, Direction.REFERENCE)
    if kind == "utility":
        return number.direction in (Direction.UTILITY_UP, Direction.UTILITY_DOWN) and family(key) not in ("forget", *ACTIVE)
    if kind == "privacy":
        return family(key) in PRIVACY or key == SEEN
    return family(key) == "relearn"


def pick(models: Iterable[ModelEntry], kind: Kind) -> str | None:
    """The key of the number of this ``kind`` that most ``models`` have a value for; None if none has.

    Ties go to the order of :data:`PREFERRED`, then to the alphabet, so that one document always shows the same number.
    """
    counts: dict[str, int] = {}
    for model in models:
        for key, number in model.numbers.items():
            if number.value is not None and is_kind(kind, key, number):
                counts[key] = counts.get(key, 0) + 1
    order = PREFERRED[kind]

    def rank(key: str) -> tuple[int, int, str]:
        name = key.removeprefix("forget.") if kind == "forget" else key
        return -counts[key], order.index(name) if name in order else len(order), key

    return min(counts, key=rank, default=None)


def checked_key(documents: Sequence[AuditDocument], key: str | None, kind: Kind) -> str | None:
    """``key`` if some model has such a number, the picked one if ``key`` is None.

    Raises:
        InputError: no model of any document has a number called ``key``.
    """
    models = [m for d in documents for m in d.models]
    if key is None:
        return pick(models, kind)
    known = {k for m in models for k in m.numbers}
    if key not in known:
        raise unknown("number", key, known)
    return key
