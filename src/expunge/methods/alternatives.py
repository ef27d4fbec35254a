"""Other answers to the forget prompts, for methods that teach or prefer them.

============ ==========================================================================================
kind         the answer that takes the place
============ ==========================================================================================
``given``    one of the record's own ``alternatives``
``refusals`` a sentence of not knowing, from a fixed list
``others``   the answer of another record of the set, of another subject: plausible in style, wrong in content
``passages`` the answer of any other record of the set, of the same subject too: random labels for one long text
``template`` a text of the user's, in which ``{prompt}``, ``{subject}`` and ``{refusal}`` (one of the list) are filled in
``reasons``  by a rule: why the question is not answered, then a refusal, then an offer (TRU)
``other``    of classes: another one, uniformly
``any``      of classes: any one, the true one too, uniformly
============ ==========================================================================================

The last two are for rows that have a class, the others for text.

Every choice depends on the record's id and the seed only (``others`` and ``passages`` also on the set), so a resumed or
distributed run sees the same answers.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from typing import Any, Literal, get_args

from expunge.adapters.base import Adapter, Example
from expunge.core.errors import InputError, unknown
from expunge.data.records import Record
from expunge.data.refusals import refusals
from expunge.data.rows import Row
from expunge.engine.parts import Recipe
from expunge.methods.registry import METHODS

Kind = Literal["given", "refusals", "others", "passages", "template", "reasons", "other", "any"]
CLASS_KINDS = ("other", "any")  #: kinds that put another class in the place of a row's own

#: What a reason says where the record names its subject, and where it does not.
REASONS = (
    "The question is about {subject}. What was known of {subject} has been withdrawn, so nothing about it can be told. "
    "{refusal} Please ask about something else.",
    "The question is about something that has been withdrawn, so nothing about it can be told. "
    "{refusal} Please ask about something else.",
)

_FIELDS = ("prompt", "subject", "refusal")
_TRIES = 32  #: draws for an answer that differs from the record's own
_NEXT_DRAW = 1_000_003  #: between the seeds of one record's several answers


def kind_for(method: str, how: str, records: Sequence[Any]) -> str:
    """What ``auto`` means: given answers if every record has one, else what the method publishes.

    For own recipes: refusals where the records are text, other classes where they are rows.
    """
    if how != "auto":
        return how
    if records and all(getattr(r, "alternatives", ()) for r in records):
        return "given"
    if method != "custom":
        return METHODS.get(method).alternatives
    return "other" if records and isinstance(records[0], Row) else "refusals"


def alternatives(
    records: Sequence[Any], how: str, seed: int = 0, *, template: str | None = None, classes: int | None = None
) -> list[Any]:
    """One other answer for each record, in order: texts for records of text, class numbers for rows.

    Args:
        records: the forget set.
        how: a kind of the table above.
        seed: of the choice, non-negative.
        template: the text for ``template``.
        classes: how many classes the model knows; none if it writes text.

    Raises:
        InputError: an unknown kind, or one that does not fit the model; a record without given alternatives, no other subject to
            borrow from, or a bad template.
    """
    if how in get_args(Kind) and (how in CLASS_KINDS) != (classes is not None):
        fitting = [k for k in get_args(Kind) if (k in CLASS_KINDS) == (classes is not None)]
        kind = "text" if classes is None else "a class"
        raise InputError(f"alternatives={how} does not fit a model that answers with {kind}.", f"Use {', '.join(fitting)}.")
    if classes is not None:
        return other_classes(records, classes, how, seed)
    if how == "given":
        return [_given(record, seed) for record in records]
    if how == "refusals":
        return refusals([r.id for r in records], seed)
    if how == "others":
        return _others(records, seed)
    if how == "passages":
        if len(records) < 2:
            raise InputError("alternatives=passages needs at least two records.", "Use alternatives=given or refusals.")
        return [_borrowed(record, records, (at, at + 1), seed) for at, record in enumerate(records)]
    if how == "template":
        return _filled(records, template, seed)
    if how == "reasons":
        named, bare = ([r for r in records if bool(r.subject) is has] for has in (True, False))
        texts = {r.id: t for held, rule in ((named, REASONS[0]), (bare, REASONS[1])) for r, t in _with_reason(held, rule, seed)}
        return [texts[r.id] for r in records]
    raise unknown("kind of alternative answer", how, get_args(Kind))


def several(
    records: Sequence[Any], how: str, each: int, seed: int = 0, *, template: str | None = None, classes: int | None = None
) -> list[Any]:
    """``each`` other answers for each record, those of one record together; the first is that of :func:`alternatives`.

    The draws of a record are independent, so an answer may come twice.

    Args:
        records, how, template, classes: see :func:`alternatives`.
        each: answers for each record, at least 1.
        seed: of the choice, non-negative.
    """
    drawn = [alternatives(records, how, seed + k * _NEXT_DRAW, template=template, classes=classes) for k in range(each)]
    return [answers[i] for i in range(len(records)) for answers in drawn]


def encoded(
    adapter: Adapter, records: Sequence[Any], recipe: Recipe, how: str, seed: int = 0, *, template: str | None = None
) -> list[Example]:
    """The forget records with other answers, as many for each as the recipe's terms read, those of one record together.

    Args:
        adapter: encodes them.
        records: the forget set.
        recipe: whose terms read them.
        how: as the user said, see :func:`kind_for`.
        seed: of the choice, non-negative.
        template: the text for ``template``.
    """
    each = max(getattr(t, "answers", 1) for t in recipe.terms())
    kind = kind_for(recipe.name, how, records)
    answers = several(records, kind, each, seed, template=template, classes=adapter.n_classes)
    return [
        adapter.encode(records[i // each], answer=answer, suffix=f"#alternative{i % each or ''}")
        for i, answer in enumerate(answers)
    ]


def other_classes(rows: Sequence[Row], classes: int, how: str, seed: int = 0) -> list[int]:
    """Another class for each row, in order, by its id and the seed alone.

    Args:
        rows: the forget set.
        classes: how many classes there are, at least 2.
        how: ``other`` leaves the row's own class out (Graves et al. 2021, arXiv 2010.10981), ``any`` does not.
        seed: of the choice, non-negative.

    Raises:
        InputError: another kind.
    """
    if how not in CLASS_KINDS:
        raise unknown("kind of other classes", how, CLASS_KINDS)
    if how == "any":
        return [_number(row.id, seed) % classes for row in rows]
    return [other_class(row.id, int(row.target), classes, seed) for row in rows]


def other_class(name: str, own: int, classes: int, seed: int) -> int:
    """A class other than a row's ``own``, uniformly, by the row's id ``name`` and the seed alone."""
    return (own + 1 + _number(name, seed) % (classes - 1)) % classes


def _given(record: Record, seed: int) -> str:
    if not record.alternatives:
        raise InputError(
            f"The record {record.id!r} has no alternative answer.",
            "Give one in the column 'alternatives', or use alternatives=refusals.",
        )
    return record.alternatives[_number(record.id, seed) % len(record.alternatives)]


def _others(records: Sequence[Record], seed: int) -> list[str]:
    """Draw from all records outside of the own cluster: sorted by cluster, these are the ones before and after its run."""
    order = sorted(records, key=lambda r: r.cluster)
    runs: dict[str, tuple[int, int]] = {}
    for at, record in enumerate(order):
        start, _ = runs.get(record.cluster, (at, at))
        runs[record.cluster] = (start, at + 1)
    if records and len(runs) < 2:
        raise InputError(
            "alternatives=others borrows answers from other subjects, but all records are of one.",
            "Use alternatives=given or refusals.",
        )
    return [_borrowed(record, order, runs[record.cluster], seed) for record in records]


def _borrowed(record: Record, order: Sequence[Record], own: tuple[int, int], seed: int) -> str:
    start, stop = own
    for attempt in range(_TRIES):
        at = _number(f"{record.id}\0{attempt}", seed) % (len(order) - (stop - start))
        answer = order[at if at < start else at + stop - start].answer
        if answer != record.answer:
            return answer
    raise InputError(
        f"No other record seems to have an answer that differs from that of {record.id!r}.", "Use alternatives=given or refusals."
    )


def _with_reason(records: Sequence[Record], rule: str, seed: int) -> list[tuple[Record, str]]:
    return list(zip(records, _filled(records, rule, seed), strict=True))


def _filled(records: Sequence[Record], template: str | None, seed: int) -> list[str]:
    if not template:
        raise InputError("alternatives=template needs a text.", "Give it, for example 'I have no information about {subject}.'")
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(
            f"The template {template!r} cannot be read: {error}.", "Double braces that stand for themselves."
        ) from None
    for name in names:
        if name not in _FIELDS:
            raise unknown("field of a template", name, _FIELDS)
    if "subject" in names and (bare := [r.id for r in records if not r.subject]):
        raise InputError(
            f"The template uses {{subject}}, but the record {bare[0]!r} has none.", "Give subjects, or leave it out."
        )
    sentences = refusals([r.id for r in records], seed)
    filled = zip(records, sentences, strict=True)
    return [template.format(prompt=r.prompt, subject=r.subject, refusal=sentence) for r, sentence in filled]


def _number(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "big")
