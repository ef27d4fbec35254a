"""Inverse curvature times a vector: what influence functions, Newton steps and WoodFisher need.

Vectors are flat, ``[p]``, in the order of :func:`~expunge.engine.functional.flatten` over the parameters with ``requires_grad``.
Curvature is that of the mean loss over all rows of some batches, in evaluation mode. A product costs one pass over the data and
memory for some vectors of p numbers, never p x p; only :func:`exact_hessian` holds a matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

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
    each,
    flatten,
    moving,
    open_attention,
    plain,
    unflatten,
)
from expunge.engine.importance import gradient_blocks

Product = Callable[[Tensor], Tensor]  #: a symmetric matrix times a vector ``[p]``
Batches = Sequence[tuple[Any, Tensor]]  #: (inputs, targets), read once per product
_OnBatch = Callable[[Tensors, Tensors, Any, Tensor], Tensors]  #: (weights, direction, inputs, targets) -> sum over rows


@dataclass(frozen=True)
class Solution:
    """What :func:`conjugate_gradient` found.

    Args:
        vector: the solution ``[p]``.
        steps: products spent.
        residual: norm of what is left over that of the right side, as the recursion has it.
        converged: whether the residual is within the tolerance.
    """

    vector: Tensor
    steps: int
    residual: float
    converged: bool


def hessian_product(model: nn.Module, batches: Batches, forward: Forward = plain, loss: RowLoss = class_loss) -> Product:
    """The Hessian of the mean loss times a vector, forward over reverse; not positive definite far from a minimum.

    Source: Pearlmutter (1994), Neural Computation 6(1). About four forward passes over the data per product.

    Args:
        model: curvature is taken at its weights as they are at each product.
        batches: (inputs, targets).
        forward: how the model is called.
        loss: one loss per row.

    Raises:
        InputError: there are no batches, or one has no rows.
    """
    function = Function(model, forward)

    def on_batch(weights: Tensors, direction: Tensors, inputs: Any, targets: Tensor) -> Tensors:
        gradient = grad(lambda w: loss(function.at(w, inputs), targets).sum())
        found: Tensors = jvp(gradient, (weights,), (direction,))[1]
        return found

    return _product(model, batches, on_batch)


def gauss_newton_product(model: nn.Module, batches: Batches, forward: Forward = plain, loss: RowLoss = class_loss) -> Product:
    """``J^T H_out J`` times a vector, averaged over rows: J of the outputs, H_out the Hessian of the loss in the outputs.

    It has no negative curvature if the loss is convex in the outputs; for cross-entropy it is the Fisher information, and for
    models that are linear in their weights the Hessian. Source: Schraudolph (2002), Neural Computation 14(7). Arguments and
    errors as :func:`hessian_product`.
    """
    function = Function(model, forward)

    def on_batch(weights: Tensors, direction: Tensors, inputs: Any, targets: Tensor) -> Tensors:
        def outputs_at(w: Tensors) -> Tensor:
            return function.at(w, inputs)

        def loss_at(outputs: Tensor) -> Tensor:
            return loss(outputs, targets).sum()

        outputs, moved, *_ = jvp(outputs_at, (weights,), (direction,))
        curved = jvp(grad(loss_at), (outputs,), (moved,))[1]
        pull: Callable[[Tensor], tuple[Tensors]] = vjp(outputs_at, weights)[1]
        return pull(curved)[0]

    return _product(model, batches, on_batch)


def empirical_fisher_product(
    model: nn.Module, batches: Batches, forward: Forward = plain, loss: RowLoss = class_loss
) -> Product:  # fmt: skip
    """``(1/n) sum_i g_i g_i^T`` times a vector, with g_i the gradient of row i's loss; never any g_i by itself.

    The products ``g_i . v`` of all rows are one forward-mode pass, their weighted sum one backward pass. Arguments and errors as
    :func:`hessian_product`.
    """
    function = Function(model, forward)

    def on_batch(weights: Tensors, direction: Tensors, inputs: Any, targets: Tensor) -> Tensors:
        def losses_at(w: Tensors) -> Tensor:
            return loss(function.at(w, inputs), targets)

        along = jvp(losses_at, (weights,), (direction,))[1]
        pull: Callable[[Tensor], tuple[Tensors]] = vjp(losses_at, weights)[1]
        return pull(along)[0]

    return _product(model, batches, on_batch)


def _product(model: nn.Module, batches: Batches, on_batch: _OnBatch) -> Product:
    rows = sum(check_rows(inputs, targets) for inputs, targets in batches)
    if rows == 0:
        raise InputError("There are no batches to take curvature on.", "Give at least one.")

    def apply(vector: Tensor) -> Tensor:
        weights = moving(model)
        direction = unflatten(vector, weights)
        direction = {name: d.to(weights[name].dtype) for name, d in direction.items()}
        total = torch.zeros_like(vector)
        with evaluating(model), open_attention():
            for inputs, targets in batches:
                total += flatten(on_batch(weights, direction, inputs, targets)).to(total.dtype)
        return total.div_(rows)

    return apply


@freed_memory_kept()
def conjugate_gradient(
    product: Product, vector: Tensor, *, damping: float = 0.0, tolerance: float = 1e-6, steps: int | None = None
) -> Solution:
    """``(A + damping I)^{-1} vector`` by the conjugate gradient method (Hestenes and Stiefel 1952).

    It ends when the residual is at most ``tolerance`` times the norm of ``vector``, or after ``steps`` products; without rounding
    as many are enough as A has distinct eigenvalues.

    Args:
        product: A times a vector; A symmetric.
        vector: ``[p]``; its precision is that of the recursion.
        damping: what is added to every eigenvalue, in [0, inf).
        tolerance: in (0, 1).
        steps: most products; None: p.

    Raises:
        InputError: an argument is out of range, or the damped A has a direction of curvature that is not positive.
    """
    if damping < 0 or not 0 < tolerance < 1 or (steps is not None and steps < 1):
        raise InputError(
            "Conjugate gradients need damping in [0, inf), a tolerance in (0, 1) and steps in [1, inf); "
            f"got {damping}, {tolerance} and {steps}."
        )
    found = torch.zeros_like(vector)
    residual, direction = vector.clone(), vector.clone()
    size = float(residual @ residual)
    enough = tolerance**2 * size
    done = 0
    while size > enough and done < (steps or vector.numel()):
        image = product(direction) + damping * direction
        done += 1
        curvature = float(direction @ image)
        if not curvature > 0:
            ratio = curvature / float(direction @ direction)
            raise InputError(
                f"The matrix is not positive definite: after {done} products a direction has the curvature {ratio:.3g}.",
                f"Choose a damping above {damping - ratio:.3g}, or the Gauss-Newton product.",
            )
        step = size / curvature
        found += step * direction
        residual -= step * image
        last, size = size, float(residual @ residual)
        direction = residual + (size / last) * direction
    start = float(vector @ vector)
    left = (size / start) ** 0.5 if start else 0.0
    return Solution(found, done, left, size <= enough)


def woodbury_solve(gradients: Tensor, vector: Tensor, *, damping: float = 1.0) -> Tensor:
    """``(damping I + (1/N) sum_k g_k g_k^T)^{-1} vector``, exactly, for gradients ``[N, p]``.

    This is the inverse that the recursion ``H_{k+1}^{-1} = H_k^{-1} - H_k^{-1} g g^T H_k^{-1} / (N + g^T H_k^{-1} g)`` of
    WoodFisher (Singh and Alistarh 2020, arXiv 2004.14340) states, with ``H_0 = damping I``. By Woodbury's identity it is
    ``(v - G^T (N damping I + G G^T)^{-1} G v) / damping``: time N^2 p + N^3, memory N^2 beside the gradients. The N x N system is
    solved in float64.

    Raises:
        InputError: shapes do not match, or the damping is not positive.
    """
    if gradients.ndim != 2 or len(gradients) == 0 or gradients.shape[1:] != vector.shape:
        raise InputError(
            f"Gradients must be [N, p] and the vector [p]; got {list(gradients.shape)} and {list(vector.shape)}.",
            "Flatten the gradients per row.",
        )
    if not damping > 0:
        raise InputError(f"The damping of a low-rank matrix must be in (0, inf); got {damping}.")
    count = len(gradients)
    gram = (gradients @ gradients.T).double()
    gram.diagonal().add_(count * damping)
    factor = torch.linalg.cholesky(gram)
    inner = torch.cholesky_solve((gradients @ vector).double().unsqueeze(1), factor).squeeze(1)
    return (vector - gradients.T @ inner.to(vector.dtype)) / damping


def empirical_fisher_solve(
    model: nn.Module,
    batches: Batches,
    vector: Tensor,
    forward: Forward = plain,
    loss: RowLoss = class_loss,
    *,
    damping: float = 1.0,
    memory: int = 1 << 30,
    tolerance: float = 1e-6,
) -> Tensor:
    """``(damping I + F)^{-1} vector`` with F the empirical Fisher matrix of all rows of ``batches``.

    Where the gradients of all rows fit into ``memory`` they are kept and :func:`woodbury_solve` is exact; otherwise
    :func:`conjugate_gradient` on :func:`empirical_fisher_product` needs memory for a few vectors and, but for rounding, at most
    one product more than there are rows (F has no higher rank).

    Args:
        model: gradients are taken at its weights.
        batches: the N rows that stand for the data; 1,000 in the published code.
        vector: ``[p]``.
        forward: how the model is called.
        loss: one loss per row.
        damping: in (0, inf); 1 is the published start of the recursion.
        memory: bytes of gradients that may be kept.
        tolerance: of the conjugate gradients.

    Raises:
        InputError: there are no rows, shapes do not match, the damping is out of range, or conjugate gradients did not get there.
    """
    if not damping > 0:
        raise InputError(f"The damping of a low-rank matrix must be in (0, inf); got {damping}.")
    rows = sum(check_rows(inputs, targets) for inputs, targets in batches)
    if rows * vector.numel() * vector.element_size() <= memory:
        held = vector.new_empty(rows, vector.numel())
        at = 0
        for inputs, targets in batches:
            for block in gradient_blocks(model, inputs, targets, forward, loss):
                found = flatten(block, rows=True)
                held[at : at + len(found)] = found
                at += len(found)
        return woodbury_solve(held, vector, damping=damping)
    product = empirical_fisher_product(model, batches, forward, loss)
    solution = conjugate_gradient(product, vector, damping=damping, tolerance=tolerance, steps=2 * rows + 2)
    if not solution.converged:
        raise InputError(
            f"After {solution.steps} products a part of {solution.residual:.2g} is left; {tolerance:.2g} were asked for.",
            "Choose more damping, a larger tolerance, more memory, or float64 weights.",
        )
    return solution.vector


def published_woodfisher(gradients: Iterable[Tensor], vector: Tensor, *, count: int) -> Tensor:
    """The one-vector recursion of the published code of WoodFisher unlearning; **not** the inverse that its paper states.

    It keeps k (for the vector) and o, which begins as the first gradient and then follows a recursion of its own instead of being
    set to ``H_k^{-1} g_k`` for each gradient: ``k -= (k.g / (N + o.g)) o; o -= (o.g / (N + o.g)) o``. Hence the first gradient
    changes nothing by itself, and the result stays in the span of the vector and the first gradient. It is here to reproduce
    published numbers; :func:`woodbury_solve` is the stated inverse.

    Args:
        gradients: one per row, ``[p]`` each, in order.
        vector: ``[p]``.
        count: N of the formula, at least 1.

    Raises:
        InputError: there is no gradient, or the count is below 1.
    """
    if count < 1:
        raise InputError(f"The count of the recursion must be in [1, inf); got {count}.")
    out, held = vector.clone(), None
    for gradient in gradients:
        if held is None:
            held = gradient.clone()
            continue
        along = held @ gradient
        out -= (out @ gradient) / (count + along) * held
        held -= along / (count + along) * held
    if held is None:
        raise InputError("The recursion needs at least one gradient.")
    return out


def exact_hessian(
    model: nn.Module, batches: Batches, forward: Forward = plain, loss: RowLoss = class_loss, *, most: int = 5000
) -> Tensor:
    """The Hessian of the mean loss over all rows, float64 ``[p, p]``, by products with blocks of unit vectors on a float64 copy.

    Args:
        model: a small one.
        batches: (inputs, targets); floating-point inputs and targets are turned into float64.
        forward: how the model is called.
        loss: one loss per row.
        most: weights that are allowed; a matrix for 5,000 takes 200 MB.

    Raises:
        InputError: the model has more weights than ``most``, or there are no rows.
    """
    exact = copy.deepcopy(model).double()
    weights = moving(exact)
    size = sum(w.numel() for w in weights.values())
    if size > most:
        raise InputError(
            f"The model has {size} weights that may move; an exact Hessian of more than {most} is not computed.",
            "Use conjugate gradients on products with the Hessian, or let fewer weights move.",
        )
    doubled = [(each(inputs, _double), _double(targets)) for inputs, targets in batches]
    rows = sum(check_rows(inputs, targets) for inputs, targets in doubled)
    if rows == 0:
        raise InputError("There are no batches to take curvature on.", "Give at least one.")
    function = Function(exact, forward)
    total = torch.zeros(size, size, dtype=torch.float64)
    units = torch.eye(size, dtype=torch.float64)
    with evaluating(exact), open_attention(), freed_memory_kept():
        for inputs, targets in doubled:
            gradient = grad(lambda w, x=inputs, y=targets: loss(function.at(w, x), y).sum())

            def column(unit: Tensor, gradient: Any = gradient) -> Tensor:
                return flatten(jvp(gradient, (weights,), (unflatten(unit, weights),))[1])

            total += vmap(column, chunk_size=32)(units)
    return (total + total.T).div_(2 * rows)


def hessian_solve(hessian: Tensor, vector: Tensor, *, damping: float = 0.0) -> Tensor:
    """``(H + damping I)^{-1} vector`` by a Cholesky factor, in float64.

    Raises:
        InputError: the damped matrix is not positive definite.
    """
    damped = hessian.double() + damping * torch.eye(len(hessian), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        least = float(torch.linalg.eigvalsh(hessian.double())[0])
        raise InputError(
            f"The Hessian with damping {damping:.3g} is not positive definite; its smallest eigenvalue is {least:.3g}.",
            f"Choose a damping above {max(0.0, -least):.3g}.",
        )
    return torch.cholesky_solve(vector.double().unsqueeze(1), factor).squeeze(1).to(vector.dtype)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
