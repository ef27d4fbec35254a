"""Where a LoRA may begin so that it moves what matters to the forget set and not to the retain set.

Fisher-weighted initialisation of low-rank adapters (FILA; Cha et al. 2024, arXiv 2408.06621). The importance of a weight is
``I = F_f / (1e-5 + F_r)``, the diagonal Fisher information of the forget set relative to that of the retain set. The adapter
begins as the best approximation of rank r of the weight matrix W in which row i (an output) counts by ``d_i = sqrt(sum_j I_ij)``,
and is taken out of W, so that the function is as it was and only this part can move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example
from expunge.core.errors import InputError
from expunge.engine.gradients import Tell, batch_importance

DAMPING = 1e-5  #: added to the retain importance, and to the row weights before they divide
_EXACT = 512  #: matrices whose smaller side is at most this get an exact decomposition
_MORE = 8  #: directions beyond the rank that the randomised decomposition looks at
_ROUNDS = 8  #: of its power iteration


def relative_importance(
    adapter: Adapter, forget: Sequence[Example], retain: Sequence[Example], *, batch: int, tell: Tell | None = None
) -> dict[str, Tensor]:
    """``F_f / (1e-5 + F_r)`` of every parameter that may move, by name.

    Each F is the mean, weighted by the number of targets, of the squared gradient of a batch's mean loss: of *batches*, as in the
    authors' code, so its size depends on ``batch``.

    Raises:
        InputError: the gradient of the forget loss is zero everywhere.
    """
    first, second = (
        batch_importance(adapter, examples, batch=batch, weigh="targets", tell=tell) for examples in (forget, retain)
    )
    if not any(bool(value.any()) for value in first.values()):
        raise InputError("The forget loss has no gradient, so nothing tells what matters to it.", "Use parameters=lora.")
    return {name: value.div_(second[name].add_(DAMPING)) for name, value in first.items()}


def factors(weight: Tensor, importance: Tensor, rank: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """The factors ``A`` ``[k, inputs]`` and ``B`` ``[outputs, k]`` of the adapter, with ``k = min(rank, sides of the weight)``.

    With ``diag(d) W ~ U S V'`` they are ``A = sqrt(S / scale) V'`` and ``B = diag(1 / (d + 1e-5)) U sqrt(S / scale)``, so
    ``scale * B A`` is the approximation of W, but for the small number added to d.

    Args:
        weight: W, ``[outputs, inputs]``.
        importance: I, of the same shape, not negative.
        rank: r.
        scale: by which a product of factors is multiplied in the model (alpha / r).
        seed: of the randomised decomposition of large matrices.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rows = importance.to(exact.dtype).sum(1).sqrt()
    u, s, v = _decomposed(rows[:, None] * exact, min(rank, *exact.shape), seed)
    root = (s / scale).sqrt()
    return root[:, None] * v.T, u * root / (rows + DAMPING)[:, None]


def _decomposed(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest ``rank`` singular values and their vectors (columns); of large matrices by a randomised projection."""
    if min(matrix.shape) <= _EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + _MORE, *matrix.shape), niter=_ROUNDS)
    return u[:, :rank], s[:rank], v[:, :rank]


def check_own(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse to take a part out of a weight that something else reads too, or that is quantised."""
    for name, weight in weights.items():
        module = name.removesuffix(".base_layer.weight")
        if not weight.is_floating_point():
            raise InputError(f"The weight of {module!r} is quantised, so no part can be taken out of it.", "Use parameters=lora.")
        others = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight and n != name]
        if others:
            raise InputError(
                f"The weight of {module!r} is that of {others[0].rpartition('.')[0]!r} too, so no part can be taken out of it.",
                "Leave it out of parameters.modules.",
            )


def drawn(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """At most ``limit`` of the examples, by the seed, in a random order."""
    order = np.random.default_rng([seed, 23]).permutation(len(examples))[:limit]
    return [examples[int(i)] for i in order]
