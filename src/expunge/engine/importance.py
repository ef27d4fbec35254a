"""Gradients per row, and the diagonal importance of weights: one routine, one pass over the data.

Gradients per row come from ``vmap(grad(...))`` over a chunk of rows at a time: no loop over rows, and memory for ``chunk x p``
numbers beside the activations, p being the number of weights that may move. Of plain stacks of layers they come from what goes
into and out of each layer, which is faster. The model is in evaluation mode throughout.

A forward pass that decides by values (some libraries look whether a mask is all ones) cannot be vectorised. With ``chunk=1``
rows are taken one at a time without vectorisation, which every model can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from expunge.adapters.passes import evaluating
from expunge.core.errors import InputError
from expunge.core.memory import freed_memory_kept
from expunge.engine.functional import (
    Forward,
    Function,
    RowLoss,
    Tensors,
    check_rows,
    class_loss,
    count_rows,
    each,
    moving,
    open_attention,
    plain,
    squared_loss,
)
from expunge.engine.layer_gradients import is_stack, layer_gradients


class Entangled(InputError):
    """Rows of this model cannot be taken many at a time; one at a time they can."""


Estimator = Literal["batch", "sample"]
Labels = Literal["true", "model", "sampled", "norm"]
Power = Literal["square", "absolute"]
Batches = Iterable[tuple[Any, Tensor | None]]  #: (inputs, targets); targets may be None where labels are not read

_CHUNK_BYTES = 1 << 27  #: of gradients held at once where no chunk is given
_MOST_ROWS = 256
_FEW_ROWS = 128  #: of a stack of layers, whose gradients then stay in the processor's cache


def diagonal_importance(
    model: nn.Module,
    batches: Batches,
    forward: Forward = plain,
    loss: RowLoss = class_loss,
    *,
    estimator: Estimator = "batch",
    labels: Labels = "true",
    power: Power = "square",
    chunk: int | None = None,
    seed: int = 0,
) -> Tensors:
    """How much each weight matters for some rows, by its gradients; one pass over the data.

    ``estimator="batch"``: the mean over batches of ``power(d/dtheta mean over the batch of l)``, as SSD has it (Foster et al.
    2023, arXiv 2308.07707). The value depends on the size of the batches (signal plus 1/size of the noise), so only importances
    from batches of one size may be compared; a smaller last batch counts as one batch. One backward pass per batch.

    ``estimator="sample"``: the mean over rows of ``power(d/dtheta l_i)``; with true labels the empirical Fisher diagonal.

    What l is:

    - ``labels="true"``: the loss on the targets given.
    - ``labels="model"``: the Fisher information, ``mean_i sum_y p(y|x_i) (d/dtheta log p(y|x_i))^2``, p the softmax of the
      outputs (estimator "sample", power "square"). The sum over the C labels equals one over C - 1 directions whose outer
      products add up to ``diag(p) - p p^T``; so it costs one forward and C - 1 backward passes per row, in one pass over the
      data, exactly.
    - ``labels="sampled"``: the loss on one label drawn from p for each row: for "sample" an unbiased estimate of the Fisher
      information that costs one backward pass, whatever C is.
    - ``labels="norm"``: the squared Euclidean norm of the outputs, no label at all; with "batch" and "absolute" that is the
      label-free SSD: ``|d/dtheta mean_b ||f(x_b)||^2|``.

    Args:
        model: its parameters with ``requires_grad`` take part. It is left as it was.
        batches: (inputs, targets) with at least one row each, read once; targets are not touched unless labels are "true".
        forward: how the model is called.
        loss: one loss per row.
        estimator: see above.
        labels: see above.
        power: what is done to each gradient before it is averaged.
        chunk: rows at a time for gradients per row; None: as many as 128 MiB of gradients hold, at most 256; 1: see above.
        seed: of the labels drawn.

    Returns:
        By parameter name, the parameter's shape, float32 (float64 for a float64 model); zero or more.

    Raises:
        InputError: no batch, an empty one or one without targets where they are read; outputs that are no scores of classes where
            labels come from the model; a combination that is not defined.
    """
    _check(estimator, labels, power, loss, chunk)
    weights = moving(model)
    total = {name: torch.zeros_like(w, dtype=_precision(w)) for name, w in weights.items()}
    objective = _norm if labels == "norm" else loss
    change = torch.square if power == "square" else torch.abs
    kept = _Measure(Function(model, forward), weights, labels, chunk or rows_at_once(weights), objective, change)
    draw = torch.Generator().manual_seed(seed)
    count = 0
    with evaluating(model), freed_memory_kept():
        for inputs, targets in batches:
            rows, wanted = kept.targets(inputs, targets, draw)
            add = kept.of_batch if estimator == "batch" else kept.of_rows
            add(inputs, wanted, total)
            count += 1 if estimator == "batch" else rows
    if count == 0:
        raise InputError("There are no batches to compute importances on.", "Give at least one.")
    return {name: value.div_(count) for name, value in total.items()}


@dataclass
class _Measure:
    """The gradients that an importance is made of."""

    function: Function
    weights: Tensors
    labels: Labels
    chunk: int
    loss: RowLoss = class_loss
    power: Callable[[Tensor], Tensor] = torch.square

    def targets(self, inputs: Any, targets: Tensor | None, draw: torch.Generator) -> tuple[int, Tensor]:
        """Number of rows of a batch, and what their losses are computed against."""
        if self.labels == "true":
            if targets is None:
                raise InputError("Importances with true labels need targets.", 'Give them, or choose labels="norm" or "model".')
            return check_rows(inputs, targets), targets
        rows = count_rows(inputs)
        if rows == 0:
            raise InputError("A batch has no rows.", "Leave it out.")
        if self.labels == "sampled":
            with torch.no_grad():
                p = self.function(inputs).double().softmax(-1).cpu()
            if p.ndim != 2:
                raise _no_classes(p)
            first = next(iter(self.weights.values()))
            return rows, torch.multinomial(p, 1, generator=draw).squeeze(1).to(first.device)
        return rows, torch.zeros(rows, device=next(iter(self.weights.values())).device)

    def of_batch(self, inputs: Any, targets: Tensor, total: Tensors) -> None:
        """Add the powers of the gradient of a batch's mean loss."""
        leaves = {name: w.detach().requires_grad_() for name, w in self.weights.items()}
        mean = self.loss(self.function.at(leaves, inputs), targets).mean()
        found = torch.autograd.grad(mean, list(leaves.values()), allow_unused=True)
        for held, gradient in zip(total.values(), found, strict=True):
            if gradient is not None:
                held.add_(self.power(gradient.to(held.dtype)))

    def of_rows(self, inputs: Any, targets: Tensor, total: Tensors) -> None:
        """Add the powers of the gradients of each row's loss (of each label's, weighted, with labels of the model)."""
        if self.labels == "model":
            for block, _ in _chunks(inputs, targets, self.chunk):
                found = _over_rows(self._fisher, self.chunk)(self.weights, block)
                for name, held in total.items():
                    held.add_(found[name].sum(0))
            return
        for found in _gradients(self.function, self.weights, self.loss, inputs, targets, self.chunk):
            for name, held in total.items():
                held.add_(self.power(found[name].to(held.dtype)).sum(0))

    def _fisher(self, weights: Tensors, row: Any) -> Tensors:
        """``sum_y p_y (d log p_y)^2`` of one row, by vector-Jacobian products."""
        single = each(row, lambda t: t.unsqueeze(0))
        scores, pull, *_ = vjp(lambda w: self.function.at(w, single).squeeze(0), weights)
        if scores.ndim != 1 or scores.shape[0] < 2:
            raise _no_classes(scores.unsqueeze(0))
        directions = _fisher_factor(scores.to(_precision(scores)).softmax(0)).to(scores.dtype)
        held: Tensors = {}
        for k in range(scores.shape[0] - 1):
            (found,) = pull(directions[:, k], create_graph=False)
            for name, gradient in found.items():
                square = gradient.to(_precision(gradient)).square()
                held[name] = held[name].add_(square) if name in held else square
            del found, gradient, square  # before the next pass fills the same memory again
        return held


def _fisher_factor(p: Tensor) -> Tensor:
    """Columns L ``[C, C - 1]`` with ``L L^T = diag(p) - p p^T``: the Cholesky factor in closed form.

    Tanabe and Sagae (1992), Journal of the Royal Statistical Society B 54(1). With tails ``q_k = sum_{j > k} p_j``, column k is
    ``sqrt(p_k q_k / q_{k-1})`` on the diagonal and ``-p_i sqrt(p_k / (q_{k-1} q_k))`` below it.
    """
    tails = p.flip(0).cumsum(0).flip(0)  # from k on, summed from the end: no cancellation
    before, after = tails[:-1], tails[1:]
    tiny = torch.finfo(p.dtype).tiny
    diagonal = (p[:-1] * after / before.clamp_min(tiny)).sqrt()
    below = -(p.unsqueeze(1) / after.clamp_min(tiny)) * diagonal
    square = torch.diag(diagonal)
    return torch.tril(below, -1) + torch.cat([square, torch.zeros_like(square[:1])])


def per_example_gradients(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    forward: Forward = plain,
    loss: RowLoss = class_loss,
    *,
    chunk: int | None = None,
) -> Tensors:
    """The gradient of every row's loss: by parameter name ``[rows, *shape]``.

    The result holds ``rows x p`` numbers; where that is too much read :func:`gradient_blocks`.

    Args:
        model: its parameters with ``requires_grad`` take part. It is left as it was.
        inputs: rows.
        targets: ``[rows, ...]``.
        forward: how the model is called.
        loss: one loss per row.
        chunk: rows at a time; None: as many as 128 MiB of gradients hold, at most 256.

    Raises:
        InputError: inputs and targets differ in rows, or there are none.
    """
    held: Tensors = {}
    rows, at = check_rows(inputs, targets), 0
    for found in gradient_blocks(model, inputs, targets, forward, loss, chunk=chunk):
        for name, value in found.items():
            if name not in held:
                held[name] = value.new_empty(rows, *value.shape[1:])
            held[name][at : at + len(value)] = value
        at += len(value)
    return held


def gradient_norms(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    forward: Forward = plain,
    loss: RowLoss = class_loss,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Euclidean norm over all parameters of the gradient of every row's loss, ``[rows]``; arguments and errors as above.

    Memory: ``chunk x p`` numbers.
    """
    found = []
    for block in gradient_blocks(model, inputs, targets, forward, loss, chunk=chunk):
        norms = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in block.values()]
        found.append(torch.linalg.vector_norm(torch.stack(norms), dim=0))
    return torch.cat(found)


def gradient_blocks(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    forward: Forward = plain,
    loss: RowLoss = class_loss,
    *,
    chunk: int | None = None,
) -> Iterator[Tensors]:
    """:func:`per_example_gradients` of ``chunk`` rows at a time, in order."""
    check_rows(inputs, targets)
    weights = moving(model)
    size = chunk or rows_at_once(weights)
    with evaluating(model), freed_memory_kept():
        if size > 1 and is_stack(model):
            few = size if chunk else min(size, _FEW_ROWS)
            yield from (layer_gradients(model, forward, loss, *block) for block in _chunks(inputs, targets, few))
            return
        yield from _gradients(Function(model, forward), weights, loss, inputs, targets, size)


def _gradients(  # noqa: PLR0917
    function: Function, weights: Tensors, loss: RowLoss, inputs: Any, targets: Tensor, size: int
) -> Iterator[Tensors]:
    def of_one(held: Tensors, row: Any, target: Tensor) -> Tensor:
        return loss(function.at(held, each(row, lambda t: t.unsqueeze(0))), target.unsqueeze(0)).sum()

    of_all = _over_rows(grad(of_one), size)
    for block, wanted in _chunks(inputs, targets, size):
        yield of_all(weights, block, wanted)


def _over_rows(of_one: Callable[..., Tensors], size: int) -> Callable[..., Tensors]:
    """A function of (weights, things of one row) as one of (weights, the same of a chunk of rows)."""

    def of_all(weights: Tensors, *rows: Any) -> Tensors:
        if size == 1:
            found = of_one(weights, *(each(r, lambda t: t.squeeze(0)) for r in rows))
            return {name: value.unsqueeze(0) for name, value in found.items()}
        try:
            with open_attention():
                held: Tensors = vmap(of_one, in_dims=(None, *[0] * len(rows)))(weights, *rows)
                return held
        except RuntimeError as error:
            if "data-dependent control flow" not in str(error):
                raise
            raise Entangled(
                "The forward pass of the model decides by the values of its inputs, so rows cannot be taken many at a time.",
                "Give a forward that does not (masks with four axes for transformers), or choose chunk=1: one row at a time.",
            ) from error

    return of_all


def _chunks(inputs: Any, targets: Tensor, size: int) -> Iterator[tuple[Any, Tensor]]:
    for start in range(0, len(targets), size):
        yield each(inputs, lambda t, start=start: t[start : start + size]), targets[start : start + size]  # type: ignore[misc]


def _norm(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten(1).square().sum(1)


def _precision(tensor: Tensor) -> torch.dtype:
    """In which sums of squares are kept: float32, or float64 if the numbers are."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rows_at_once(weights: Tensors) -> int:
    """How many rows may have gradients of their own at once: 128 MiB of them, at least 1, at most 256."""
    size = sum(w.numel() * w.element_size() for w in weights.values())
    return max(1, min(_MOST_ROWS, _CHUNK_BYTES // size))


def _no_classes(scores: Tensor) -> InputError:
    return InputError(
        f"Labels of the model need scores of classes, [rows, at least 2]; the outputs are {list(scores.shape)}.",
        'Choose labels="true" or "norm".',
    )


def _check(estimator: Estimator, labels: Labels, power: Power, loss: RowLoss, chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise InputError(f"The number of rows at a time must be in [1, inf); got {chunk}.")
    if labels == "model" and (estimator != "sample" or power != "square"):
        raise InputError(
            "The Fisher information is a mean over rows of squares.",
            'With labels="model" choose estimator="sample" and power="square"; the square of a mean gradient over B rows with '
            "labels of the model is expected to be the Fisher information divided by B.",
        )
    if labels in ("model", "sampled") and loss is squared_loss:
        raise InputError(
            "Labels of the model are classes, but the loss is that of a regression.", 'Choose labels="true" or "norm".'
        )
