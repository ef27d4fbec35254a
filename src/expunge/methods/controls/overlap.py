"""How much of a text a model says by heart: memorisation accuracy, extraction likelihood, BLEU and F1 of token sequences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from expunge.adapters.base import Adapter, Example, Targets
from expunge.engine.gradients import fitting

Tokens = Sequence[int]


def shared_ngrams(said: Tokens, true: Tokens, n: int) -> float:
    """Share of the n-grams of ``said`` that occur in ``true``, in [0, 1] (Jang et al. 2022, arXiv 2210.01504, OVERLAP).

    Where ``true`` has less than ``n`` tokens: 1 if it was said exactly, else 0 (as CodeEraser counts short secrets).
    """
    if len(true) < n:
        return float(list(said) == list(true))
    grams, known = _ngrams(said, n), set(_ngrams(true, n))
    return sum(g in known for g in grams) / len(grams) if grams else 0.0


def bleu(said: Tokens, true: Tokens, order: int = 4) -> float:
    """BLEU of one token sequence against one reference, in [0, 1], without smoothing (Papineni et al. 2002).

    ``exp(min(0, 1 - |true| / |said|)) * (prod_n p_n)^(1/N)`` with clipped n-gram precisions ``p_n``. ``N`` is 4, or the length of
    the shorter text if that is less: a name of two tokens has no 4-gram that could be missed.
    """
    order = min(order, len(said), len(true))
    if order < 1:
        return 0.0
    logs = 0.0
    for n in range(1, order + 1):
        counts = Counter(_ngrams(said, n))
        clipped = sum((counts & Counter(_ngrams(true, n))).values())
        if not clipped:
            return 0.0
        logs += math.log(clipped / sum(counts.values()))
    return math.exp(min(0.0, 1 - len(true) / len(said)) + logs / order)


def token_f1(said: Tokens, true: Tokens) -> float:
    """F1 of two bags of tokens, in [0, 1]: BERTScore's F1 if every token were like itself alone."""
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true)) if common else 0.0


def _ngrams(tokens: Tokens, n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def segments(adapter: Adapter, example: Example, targets: Targets) -> list[tuple[int, int]]:
    """The runs of an example's targets that are asked for, as (first, one after the last); an end token belongs to none."""
    length = len(adapter.spoken(example))
    if targets == "all":
        return [(0, length)] if length else []
    marks = adapter.collate([example]).marked.tolist()[:length]
    wanted = [m == (targets == "marked") for m in marks]
    edges = [i for i in range(length + 1) if (i < length and wanted[i]) != (i > 0 and wanted[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@torch.no_grad()
def hits(adapter: Adapter, model: nn.Module, examples: Sequence[Example], max_units: int) -> list[NDArray[np.bool_]]:
    """Whether each target of each example is the model's first choice given what is before it, in order of the examples."""
    device = next(model.parameters()).device
    found: list[NDArray[np.bool_]] = []
    for chosen in fitting(examples, max_units):
        batch = adapter.collate(chosen).to(device)
        right = [
            (logits.argmax(-1) == batch.targets[at : at + len(logits)]).cpu() for at, logits in adapter.logit_blocks(model, batch)
        ]
        flat = torch.cat(right).numpy() if right else np.zeros(0, dtype=np.bool_)
        found += np.split(flat, np.cumsum(batch.counts)[:-1])
    # The batches go from the shortest example to the longest; equal ones keep their order.
    order = sorted(range(len(examples)), key=lambda i: examples[i].units)
    return [right for _, right in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def accuracy(adapter: Adapter, model: nn.Module, examples: Sequence[Example], targets: Targets, max_units: int) -> list[float]:
    """Memorisation accuracy of each example that has such targets: share of them that are the model's first choice, in [0, 1]."""
    out = []
    for example, right in zip(examples, hits(adapter, model, examples, max_units), strict=True):
        parts = [right[a:b] for a, b in segments(adapter, example, targets)]
        if parts:
            out.append(float(np.concatenate(parts).mean()))
    return out


def said(
    adapter: Adapter, model: nn.Module, places: Sequence[tuple[Example, int, int]], max_units: int
) -> list[tuple[list[int], list[int]]]:
    """What the model says at each place, and what is true there: pairs of tokens.

    Args:
        adapter: the modality.
        model: in evaluation mode.
        places: example, first target to be said, one after the last.
        max_units: size of a forward pass.
    """
    resumed = [adapter.resumed(e, a) if a else e for e, a, _ in places]
    order = sorted(range(len(places)), key=lambda i: (places[i][2] - places[i][1], resumed[i].size))
    out: list[tuple[list[int], list[int]]] = [([], [])] * len(places)
    at = 0
    while at < len(order):
        wanted = places[order[at]][2] - places[order[at]][1]
        stop = at + 1
        while (
            stop < len(order)
            and places[order[stop]][2] - places[order[stop]][1] == wanted
            and (stop + 1 - at) * resumed[order[stop]].size <= max_units
        ):
            stop += 1
        chosen = order[at:stop]
        for i, made in zip(chosen, adapter.generate(model, [resumed[i] for i in chosen], wanted), strict=True):
            example, first, last = places[i]
            out[i] = (list(made.tokens[:wanted]), adapter.spoken(example)[first:last])
        at = stop
    return out


def extraction(
    adapter: Adapter,
    model: nn.Module,
    examples: Sequence[Example],
    targets: Targets,
    max_units: int,
    *,
    n: int = 10,
    points: int = 8,
) -> list[float]:
    """Extraction likelihood of each example that has such targets, ``EL_n``, in [0, 1] (Jang et al. 2022, arXiv 2210.01504).

    The mean, over places in the text, of the share of n-grams of the greedy continuation that occur in the true one. The original
    takes every place (as many generations as tokens), the code of ICU the last 50; here ``points`` evenly spaced ones.
    """
    places: list[tuple[Example, int, int]] = []
    owners: list[int] = []
    for number, example in enumerate(examples):
        for first, stop in segments(adapter, example, targets):
            last = max(first, stop - n)
            begins = sorted({round(x) for x in np.linspace(first, last, min(points, last - first + 1))})
            places += [(example, begin, stop) for begin in begins]
            owners += [number] * len(begins)
    values: dict[int, list[float]] = {}
    for number, (words, true) in zip(owners, said(adapter, model, places, max_units), strict=True):
        values.setdefault(number, []).append(shared_ngrams(words, true, n))
    return [sum(v) / len(v) for _, v in sorted(values.items())]
