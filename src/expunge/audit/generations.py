"""One greedy generation per (model, prompt), cached by content; shorter limits and stop strings are views of it. And many
drawn ones, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from expunge.adapters.answers import Generation, Listener, Taken
from expunge.adapters.base import Adapter, Example
from expunge.adapters.generation import Draws
from expunge.adapters.passes import evaluating
from expunge.audit.scores import Progress
from expunge.audit.store import ScoreStore, compute_signature, examples_digest
from expunge.core.files import digest_json


def generate(
    adapter: Adapter,
    examples: Sequence[Example],
    max_new_tokens: int,
    *,
    store: ScoreStore | None = None,
    fingerprint: str | None = None,
    batch_tokens: int = 8192,
    shard_examples: int = 256,
    progress: Progress | None = None,
    what: str = "generating",
) -> list[Generation]:
    """Continue the examples' prompts greedily, or read the continuations from the store.

    Under greedy decoding a shorter generation is a prefix of a longer one. So the limit is no part of the key: what is
    stored is used where it is at least as long as asked for, and replaced by a longer generation where it is not.

    Args:
        adapter: holds the model.
        examples: whose prompts are continued; their targets are ignored.
        max_new_tokens: limit per continuation, the end token not counted.
        store: where generations are kept; None keeps none, and none are kept of a model that may be another one tomorrow.
        fingerprint: the adapter's fingerprint, if it is known already.
        batch_tokens: padded tokens per batch of scoring; a batch of prompts may have four times as many, new ones included.
        shard_examples: examples per file.
        progress: called after each file.
        what: its first argument.

    Returns:
        One generation per example, in order, each of at most ``max_new_tokens`` tokens.
    """
    store = store if adapter.lasting else None
    signature = compute_signature(adapter, batch_tokens)
    identity = fingerprint or (adapter.fingerprint() if store is not None else "")
    out: list[Generation] = []
    for start in range(0, len(examples), shard_examples):
        block = [examples[i] for i in range(start, min(start + shard_examples, len(examples)))]
        key = store.key("generations", identity, signature, examples_digest(adapter, block)) if store is not None else ""
        done = _load(store, key, block, max_new_tokens)
        if done is None:
            done = _generate_block(adapter, block, max_new_tokens, batch_tokens)
            if store is not None:
                store.save_lines(key, [{"limit": max_new_tokens, **_line(g)} for g in done])
        out += [shorten(adapter.decode, g, max_new_tokens) for g in done]
        if progress is not None:
            progress(what, len(out), len(examples))
    return out


def seed_of(*parts: object) -> int:
    """A seed that follows from texts and numbers alone, the same in every process."""
    return int(digest_json([str(p) for p in parts])[:15], 16)


def sampled(
    adapter: Adapter,
    examples: Sequence[Example],
    n: int,
    max_new_tokens: int,
    *,
    temperature: float,
    seed: int,
    store: ScoreStore | None = None,
    fingerprint: str | None = None,
    batch_tokens: int = 8192,
    shard_examples: int = 64,
    progress: Progress | None = None,
    what: str = "sampling",
) -> list[list[Generation]]:
    """Draw ``n`` continuations of each prompt from the whole distribution at a temperature, or read them from the store.

    The numbers that draw a sample follow from the seed, the example's id and the sample's number alone: the same sample comes
    however many others are drawn, and whatever stands beside it in a batch (up to rounding of the scores, which a batch can
    move in their last digits).

    Args:
        adapter: holds the model.
        examples: whose prompts are continued (E).
        n: samples of each.
        max_new_tokens: limit per continuation.
        temperature: positive; 1 is the model's own distribution.
        seed: of the draws.
        store, fingerprint, batch_tokens, progress, what: see :func:`generate`.
        shard_examples: examples per file.

    Returns:
        ``n`` generations per example, in order.
    """
    store = store if adapter.lasting else None
    signature = compute_signature(adapter, batch_tokens)
    identity = fingerprint or (adapter.fingerprint() if store is not None else "")
    out: list[list[Generation]] = []
    for start in range(0, len(examples), shard_examples):
        block = list(examples[start : start + shard_examples])
        options = {"n": n, "limit": max_new_tokens, "temperature": temperature, "seed": seed}
        key = store.key("samples", identity, signature, examples_digest(adapter, block), **options) if store is not None else ""
        rows = [(e, j) for e in block for j in range(n)]
        done = _load(store, key, [e for e, _ in rows], max_new_tokens)
        if done is None:
            done = _sample_block(adapter, rows, max_new_tokens, (temperature, seed), batch_tokens)
            if store is not None:
                store.save_lines(key, [{"limit": max_new_tokens, **_line(g)} for g in done])
        out += [done[i : i + n] for i in range(0, len(done), n)]
        if progress is not None:
            progress(what, len(out), len(examples))
    return out


@torch.no_grad()
def _sample_block(
    adapter: Adapter, rows: Sequence[tuple[Example, int]], limit: int, drawing: tuple[float, int], batch_tokens: int
) -> list[Generation]:
    temperature, seed = drawing
    out: list[Generation | None] = [None] * len(rows)
    with evaluating(adapter.model):
        for chosen in _batches([e for e, _ in rows], limit, 4 * batch_tokens):
            picked = [rows[i] for i in chosen]
            numbers = np.stack([np.random.default_rng(seed_of(seed, e.id, j)).random(limit) for e, j in picked])
            made = adapter.drawn(adapter.model, [e for e, _ in picked], limit, Draws(numbers, temperature))
            for i, generation in zip(chosen, made, strict=True):
                out[i] = generation
    return [g for g in out if g is not None]


def streamed(
    adapter: Adapter, examples: Sequence[Example], listeners: Sequence[Listener], *, batch_tokens: int = 8192
) -> list[Taken]:
    """What clients get of greedy answers that they read as they come; nothing is kept.

    Args:
        adapter: holds the model, and what stands before it.
        examples: whose prompts are answered (E).
        listeners: how each answer is taken (E).
        batch_tokens: see :func:`generate`.

    Returns:
        What has come of each answer, in order.
    """
    out: list[Taken | None] = [None] * len(examples)
    longest = max((how.max_new_tokens for how in listeners), default=1)
    with evaluating(adapter.model):
        for chosen in _batches(examples, longest, 4 * batch_tokens):
            found = adapter.streamed(adapter.model, [examples[i] for i in chosen], [listeners[i] for i in chosen])
            for i, taken in zip(chosen, found, strict=True):
                out[i] = taken
    return [t for t in out if t is not None]


def shorten(decode: Callable[[Sequence[int]], str], generation: Generation, limit: int) -> Generation:
    """What generating with the smaller ``limit`` would have given; ``decode`` writes tokens as text, where some are cut."""
    if len(generation.tokens) <= limit and (not generation.ended or len(generation.tokens) < limit):
        return generation
    tokens = generation.tokens[:limit]
    text = generation.text if len(tokens) == len(generation.tokens) else decode(tokens)
    return replace(generation, tokens=tokens, text=text, ended=generation.ended and len(generation.tokens) < limit)


def cut(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first occurrence of any of ``stops``, white space at both ends removed."""
    found = [at for at in (text.find(s) for s in stops) if at >= 0]
    return text[: min(found)].strip() if found else text.strip()


@torch.no_grad()
def _generate_block(adapter: Adapter, block: Sequence[Example], limit: int, batch_tokens: int) -> list[Generation]:
    out: list[Generation | None] = [None] * len(block)
    with evaluating(adapter.model):
        for chosen in _batches(block, limit, 4 * batch_tokens):
            for i, made in zip(chosen, adapter.generate(adapter.model, [block[i] for i in chosen], limit), strict=True):
                out[i] = made
    return [g for g in out if g is not None]


def _batches(block: Sequence[Example], limit: int, budget: int) -> Iterator[list[int]]:
    """Prompts whose gold answers are about equally long: a batch takes as many steps as its longest answer.

    Padded prompts and ``limit`` new tokens stay under the budget. It is four times that of scoring, for what generation keeps
    of a token (keys and values) is far less than what a forward pass has in flight.
    """
    chosen: list[int] = []
    longest = 0
    for i in sorted(range(len(block)), key=lambda i: (-block[i].n_targets, -block[i].size, i)):
        room = max(longest, block[i].size - block[i].n_targets + limit)
        if chosen and room * (len(chosen) + 1) > budget:
            yield chosen
            chosen, room = [], block[i].size - block[i].n_targets + limit
        chosen, longest = [*chosen, i], room
    if chosen:
        yield chosen


def _line(generation: Generation) -> dict[str, object]:
    held: dict[str, object] = {"id": generation.id, "tokens": list(generation.tokens), "text": generation.text}
    return {**held, "ended": generation.ended, **({"refused": True} if generation.refused else {})}


def _load(store: ScoreStore | None, key: str, block: Sequence[Example], limit: int) -> list[Generation] | None:
    lines = store.load_lines(key) if store is not None else None
    if lines is None or [line.get("id") for line in lines] != [e.id for e in block]:
        return None
    if any(line["limit"] < limit and not line["ended"] for line in lines):
        return None
    return [
        Generation(line["id"], tuple(line["tokens"]), line["text"], line["ended"], line.get("refused", False)) for line in lines
    ]
