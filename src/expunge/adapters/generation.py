"""Generation for several prompts at once, greedy or drawn, by transformers' own ``generate``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from expunge.adapters.extra import need


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn: from ``softmax(scores / temperature)``, by numbers that are given.

    Attributes:
        uniforms: in [0, 1), one per prompt and new token, ``[B, limit]``: the token is where the summed probabilities, in the
            order of the vocabulary, pass it. So what is drawn for a prompt does not depend on the prompts beside it.
        temperature: positive.
    """

    uniforms: NDArray[np.float64]
    temperature: float = 1.0

    def rows(self, chosen: Sequence[int]) -> Draws:
        """Those of some of the prompts."""
        return Draws(self.uniforms[list(chosen)], self.temperature)

    def processors(self, given: int) -> list[Any]:
        """What ``generate`` takes as ``logits_processor``; ``given``: tokens that a row has before its first new one."""
        from expunge.adapters.decoding import DrawnScores

        return [DrawnScores(torch.from_numpy(self.uniforms), self.temperature, given)]


def continued(
    inner: Any,
    model: Any,
    prompts: Sequence[NDArray[np.int32]],
    *,
    limit: int,
    context: int | None,
    ends: frozenset[int],
    pad: int,
    temperature: float | None = None,
    draws: Draws | None = None,
) -> list[tuple[list[int], bool]]:
    """Continue each prompt, with the most likely token or one that is drawn, until an end token or ``limit`` tokens.

    Args:
        inner: the transformers model (whose generation settings are set aside meanwhile).
        model: the same model, perhaps in peft's wrapper.
        prompts: token ids.
        limit: new tokens at most.
        context: longest sequence the model can hold; prompts without room for ``limit`` more are
            continued alone, as far as it goes.
        ends: end tokens.
        pad: any token id, to pad with on the left.
        temperature: positive: by which scores are divided before a token is drawn from all; none: the most likely one.
        draws: numbers by which tokens are drawn, a row per prompt, instead of by torch's random state; without ``temperature``.

    Returns:
        New ids without the end token, and whether it came.
    """
    room = [limit if context is None else min(limit, context - len(p)) for p in prompts]
    # Left padding shifts nothing for positions that follow the mask, so only an example's own length bounds it.
    groups = [[i for i in range(len(prompts)) if room[i] == limit]] + [[i] for i in range(len(prompts)) if room[i] < limit]
    out: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    for group in groups:
        if group and room[group[0]] > 0:
            chosen, numbers = [prompts[i] for i in group], None if draws is None else draws.rows(group)
            options: dict[str, Any] = {"limit": room[group[0]], "ends": ends, "pad": pad}
            found = _batch(inner, model, chosen, temperature=temperature, draws=numbers, **options)
            for i, ids in zip(group, found, strict=True):
                out[i] = _cut(ids, ends, room[i])
    return out


def greedy_pairs(
    inner: Any, model: Any, prompts: Sequence[NDArray[np.int32]], *, limit: int, ends: frozenset[int], pad: int, start: int,
    temperature: float | None = None, draws: Draws | None = None,
) -> list[tuple[list[int], bool]]:  # fmt: skip
    """As :func:`continued`, of an encoder-decoder: prompts go to the encoder, the decoder begins with ``start``."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, dtype=np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    mask = np.arange(longest) < np.array([len(p) for p in prompts])[:, None]
    device = next(inner.parameters()).device
    with _settings(inner, limit, ends, pad, decoder_start_token_id=start, **_drawing(temperature)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = model.generate(
            input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
            **({} if draws is None else {"logits_processor": draws.processors(1)}),
        )  # fmt: skip
    return [_cut(row, ends, limit) for row in tokens[:, 1:].tolist()]


def _batch(
    inner: Any, model: Any, prompts: list[NDArray[np.int32]], *, limit: int, ends: frozenset[int], pad: int,
    temperature: float | None, draws: Draws | None,
) -> list[list[int]]:  # fmt: skip
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, dtype=np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    mask = np.arange(longest) >= longest - np.array([len(p) for p in prompts])[:, None]
    device = next(inner.parameters()).device
    with _settings(inner, limit, ends, pad, **_drawing(temperature)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = model.generate(
            input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
            **({} if draws is None else {"logits_processor": draws.processors(longest)}),
        )  # fmt: skip
    found: list[list[int]] = tokens[:, longest:].tolist()
    return found


def _drawing(temperature: float | None) -> dict[str, Any]:
    # top_k 0: transformers would leave out all but the 50 likeliest.
    return {} if temperature is None else {"do_sample": True, "temperature": temperature, "top_k": 0}


@contextmanager
def _settings(inner: Any, limit: int, ends: frozenset[int], pad: int, **more: Any) -> Iterator[None]:
    """Plain greedy search (or what ``more`` says), whatever sampling, penalties or beams the model's own settings ask for."""
    held = inner.generation_config
    plain = {"do_sample": False, "num_beams": 1, "eos_token_id": sorted(ends) or None, "pad_token_id": pad, "use_cache": True}
    inner.generation_config = need("transformers", "Generation").GenerationConfig(max_new_tokens=limit, **{**plain, **more})
    try:
        yield
    finally:
        inner.generation_config = held


def _cut(ids: list[int], ends: frozenset[int], limit: int) -> tuple[list[int], bool]:
    for i, token in enumerate(ids[:limit]):
        if token in ends:
            return ids[:i], True
    return ids[:limit], False
