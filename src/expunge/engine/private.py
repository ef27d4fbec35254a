"""Training with differential privacy: Poisson sampling, clipping of each row's gradient, Gaussian noise.

Sampling, clipping, noise and accounting are those of opacus.

Abadi et al. 2016, Deep Learning with Differential Privacy (arXiv 1607.00133). Protected is one row: the weights of a training
with it and of one without it are alike within (epsilon, delta).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import Destroyed, InputError, MissingExtra
from expunge.engine.functional import Forward, RowLoss, Tensors, check_rows
from expunge.engine.importance import per_example_gradients

Observe = Callable[[int], None]  #: called with the number of steps done


@dataclass(frozen=True)
class Mechanism:
    """How a private training is done.

    Attributes:
        steps: optimiser steps, at least 1.
        rate: probability with which each row is in a step, in (0, 1].
        clip: largest norm of a row's gradient, C.
        noise: standard deviation of the noise on the sum of clipped gradients, as a multiple of the clip.
        lr: step size of SGD on that sum, divided by the expected number of rows.
    """

    steps: int
    rate: float
    clip: float
    noise: float
    lr: float


def rate_of(rows: int, batch: int) -> float:
    """The sampling rate for about ``batch`` expected rows of ``rows``: one over a whole number of steps in a pass."""
    return 1.0 / math.ceil(rows / batch)


def noise_for(epsilon: float, delta: float, *, rate: float, steps: int) -> float:
    """The least noise multiplier that meets a budget, by the accountant of Renyi differential privacy (arXiv 1908.10530).

    Args:
        epsilon, delta: of the whole training.
        rate: sampling rate, in (0, 1].
        steps: of the training.

    Raises:
        InputError: no noise that is practical meets it.
        MissingExtra: opacus is not installed.
    """
    _opacus()
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the best order lies at the end of the list costs a looser bound, no validity
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=rate,
                    steps=steps,
                    epsilon_tolerance=min(0.01, epsilon / 20),
                )
            )
    except ValueError:
        raise InputError(
            f"No noise meets epsilon={epsilon:g} at delta={delta:g} in {steps} steps that each read {rate:.3g} of the rows.",
            "Allow a larger epsilon or delta, fewer steps or a smaller batch.",
        ) from None


def spent(mechanism: Mechanism, delta: float) -> float:
    """The epsilon that a training has at a ``delta``, by the same accountant."""
    _opacus()
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(mechanism.noise, mechanism.rate, mechanism.steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=delta))


def of_group(epsilon: float, delta: float, rows: int) -> tuple[float, float]:
    """What (epsilon, delta) for one row means for so many together: ``(k e, d (e^{k e} - 1) / (e^e - 1))``, delta at most 1.

    Vadhan 2017, The Complexity of Differential Privacy, lemma 2.2 (with the geometric sum written out).
    """
    if rows * epsilon > 500:
        return rows * epsilon, 1.0
    ratio = math.expm1(rows * epsilon) / math.expm1(epsilon) if epsilon else float(rows)
    return rows * epsilon, min(1.0, delta * ratio)


def check_private(model: nn.Module) -> None:
    """Refuse models whose layers mix rows, so that a row has no gradient of its own.

    Raises:
        InputError: naming the layer.
        MissingExtra: opacus is not installed.
    """
    _opacus()
    from opacus.validators import ModuleValidator

    model.train()
    problems = ModuleValidator.validate(model, strict=False)
    if problems:
        said = str(problems[0]).splitlines()[0].rstrip(".")
        raise InputError(f"The model cannot be trained privately: {said}.", "Use GroupNorm or LayerNorm in place of batch norms.")


def train_privately(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    mechanism: Mechanism,
    *,
    forward: Forward,
    loss: RowLoss,
    seed: int,
    observe: Observe | None = None,
) -> Tensors:
    """Train a model in place; returns its parameters and buffers, in main memory.

    The result follows from the arguments alone; torch's global generator is left as it was. The model is in evaluation mode, so
    its dropout is off.

    Args:
        model: with its first weights, on its device.
        inputs: ``[n, ...]``.
        targets: ``[n]``.
        mechanism: sampling, clipping, noise, steps.
        forward: how the model is called.
        loss: one loss per row.
        seed: of the sampling and of the noise. Whoever knows it can take the noise off: it is part of the secret.
        observe: called after each step.

    Raises:
        InputError: rows that do not fit.
        Destroyed: the weights became NaN or infinite.
        MissingExtra: opacus is not installed.
    """
    opacus = _opacus()
    rows = check_rows(inputs, targets)
    device = next(model.parameters()).device
    moving = [p for p in model.parameters() if p.requires_grad]
    draw, noise = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed + 1)
    batches = opacus.data_loader.DPDataLoader(
        torch.utils.data.TensorDataset(inputs, targets), sample_rate=mechanism.rate, generator=draw
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its secure mode
        torch.manual_seed(seed)
        optimizer = opacus.optimizers.DPOptimizer(
            torch.optim.SGD(moving, lr=mechanism.lr), noise_multiplier=mechanism.noise, max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.rate * rows, loss_reduction="mean", generator=noise,
        )  # fmt: skip
        done = 0
        while done < mechanism.steps:
            for x, y in batches:
                optimizer.zero_grad()
                _gradients(model, (x.to(device), y.to(device)), forward, loss)
                optimizer.step()
                done += 1
                if observe is not None:
                    observe(done)
                if done == mechanism.steps:
                    break
    state = {n: t.detach().cpu().clone() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}
    if not all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point()):
        raise Destroyed("The private training ended in NaN or infinite weights.", "Choose a smaller lr, or allow less noise.")
    return state


def _gradients(model: nn.Module, batch: tuple[Tensor, Tensor], forward: Forward, loss: RowLoss) -> None:
    """Give every parameter the gradients of the rows that were drawn, where the optimiser looks for them.

    Taken by ``vmap`` as everywhere here: opacus hooks modules instead, which fails where an input of one has no axis of rows
    (position embeddings).
    """
    x, y = batch
    found = per_example_gradients(model, x, y, forward, loss) if len(y) else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own: Any = parameter
            own.grad_sample = found.get(name, parameter.new_zeros((0, *parameter.shape)))  # nobody drawn: noise alone


def _opacus() -> Any:
    try:
        import opacus
        import opacus.data_loader
        import opacus.optimizers
    except ImportError:
        raise MissingExtra("Training with differential privacy", "privacy") from None
    return opacus
