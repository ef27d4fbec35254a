"""Terms that a decoder cannot say: the likeliest tokens are looked at, and one that would complete a term is dropped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.guards.folding import open_run, parted
from expunge.guards.terms import TermIndex

_CONTEXT = 4  #: tokens that are decoded with one to see which text it adds
_MOST = 512  #: tokens of the tail that are looked at


class HardBar:
    """What is done to the scores of one request: a function of its ids alone, so that rows may be reordered.

    Args:
        index: digests of terms.
        tokenizer: of the model.
        labels: whose terms are forbidden.
        candidates: likeliest tokens that are looked at; others cannot be chosen. More are looked at where more than half of them
            are dropped.
    """

    def __init__(self, index: TermIndex, tokenizer: Any, labels: Collection[str], candidates: int) -> None:
        self.index, self.tokenizer, self.labels, self.candidates = index, tokenizer, labels, candidates

    def __call__(self, ids: Tensor, prompt: int, scores: Tensor) -> Tensor:
        """Scores ``[V]`` with what is forbidden at minus infinity.

        Args:
            ids: so far, the prompt's and the answer's, ``[T]``.
            prompt: how many are the prompt's.
            scores: of the next token, ``[V]``.
        """
        held = ids[-_MOST:].tolist()
        tail = self._end(self._text([held[-(2 * self.index.longest + 16) :]])[0].rstrip("\ufffd"))
        made = torch.full_like(scores, -torch.inf)
        size, seen, kept = min(self.candidates, len(scores)), 0, 0
        while seen < len(scores) and 2 * kept < self.candidates:
            values, tokens = scores.topk(size)
            values, tokens = values[seen:], tokens[seen:]
            off = self.taken_off(self._texts(held, tail, tokens.tolist()), len(tail))
            changed = values - torch.tensor(off, dtype=values.dtype, device=values.device)
            made[tokens] = changed
            kept += int(torch.isfinite(changed).sum())
            if not bool(torch.isfinite(values).all()):
                break  # what is left was forbidden before
            seen, size = size, min(4 * size, len(scores))
        return made

    def taken_off(self, texts: Sequence[str], start: int) -> list[float]:
        """What the scores of tokens fall by: infinity for one that completes a term.

        Args:
            texts: that tokens would make; empty where one makes none yet.
            start: characters that are there already.
        """
        return [np.inf if t and self.index.ending(t, start, self.labels) else 0.0 for t in texts]

    def _end(self, text: str) -> str:
        """The words at the end of a text that can be part of a term with what follows, in clear or in an encoding."""
        letters, at = 0, len(text)
        for word in reversed(parted(text)):
            if letters >= self.index.longest + 16:
                break
            letters += len(word.letters)
            at = word.start
        return text[min(at, open_run(text)) :]

    def _text(self, rows: Sequence[Sequence[int]]) -> list[str]:
        found: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return found

    def _texts(self, held: list[int], tail: str, tokens: list[int]) -> list[str]:
        context = held[-_CONTEXT:]
        known, *longer = self._text([context, *[[*context, t] for t in tokens]])
        begin = len(known.rstrip("\ufffd"))
        # A character of several tokens is looked at when it is whole.
        return ["" if t.endswith("\ufffd") or len(t) <= begin else tail + t[begin:] for t in longer]
