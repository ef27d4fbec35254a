"""The few functions of which most objectives are made: link functions, token weights, edited distributions.

All work on flat tensors (``[N]`` per target, ``[B]`` per example, ``[N, V]`` logits) in log space, so that probabilities of
exactly 0 or 1 give neither NaN nor infinity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.adapters.base import Outputs


def sequence_ratio(current: Outputs, reference: Outputs) -> Tensor:
    """``log p_ref(y|x) - log p_theta(y|x)`` of each example, summed over its targets, ``[B]``; grows as it is forgotten."""
    return current.per_example(current.losses - reference.losses)


def sequence_mean(view: Outputs) -> Tensor:
    """Mean loss per target of each example, ``[B]``; 0 for an example without targets."""
    return view.per_example(view.losses) / view.lengths()


def preference_link(score: Tensor, beta: float) -> Tensor:
    """``-(2/beta) log sigmoid(beta * score)``: falls as ``score`` rises, and flattens out once it is large.

    Its slope is ``-2 sigmoid(-beta * score)``: -1 at score 0 for every beta (hence the factor 2/beta), 0 in the limit.
    """
    return F.logsigmoid(beta * score) * (-2.0 / beta)


def power_weight(losses: Tensor, power: float, complement: float = 0.0) -> Tensor:
    """``p^power * (1 - p)^complement`` with ``p = exp(-loss)``, without gradient; ``0^0`` is 1."""
    losses = losses.detach()
    weight = torch.exp(-power * losses)
    return weight * torch.expm1(-losses).neg().clamp_min(0.0).pow(complement) if complement else weight


def suppress_target(logits: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Class probabilities after the true class's logit is lowered by ``strength`` (may be infinite), without gradient."""
    edited = logits.detach().clone()
    edited[torch.arange(len(targets), device=targets.device), targets] -= strength
    return edited.softmax(-1)


def cross_entropy_to(target: Tensor, logits: Tensor) -> Tensor:
    """``-sum_v q_v log p_v`` of each row, ``[N]``; its gradient with respect to the logits is ``p - q``."""
    return F.cross_entropy(logits, target, reduction="none")


def cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    """``1 - cos`` of each row, in [0, 2], ``[N]``."""
    return 1 - F.cosine_similarity(one, other, dim=1)
