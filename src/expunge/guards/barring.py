"""Terms that a decoder cannot say: the likeliest tokens are looked at, and one that would complete a term is dropped."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from expunge.guards.folding import Word, grown, open_run, parted
from expunge.guards.parts import JointEdit
from expunge.guards.terms import TermIndex

_CONTEXT = 4  #: tokens that are decoded with one to see which text it adds
_MOST = 512  #: tokens of the tail that are looked at


class HardBar(JointEdit):
    """What is done to the scores of one request: a function of its ids alone, so that rows may be reordered.

    Args:
        index: digests of terms.
        tokenizer: of the model.
        labels: whose terms are forbidden.
        candidates: likeliest tokens that are looked at; others cannot be chosen. More are looked at where more than half of them
            are dropped.
        shared: see :class:`~expunge.guards.parts.JointEdit`; none: the tokenizer.
        words: of the end of a text that are kept in any case.
    """

    def __init__(
        self,
        index: TermIndex,
        tokenizer: Any,
        labels: Collection[str],
        candidates: int,
        *,
        shared: Hashable = None,
        words: int = 0,
    ) -> None:
        self.tokenizer, self.labels, self.candidates, self.words = tokenizer, frozenset(labels), candidates, words
        self.shared = shared if shared is not None else (id(tokenizer), candidates)
        self.index = index.part(labels)
        self._reach = min(_MOST, 2 * index.longest + 16)

    def together(self, rows: Sequence[tuple[Self, Tensor, int, Tensor]]) -> list[Tensor]:
        """Scores ``[V]`` of each row with what is forbidden at minus infinity."""
        held = [ids[-edit._reach :].tolist() for edit, ids, *_ in rows]
        tails = [e._end(t.rstrip("\ufffd")) for (e, *_), t in zip(rows, self._text(held), strict=True)]
        ends = [End(e, h[-_CONTEXT:], t, parted(t)) for (e, *_), h, t in zip(rows, held, tails, strict=True)]
        given = torch.stack([scores for *_, scores in rows])
        made = torch.full_like(given, -torch.inf)
        left, kept = list(range(len(rows))), [0] * len(rows)
        seen, size, most = 0, min(self.candidates, given.shape[1]), given.shape[1]
        while left:
            values, tokens = (found[:, seen:] for found in given[left].topk(size))
            off = self._taken_off([ends[at] for at in left], tokens.tolist())
            changed = values - torch.tensor(off, dtype=values.dtype, device=values.device)
            made[torch.tensor(left, device=made.device)[:, None], tokens] = changed
            for at, count in zip(left, torch.isfinite(changed).sum(1).tolist(), strict=True):
                kept[at] += count
            more = torch.isfinite(values).all(1).tolist()  # else what is left was forbidden before
            left = [at for at, m in zip(left, more, strict=True) if m and size < most and 2 * kept[at] < self.candidates]
            seen, size = size, min(4 * size, most)
        return list(made)

    def soft(self, edits: Sequence[Self], said: Sequence[Mapping[int, Sequence[Word]]]) -> list[dict[int, float]]:
        """What the scores of tokens fall by that complete no term.

        Args:
            edits: of the rows.
            said: of each row the words of the texts that its tokens make, where a token brings a new word.
        """
        return [{} for _ in edits]

    def _end(self, text: str) -> str:
        """The words at the end of a text that can be part of a term with what follows, in clear or in an encoding."""
        letters, at, longest = 0, len(text), self.index.longest
        for count, word in enumerate(reversed(parted(text))):
            if letters >= longest + 16 and count >= self.words:
                break
            letters += len(word.letters)
            at = word.start
        return text[min(at, open_run(text)) :]

    def _text(self, rows: Sequence[Sequence[int]]) -> list[str]:
        found: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return found

    def _taken_off(self, ends: Sequence[End], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """What the score of each token falls by after each end; infinity for what is forbidden."""
        begins = [len(t.rstrip("\ufffd")) for t in self._text([e.context for e in ends])]
        longer = iter(self._text([[*e.context, t] for e, some in zip(ends, tokens, strict=True) for t in some]))
        off, said = [], []
        for end, begin, some in zip(ends, begins, tokens, strict=True):
            found = [next(longer) for _ in some]
            # A character of several tokens is looked at when it is whole.
            texts = ["" if t.endswith("\ufffd") or len(t) <= begin else end.tail + t[begin:] for t in found]
            held = [grown(end.known, t) if t else [] for t in texts]
            start, ending = len(end.tail), end.edit.index.ending
            off.append([np.inf if t and ending(t, start, w) else 0.0 for t, w in zip(texts, held, strict=True)])
            said.append({at: w for at, w in enumerate(held) if w and w[-1].end > start and not off[-1][at]})
        for row, less in enumerate(self.soft([e.edit for e in ends], said)):
            for at, value in less.items():
                off[row][at] = value
        return off


@dataclass(frozen=True)
class End:
    """What a row's text ends with."""

    edit: Any
    context: list[int]  # its last tokens
    tail: str  # its last words
    known: list[Word]  # these, folded
