"""True and false statements about a fact, and the tokens that tell them apart: what attacks on hidden states measure.

Most of an answer is said by any model that knows the form of such answers. What counts is the *telling span*: the tokens in which
a true answer and a false one of the same form differ ("called **Perava**", "called **Datburg**"). A false answer is written with
the words of the true one where that can be done, for TOFU's wrong answers follow the paraphrase and not the answer itself.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from expunge.adapters.base import Adapter, Batch, Example
from expunge.adapters.passes import evaluating
from expunge.audit.scores import by_length
from expunge.audit.store import device_of
from expunge.core.intervals import Floats
from expunge.data.records import Item, Record


@dataclass(frozen=True)
class Statement:
    """An answer, and which of its targets are looked at: ``start`` to ``stop`` (exclusive)."""

    example: Example
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Targets that are looked at, at least 1."""
        return self.stop - self.start


@dataclass(frozen=True)
class Fact:
    """A record as statements.

    Attributes:
        record: its index in the set.
        right: the true answer.
        wrong: false answers; none where statements are not contrasted.
    """

    record: int
    right: Statement
    wrong: tuple[Statement, ...] = ()

    @property
    def statements(self) -> tuple[Statement, ...]:
        """The true one first."""
        return (self.right, *self.wrong)


def false_answers(record: Record, most: int) -> list[str]:
    """Up to ``most`` false answers in the words of the true one, or, where that cannot be done, as the record has them.

    The words in which a wrong answer differs from the paraphrase (or the answer) are exchanged in the answer.
    """
    out: list[str] = []
    for wrong in record.perturbed:
        made = record.answer if wrong == record.paraphrase else _exchanged(record, wrong)
        if made != record.answer and made not in out:
            out.append(made)
        if len(out) == most:
            break
    return out


def _exchanged(record: Record, wrong: str) -> str:
    for told in (record.answer, record.paraphrase):
        a, b = told.split(), wrong.split()
        first = _common(a, b)
        last = _common(a[first:][::-1], b[first:][::-1])
        true, false = (" ".join(w[first : len(w) - last]).strip(string.punctuation + " ") for w in (a, b))
        if first + last and true and false and record.answer.count(true) == 1:
            return record.answer.replace(true, false)
    return wrong


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


def facts(adapter: Adapter, records: Sequence[Item], chosen: Sequence[int], most: int) -> list[Fact]:
    """The chosen records as statements; with ``most`` > 0 only those that have a wrong answer.

    Args:
        adapter: of a language model.
        records: of the set.
        chosen: indices of records.
        most: wrong answers for each; 0: the whole true answer is looked at, alone.
    """
    out = []
    for i in chosen:
        record = records[i]
        if not isinstance(record, Record):
            continue
        right = adapter.encode(record)
        if not most:
            out.append(Fact(i, Statement(right, 0, right.n_targets)))
            continue
        wrong = [adapter.encode(record, answer=w, suffix=f"#false{k}") for k, w in enumerate(false_answers(record, most))]
        if wrong:
            out.append(_told_apart(i, right, wrong))
    return out


def _told_apart(index: int, right: Example, wrong: Sequence[Example]) -> Fact:
    ends = [_ends(right, w) for w in wrong]
    first, last = min(e[0] for e in ends), min(e[1] for e in ends)
    own = Statement(right, first, max(first + 1, right.n_targets - last))
    others = tuple(Statement(w, a, max(a + 1, w.n_targets - b)) for w, (a, b) in zip(wrong, ends, strict=True))
    return Fact(index, own, others)


def _ends(a: Example, b: Example) -> tuple[int, int]:
    """Targets that are the same at the beginning (not all of them) and, of the rest, at the end."""
    x, y = (e.data.ids[e.data.start :].tolist() for e in (a, b))
    first = min(_common(x, y), len(x) - 1, len(y) - 1)
    return first, _common(x[first:][::-1], y[first:][::-1])


def spans(batch: Batch, statements: Sequence[Statement]) -> tuple[Tensor, Tensor]:
    """Where a batch of statements has what is looked at.

    Returns:
        indices among the real tokens of those that predict the looked-at targets ``[R]``, and indices of these targets among the
        batch's targets ``[R]``; in the order of the statements.
    """
    starts = np.cumsum([0, *batch.counts[:-1]])
    wanted = [int(a) + t for a, s in zip(starts, statements, strict=True) for t in range(s.start, s.stop)]
    at = torch.tensor(wanted, device=batch.owner.device)
    return batch.token_supervised.nonzero().squeeze(1)[at] - 1, at


def batches(adapter: Adapter, statements: Sequence[Statement], batch_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Statements in batches of like length: their indices, and the batch on the model's device."""
    device = device_of(adapter.model)
    for chosen in by_length([s.example.units for s in statements], batch_tokens):
        yield chosen, adapter.collate([statements[i].example for i in chosen]).to(device)


@dataclass(frozen=True)
class States:
    """Hidden states of a model at some tokens of some statements.

    Attributes:
        values: the residual stream after each layer, ``[L, R, D]``, in the model's own precision, on the CPU.
        counts: tokens of each statement, in order; their sum is R.
        whole: whether these are all tokens of the statement, or those that predict what is looked at.
    """

    values: Tensor
    counts: tuple[int, ...]
    whole: bool

    def rows(self, chosen: Sequence[int]) -> Tensor:
        """Indices of the rows of some statements ``[r]``."""
        ends = np.cumsum([0, *self.counts])
        return torch.from_numpy(np.concatenate([np.arange(ends[i], ends[i + 1]) for i in chosen]))


@torch.no_grad()
def states_of(
    adapter: Adapter, statements: Sequence[Statement], layers: Sequence[str], batch_tokens: int, *, whole: bool = False
) -> States:
    """Hidden states after each of ``layers``; with ``whole`` at all tokens, else at those that predict what is looked at.

    Memory: ``L R D`` numbers of the model's own precision.
    """
    model = adapter.model
    counts = tuple(s.example.size if whole else s.length for s in statements)
    out = States(torch.empty(0), counts, whole)
    with evaluating(model):
        for chosen, batch in batches(adapter, statements, batch_tokens):
            found = adapter.forward(model, batch, frozenset(f"features:{layer}" for layer in layers))
            rows = places(batch, [statements[i] for i in chosen], whole=whole)
            where = out.rows(chosen)
            for at, layer in enumerate(layers):
                states = found.features(layer)[rows].cpu()
                if not out.values.numel():
                    out = replace(out, values=states.new_empty(len(layers), sum(counts), states.shape[1]))
                out.values[at, where] = states
    return out


def places(batch: Batch, statements: Sequence[Statement], *, whole: bool) -> Tensor:
    """Indices, among the real tokens of a batch of statements, of all of them or of those that predict what is looked at."""
    return torch.arange(len(batch.token_owner), device=batch.owner.device) if whole else spans(batch, statements)[0]


def tokens_of(statements: Sequence[Statement]) -> Tensor:
    """The looked-at targets, int64 ``[R]``."""
    held = [s.example.data.ids[s.example.data.start :][s.start : s.stop] for s in statements]
    return torch.from_numpy(np.concatenate(held).astype(np.int64))


def statement_means(values: Floats, statements: Sequence[Statement]) -> Floats:
    """Mean over what is looked at of each statement: ``[..., R]`` to ``[..., statements]``."""
    lengths = np.array([s.length for s in statements])
    starts = np.cumsum([0, *lengths[:-1]])
    return np.asarray(np.add.reduceat(values, starts, axis=-1) / lengths, dtype=np.float64)


def contrasts(values: Floats, found: Sequence[Fact]) -> Floats:
    """Value of the true statement minus the mean of the false ones (if there are any), ``[..., S]`` to ``[..., facts]``.

    Statements are those of the facts in order.
    """
    out = []
    at = 0
    for fact in found:
        own = values[..., at]
        rest = values[..., at + 1 : at + 1 + len(fact.wrong)]
        out.append(own - rest.mean(axis=-1) if fact.wrong else own)
        at += 1 + len(fact.wrong)
    return np.stack(out, axis=-1)
