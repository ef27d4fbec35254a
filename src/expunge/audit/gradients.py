"""Gradient norms: the one membership score that needs a backward pass, so it has a budget and its own cache entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example
from expunge.adapters.passes import evaluating
from expunge.audit.scores import Floats, Progress
from expunge.audit.store import ScoreStore, compute_signature, device_of, examples_digest


def gradient_norms(
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    store: ScoreStore | None = None,
    fingerprint: str | None = None,
    progress: Progress | None = None,
    what: str = "gradient norms",
) -> Floats:
    """Euclidean norm of the gradient of each example's mean loss over all parameters, in evaluation mode, one example at a time.

    One norm over all parameters, ``sqrt(sum_p ||g_p||^2)``; some implementations average the norms of the single tensors
    with dropout on, which weighs small tensors like large ones and is random.

    Args:
        adapter: holds the model; parameters that are frozen take part all the same.
        examples: what to differentiate (E).
        store: where norms are kept; None keeps none.
        fingerprint: the adapter's fingerprint, if it is known already.
        progress: called after each example.
        what: its first argument.

    Returns:
        Norms, float64 ``[E]``; NaN for an example without targets.
    """
    if not examples:
        return np.zeros(0)
    key = ""
    if store is not None:
        identity = fingerprint or adapter.fingerprint()
        key = store.key("gradients", identity, compute_signature(adapter, 0), examples_digest(adapter, examples))
        held = store.load_arrays(key)
        if held is not None:
            return held["norm"].astype(np.float64)
    norms = np.full(len(examples), np.nan)
    with evaluating(adapter.model), differentiable(adapter.model):
        for i, example in enumerate(examples):
            if example.n_targets:
                norms[i] = _norm(adapter, example)
            if progress is not None:
                progress(what, i + 1, len(examples))
    if store is not None:
        store.save_arrays(key, {"norm": norms})
    return norms


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """All floating parameters require gradients; put back afterwards, ``.grad`` fields untouched."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@torch.enable_grad()
def _norm(adapter: Adapter, example: Example) -> float:
    model = adapter.model
    batch = adapter.collate([example]).to(device_of(model))
    loss = adapter.forward(model, batch, frozenset({"losses"})).losses.float().mean()
    return gradient_norm(loss, [p for p in model.parameters() if p.requires_grad])


def gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """Euclidean norm over all parameters of the gradient of a scalar loss, ``sqrt(sum_p ||dL/dp||^2)``.

    Args:
        loss: a scalar with its graph.
        parameters: with respect to which it is differentiated; those that it does not reach count 0.
    """
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    squares = [g.float().square().sum(dtype=torch.float64) for g in found if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
