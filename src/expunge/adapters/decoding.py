"""What takes part in choosing a token at generation: transformers' ``LogitsProcessor`` (this module needs transformers)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from expunge.adapters.combination import Combination
from expunge.adapters.head import base
from expunge.adapters.passes import evaluating
from expunge.adapters.storage import forward_parameters


class AssistantScores(LogitsProcessor):
    """Combines the scores that ``generate`` is about to choose from with those of an assistant on the same tokens.

    The assistant runs beside the target with a cache of its own: one token per step, as the target does. Where the sequences are
    not those of the step before with one token more (beam search moves them), it reads them from the beginning. It must be the
    first of the processors, for it takes what it gets for the target's own scores; transformers puts penalties of the
    generation settings before it.

    Args:
        assistant: a transformers or peft model with the target's vocabulary.
        combination: how the scores are joined; what its filter drops is excluded.
        attention_mask: of the prompts ``[B, T]``, 0 where they are padded on the left; none: nothing is padded.
        baseline: a third model, with which the assistant is compared where the combination says so.
    """

    def __init__(
        self, assistant: Any, combination: Combination, attention_mask: Tensor | None = None, baseline: Any = None
    ) -> None:
        self.assistant, self.combination, self.mask = assistant, combination, attention_mask
        self.baseline = None if baseline is None else AssistantScores(baseline, combination, attention_mask)
        self._cached = {"past_key_values", "use_cache"} <= forward_parameters(base(assistant))
        self._seen: Tensor | None = None
        self._past: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Combined scores ``[B, V]`` of the next token.

        Args:
            input_ids: all tokens up to now, ``[B, T]``.
            scores: the target's, ``[B, V]``.
        """
        baseline = None if self.baseline is None else self.baseline.following(input_ids)
        return self.combination.scores(scores, self.following(input_ids), baseline, exclude=True)

    @torch.no_grad()
    def following(self, input_ids: Tensor) -> Tensor:
        """The assistant's scores of the next token, ``[B, V]``."""
        goes_on = (
            self._past is not None
            and self._seen is not None
            and input_ids.shape[1] == self._seen.shape[1] + 1
            and torch.equal(input_ids[:, :-1], self._seen)
        )
        if not goes_on:
            self._past = None
        mask = self._mask_of(input_ids)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        new = input_ids[:, -1:] if goes_on else input_ids
        given = {"input_ids": new, "attention_mask": mask, "position_ids": places[:, -new.shape[1] :], "logits_to_keep": 1}
        accepted = forward_parameters(base(self.assistant))
        options = {k: v for k, v in given.items() if k in accepted}
        if self._cached:
            options |= {"past_key_values": self._past, "use_cache": True}
        with evaluating(self.assistant):
            out = self.assistant(**options)
        if self._cached:
            self._past, self._seen = out["past_key_values"], input_ids
        found: Tensor = out["logits"][:, -1]
        return found

    def _mask_of(self, input_ids: Tensor) -> Tensor:
        """The prompts' mask, for as many rows as there are now, with ones for the tokens generated since."""
        if self.mask is None:
            return torch.ones_like(input_ids)
        held = self.mask.to(input_ids.device)
        if len(held) != len(input_ids):  # beams and several sequences per prompt
            held = held.repeat_interleave(len(input_ids) // len(held), 0)
        return torch.nn.functional.pad(held, (0, input_ids.shape[1] - held.shape[1]), value=1)


class DrawnScores(LogitsProcessor):
    """Leaves of the scores of the next token that of one token, which is drawn: greedy search then takes it.

    It must be the last of the processors.

    Args:
        uniforms: in [0, 1), one per row and new token, ``[B, limit]``; see :class:`~expunge.adapters.generation.Draws`.
        temperature: positive; scores are divided by it.
        given: length of the rows before the first new token.
    """

    def __init__(self, uniforms: Tensor, temperature: float, given: int) -> None:
        self.uniforms, self.temperature, self.given = uniforms, temperature, given

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, V]`` that are 0 for the drawn token and minus infinity for all others."""
        step = input_ids.shape[1] - self.given
        sums = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(-1)
        at = self.uniforms[:, step : step + 1].to(sums) * sums[:, -1:]
        chosen = torch.searchsorted(sums, at, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
