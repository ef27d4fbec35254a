"""Training with differential privacy: Poisson sampling, clipping of each row's gradient, Gaussian noise.

Sampling, clipping, noise and accounting are those of opacus.

Abadi et al. 2016, Deep Learning with Differential Privacy (arXiv 1607.00133). Protected is one unit, a row or all rows of one
subject: the weights of a training with it and of one without it are alike within (epsilon, delta). With subjects as units
(McMahan et al. 2018, arXiv 1710.06963) subjects are drawn, and clipped is the mean gradient of a subject's rows.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import Destroyed, InputError, MissingExtra
from expunge.engine.functional import Forward, RowLoss, Tensors, check_rows, moving
from expunge.engine.importance import Entangled, gradient_blocks, per_example_gradients, rows_at_once

Observe = Callable[[int], None]  #: called with the number of steps done
Trim = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  #: (inputs, targets) -> the same without what is padding in all rows


@dataclass(frozen=True)
class Mechanism:
    """How a private training is done.

    Attributes:
        steps: optimiser steps, at least 1.
        rate: probability with which each unit is in a step, in (0, 1].
        clip: largest norm of a unit's gradient, C.
        noise: standard deviation of the noise on the sum of clipped gradients, as a multiple of the clip.
        lr: step size of SGD on that sum, divided by the expected number of units.
    """

    steps: int
    rate: float
    clip: float
    noise: float
    lr: float


def rate_of(rows: int, batch: int) -> float:
    """The sampling rate for about ``batch`` expected rows of ``rows``: one over a whole number of steps in a pass."""
    return 1.0 / math.ceil(rows / batch)


@functools.lru_cache(maxsize=64)  # a search of seconds, and a plan is made more than once
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


@functools.lru_cache(maxsize=64)
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
    """Refuse models whose layers mix rows, so that a row has no gradient of its own, and weights too coarse for the noise.

    Raises:
        InputError: naming the layer, or the type of the weights.
        MissingExtra: opacus is not installed.
    """
    _opacus()
    from opacus.validators import ModuleValidator

    model.train()
    problems = ModuleValidator.validate(model, strict=False)
    if problems:
        said = str(problems[0]).splitlines()[0].rstrip(".")
        raise InputError(f"The model cannot be trained privately: {said}.", "Use GroupNorm or LayerNorm in place of batch norms.")
    coarse = sorted({str(p.dtype) for p in model.parameters() if p.dtype not in (torch.float32, torch.float64)})
    if coarse:
        raise InputError(f"Noise is lost in weights of type {coarse[0].removeprefix('torch.')}.", "Load the model in float32.")


def check_gradients(model: nn.Module, rows: tuple[Tensor, Tensor], forward: Forward, loss: RowLoss) -> None:
    """Compare the gradients of two rows, taken together, with backward passes of their own: clipping relies on them.

    Args:
        model: is left as it was.
        rows: inputs and targets; of more than two the first are taken.
        forward, loss: as in training.

    Raises:
        InputError: they differ, so the forward pass treats rows together in another way than alone.
    """
    x, y = (t[:2].to(next(model.parameters()).device) for t in rows)
    model.eval()
    both = per_example_gradients(model, x, y, forward, loss, chunk=_together(model, x, y, forward, loss))
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for i in range(len(y)):
        alone = torch.autograd.grad(
            loss(forward(model, x[i : i + 1]), y[i : i + 1]).sum(), list(held.values()), allow_unused=True
        )
        for name, wanted in zip(held, alone, strict=True):
            found = both[name][i]
            off = found if wanted is None else found - wanted
            if float(off.norm()) > 1e-4 + (0.0 if wanted is None else 1e-2 * float(wanted.norm())):
                raise InputError(
                    f"The gradient of a row on {name!r} depends on the rows beside it.", "Use a model that treats rows apart."
                )


def _together(model: nn.Module, x: Tensor, y: Tensor, forward: Forward, loss: RowLoss) -> int | None:
    """How many rows may be taken at a time: 1 of a model whose forward pass decides by values, else what fits (None)."""
    try:
        per_example_gradients(
            model, x[:1].repeat(2, *[1] * (x.ndim - 1)), y[:1].repeat(2, *[1] * (y.ndim - 1)), forward, loss, chunk=2
        )
    except Entangled:
        return 1
    return None


def train_privately(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    mechanism: Mechanism,
    *,
    forward: Forward,
    loss: RowLoss,
    seed: int,
    units: Tensor | None = None,
    trim: Trim | None = None,
    observe: Observe | None = None,
) -> Tensors:
    """Train a model in place; returns its parameters and buffers, in main memory.

    The result follows from the arguments alone; torch's global generator is left as it was. The model is in evaluation mode, so
    its dropout is off. Gradients of units are made, clipped and added up in blocks, so memory does not grow with the batch.

    Args:
        model: with its first weights, on its device.
        inputs: ``[n, ...]``.
        targets: ``[n, ...]``.
        mechanism: sampling, clipping, noise, steps.
        forward: how the model is called.
        loss: one loss per row.
        seed: of the sampling and of the noise. Whoever knows it can take the noise off: it is part of the secret.
        units: the unit that each row belongs to, ``[n]``, counted from 0; none: each row is its own.
        trim: takes padding off the rows of a block.
        observe: called after each step.

    Raises:
        InputError: rows that do not fit.
        Destroyed: the weights became NaN or infinite.
        MissingExtra: opacus is not installed.
    """
    opacus = _opacus()
    rows = check_rows(inputs, targets)
    device = next(model.parameters()).device
    moved = [p for p in model.parameters() if p.requires_grad]
    draw, noise = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed + 1)
    owner = torch.arange(rows) if units is None else units
    each = torch.arange(int(owner.max()) + 1)
    batches = opacus.data_loader.DPDataLoader(torch.utils.data.TensorDataset(each), sample_rate=mechanism.rate, generator=draw)
    together = _together(model, inputs[:1].to(device), targets[:1].to(device), forward, loss)
    work = _Work(model, inputs, targets, owner, forward, loss, trim, together)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its secure mode
        torch.manual_seed(seed)
        optimizer = opacus.optimizers.DPOptimizer(
            torch.optim.SGD(moved, lr=mechanism.lr), noise_multiplier=mechanism.noise, max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.rate * len(each), loss_reduction="mean", generator=noise,
        )  # fmt: skip
        done = 0
        while done < mechanism.steps:
            for (drawn,) in batches:
                work.step(optimizer, drawn)
                done += 1
                if observe is not None:
                    observe(done)
                if done == mechanism.steps:
                    break
    state = {n: t.detach().cpu().clone() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}
    if not all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point()):
        raise Destroyed("The private training ended in NaN or infinite weights.", "Choose a smaller lr, or allow less noise.")
    return state


@dataclass
class _Work:
    """Gradients of units, given to the parameters where opacus' optimiser looks for them.

    Taken by ``vmap`` as everywhere here: opacus hooks modules instead, which fails where an input of one has no axis of rows
    (position embeddings), where a layer is none that it knows (RMSNorm), and where two layers share a weight.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    owner: Tensor
    forward: Forward
    loss: RowLoss
    trim: Trim | None
    chunk: int | None

    def step(self, optimizer: Any, drawn: Tensor) -> None:
        """One step on the units that were drawn; none at all: noise alone."""
        size = rows_at_once(moving(self.model))
        blocks = [drawn[at : at + size].long() for at in range(0, max(1, len(drawn)), size)]
        for i, block in enumerate(blocks):
            optimizer.zero_grad()
            self._give(block)
            optimizer.signal_skip_step(do_skip=i < len(blocks) - 1)
            optimizer.step()

    def _give(self, block: Tensor) -> None:
        found = self._gradients(block) if len(block) else {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                own: Any = parameter
                own.grad_sample = found.get(name, parameter.new_zeros((0, *parameter.shape)))

    def _gradients(self, block: Tensor) -> Tensors:
        """The mean gradient of the rows of each unit, ``[units, *shape]``."""
        place = torch.full((int(self.owner.max()) + 1,), -1)
        place[block] = torch.arange(len(block))
        rows = (place[self.owner] >= 0).nonzero().flatten()
        at = place[self.owner[rows]]
        device = next(self.model.parameters()).device
        order = at.argsort(stable=True)  # rows of their own come in the order in which they were drawn
        x, y = (t[rows[order]] for t in (self.inputs, self.targets))
        x, y = self.trim(x, y) if self.trim is not None else (x, y)
        at = at[order].to(device)
        if len(at) == len(block):  # one row each
            return per_example_gradients(self.model, x.to(device), y.to(device), self.forward, self.loss, chunk=self.chunk)
        share, done = 1 / torch.bincount(at, minlength=len(block)), 0
        total: Tensors = {}
        for found in gradient_blocks(self.model, x.to(device), y.to(device), self.forward, self.loss, chunk=self.chunk):
            of = at[done : done + len(next(iter(found.values())))]
            for name, value in found.items():
                weighed = value * share[of].to(value.dtype).view(-1, *[1] * (value.ndim - 1))
                held = total.setdefault(name, value.new_zeros(len(block), *value.shape[1:]))
                held.index_add_(0, of, weighed)
            done += len(of)
        return total


def _opacus() -> Any:
    try:
        import opacus
        import opacus.data_loader
        import opacus.optimizers
    except ImportError:
        raise MissingExtra("Training with differential privacy", "privacy") from None
    return opacus
