"""The last step of a language model, done only where it is needed: logits and losses at the positions that predict a target.

A vocabulary is large, so scores over it are most of the memory, and often of the time, of a training step. Three things
keep them small. Hidden states are gathered before the head, so no score is computed for a prompt or for padding. Where only
the loss is asked for, softmax and loss are computed in place, row block by row block. And where even one such matrix is too
large, its blocks are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

KEEP_BYTES = 192 * 2**20  #: softmax matrices up to this size are kept for the backward pass, larger ones computed again
BLOCK_BYTES = 64 * 2**20  #: size of one block of scores that are not kept; products of few rows with a large head are slow


class _LinearCrossEntropy(torch.autograd.Function):
    """``-log softmax(h W' + b)[target]`` per row; holds one block of scores, or one ``[N, V]`` matrix if that is kept.

    With ``e = exp(scores - max)``, ``s = sum(e)`` and ``D = e - s * onehot(target)``, the gradient of the scores is
    ``D * (g / s)`` for an upstream gradient ``g``. ``D`` does not depend on ``g``, so it can be kept, and the factor is applied
    to the small side of each product: nothing of size ``[N, V]`` is touched again but by the two products themselves.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes by position)
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int, keep: bool
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        kept = hidden.new_empty((len(targets), len(weight))) if keep else None
        losses = hidden.new_empty(len(targets), dtype=exact)
        tops, sums = torch.empty_like(losses), torch.empty_like(losses)
        for a in range(0, len(targets), rows):
            b = min(a + rows, len(targets))
            scores = _scores(hidden[a:b], weight, bias, None if kept is None else kept[a:b])
            tops[a:b] = scores.amax(1)
            losses[a:b] = scores.gather(1, targets[a:b, None]).squeeze(1)
            sums[a:b] = _direction_(scores, targets[a:b], tops[a:b])
            if kept is not None and scores.dtype != kept.dtype:
                # Divided here, because half precision could not hold a sum over a whole vocabulary.
                kept[a:b] = scores.div_(sums[a:b, None])
        losses.neg_().add_(tops).add_(sums.log())
        ctx.rows = rows
        ctx.save_for_backward(hidden, weight, bias, targets, tops, sums, kept)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, bias, targets, tops, sums, kept = ctx.saved_tensors
        upstream = grads[0]
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        # Rows without gradient (the other half of a forget + retain batch, say) cost nothing.
        live = upstream.nonzero().squeeze(1)
        d_hidden = torch.zeros_like(hidden) if want_hidden else None
        d_weight = _Sum(weight) if want_weight else None
        d_bias = _Sum(bias) if want_bias and bias is not None else None
        for at in _portions(live, len(live) if kept is not None else ctx.rows):
            rows, factor = hidden[at], upstream[at][:, None]
            if kept is None:
                block = _scores(rows, weight, bias, None)
                _direction_(block, targets[at], tops[at])
                block = block.div_(sums[at][:, None]).to(weight.dtype)
            else:
                block = kept[at]
                factor = factor if block.dtype != sums.dtype else factor / sums[at][:, None]
            if d_hidden is not None:
                d_hidden[at] = ((block @ weight) * factor).to(hidden.dtype)
            if d_weight is not None:
                d_weight.add(block.t(), (rows * factor).to(block.dtype))
            if d_bias is not None:
                d_bias.add(block.t(), factor.to(block.dtype))
        weights = None if d_weight is None else d_weight.value()
        return d_hidden, weights, None if d_bias is None else d_bias.value(), None, None, None


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``h W' + b`` in at least float32, written to ``out`` if that is its type."""
    if out is not None and out.dtype in (torch.float32, torch.float64):
        return torch.mm(hidden, weight.t(), out=out) if bias is None else torch.addmm(bias, hidden, weight.t(), out=out)
    low = functional.linear(hidden, weight, bias)
    return low.to(torch.promote_types(low.dtype, torch.float32))


def _direction_(scores: Tensor, targets: Tensor, tops: Tensor) -> Tensor:
    """Turn scores into ``D``, in place, and give the sums ``s``."""
    sums = scores.sub_(tops[:, None]).exp_().sum(1)
    scores.scatter_add_(1, targets[:, None], -sums[:, None])
    return sums


def _portions(live: Tensor, size: int) -> Iterator[slice | Tensor]:
    """The rows of ``live`` in portions: as slices if they stand together, which copies nothing."""
    if not len(live):
        return
    first, last = int(live[0]), int(live[-1])
    together = last - first + 1 == len(live)
    for a in range(0, len(live), size):
        yield slice(first + a, min(first + a + size, last + 1)) if together else live[a : a + size]


class _Sum:
    """A sum of products in float32, rounded once at the end to the type of what it is the gradient of."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.total: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right`` (a column for a vector)."""
        exact = torch.promote_types(left.dtype, torch.float32)
        if self.total is None:
            self.total = (left @ right).to(exact)
        elif left.dtype == exact:
            self.total.addmm_(left, right)
        else:
            self.total += left @ right

    def value(self) -> Tensor:
        """The sum, in the shape and type of the parameter."""
        if self.total is None:
            return torch.zeros_like(self.like)
        return self.total.reshape(self.like.shape).to(self.like.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int | None = None,
    keep: bool | None = None,
) -> Tensor:
    """Cross-entropy of a linear head, per row, without a graph over its scores.

    Equal to ``cross_entropy((hidden @ weight.T + bias).float(), targets, reduction="none")`` in value and gradient (once
    differentiable). Gradients of the weight are summed in float32.

    Args:
        hidden: states before the head, ``[N, D]``.
        weight: head, ``[V, D]``, of the same type as ``hidden``.
        targets: classes, int64 ``[N]`` in ``[0, V)``.
        bias: ``[V]`` or none.
        rows: rows per block; none: all, if their scores are kept as they are, else as many as fit into :data:`BLOCK_BYTES`.
        keep: keep the exponentials ``[N, V]`` for the backward pass (faster), or compute them again (smaller); none: keep them
            up to :data:`KEEP_BYTES`.

    Returns:
        Losses ``[N]``, float32 (float64 for float64 input).
    """
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    keep = needed and (targets.numel() * len(weight) * hidden.element_size() <= KEEP_BYTES if keep is None else keep)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    whole = keep and hidden.dtype == exact
    rows = rows or (max(1, targets.numel()) if whole else max(16, BLOCK_BYTES // (len(weight) * exact.itemsize)))
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, rows, keep)  # type: ignore[no-untyped-call]
    return losses


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of distribution and compilation (a peft model stays as it is)."""
    while not hasattr(model, "get_output_embeddings"):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            break
        model = inner
    return model


def base(model: nn.Module) -> nn.Module:
    """The transformers model itself, inside peft too."""
    inner = bare(model)
    get = getattr(inner, "get_base_model", None)
    return get() if callable(get) else inner


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into scores."""
    get = getattr(base(model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def is_plain(head: nn.Module) -> bool:
    """Whether a head is a linear map whose weight may be read directly (not adapted, sharded, offloaded or quantised)."""
    if type(head) is not nn.Linear or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return False
    return type(head.weight) is nn.Parameter and head.weight.device.type != "meta" and head.weight.is_floating_point()


@contextmanager
def replaced_head(head: nn.Module, compute: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Iterator[None]:
    """While open, ``head(states)`` is ``compute(states, head)``: inside the model's own forward pass, so that wrappers which
    watch it (data parallelism, sharding) see the head's weights used where they expect it."""
    own = vars(head).get("forward")
    original = head.forward
    head.forward = lambda states, *_, **__: compute(states, original)
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


class _Take(torch.autograd.Function):
    """``x[index]`` along the first dimension, where no row that matters is taken twice.

    The backward pass is a copy instead of a (slow, on CPU) scattered sum: by ``back`` if it is given, the inverse of ``index``
    for rows whose gradient counts; else to the places in ``index``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, back)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        index, back = ctx.saved_tensors
        if back is not None:
            return grads[0].index_select(0, back), None, None
        return grads[0].new_zeros((ctx.rows, *grads[0].shape[1:])).index_copy_(0, index, grads[0]), None, None


def take(x: Tensor, index: Tensor, back: Tensor | None = None) -> Tensor:
    """``x[index]`` for rows taken once each; ``back`` is the inverse of ``index`` where rows that do not matter repeat."""
    out: Tensor = _Take.apply(x, index, back)  # type: ignore[no-untyped-call]
    return out


def pick(states: Tensor, owner: Tensor, column: Tensor, width: int) -> Tensor:
    """Rows ``[N, D]`` of states ``[B, T, D]`` at (owner, column); virtual tokens put before the ``width`` others shift them."""
    length = states.shape[-2]
    return take(states.reshape(-1, states.shape[-1]), owner * length + column + (length - width))


def linear_losses(head: nn.Linear, rows: Tensor, targets: Tensor) -> Tensor:
    """Fused losses of a plain head, in the type that autocast asks for, if it is on."""
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        rows, weight, bias = rows.to(low), weight.to(low), None if bias is None else bias.to(low)
    elif rows.dtype != weight.dtype:
        rows = rows.to(weight.dtype)
    with torch.autocast(kind, enabled=False):
        return linear_cross_entropy(rows, weight, targets, bias)
