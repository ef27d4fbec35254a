"""Training some members of an ensemble at once, as one function of its arguments, so that it may run anywhere.

The members have one architecture. Their weights are stacked on a leading axis, the forward pass is vectorised over that axis
(``torch.func.vmap`` of a ``functional_call``), and the losses of all members are added up: member m's loss depends on member
m's weights alone, so the gradient of the sum holds every member's own. Optimisers work element by element, so one of torch's
own over the stacked tensors is as many optimisers as there are members.

Which rows a member is trained on is a row of weights, ``loss_m = sum_b W[m, i_b] l_b / sum_b W[m, i_b]`` over the rows i_b of a
batch: the weighted subsets of Feldman and Zhang (arXiv 2008.03703) and of datamodels (arXiv 2202.00622), in one pass for all.
With streams of their own, a member is the model that would be trained on its rows of positive weight alone, in the same order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

from expunge.core.errors import Destroyed, InputError
from expunge.core.memory import freed_memory_kept
from expunge.core.settings import Settings
from expunge.data.order import BatchPlan
from expunge.engine.functional import (
    Forward,
    Function,
    RowLoss,
    Tensors,
    check_rows,
    class_loss,
    each,
    leaves,
    open_attention,
    plain,
)

Observe = Callable[[int], None]  #: called with the number of steps done
Watch = Callable[[int, Tensor, Tensors], None]  #: (steps done, rows of the last one, stacked parameters as they are now)


class Training(Settings):
    """How every member is trained."""

    name: ClassVar[str] = "ensemble"

    steps: int = Field(ge=1, description="optimiser steps")
    batch: int = Field(ge=1, description="rows per step; the last batch of a pass over a shared stream may be smaller")
    lr: float = Field(gt=0, description="step size at the beginning")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course of the step size, to 0 unless constant"
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="adamw: Adam with decoupled weight decay")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of all parameters")
    clip: float | None = Field(None, gt=0, description="largest norm of each member's gradient; none: no limit")
    restriction: float = Field(
        0.0,
        ge=0,
        description="how much the size of the gradient adds to the loss, tensor by tensor (gradient restriction; iau: 0.005)",
    )
    stream: Literal["shared", "own"] = Field(
        "shared",
        description="shared: one order of all rows for all members, who differ by their weights; "
        "own: every member draws from its rows of positive weight, in an order of its own",
    )
    seed: int = Field(0, ge=0, description="seed of the order of the rows")

    @model_validator(mode="after")
    def _momentum_is_read(self) -> Training:
        if self.momentum and self.optimizer != "sgd":
            raise InputError(f"Momentum is a parameter of sgd, not of {self.optimizer}.", "Choose optimizer=sgd or leave it out.")
        return self


@dataclass(frozen=True)
class Spec:
    """What the members of an ensemble have in common.

    Args:
        model: makes a module with fresh random weights from torch's global generator. For workers in other processes it must be
            picklable, as the two functions below must be.
        inputs: rows of the data: tensors with n entries on the first axis.
        targets: ``[n, ...]``.
        training: how they are trained.
        loss: (outputs, targets) -> one loss per row.
        forward: how the model is called.
        device: where members are trained; results come back to main memory.
    """

    model: Callable[[], nn.Module]
    inputs: Any
    targets: Tensor
    training: Training
    loss: RowLoss = class_loss
    forward: Forward = plain
    device: str = "cpu"


@dataclass(frozen=True)
class Members:
    """What distinguishes the members.

    Args:
        weights: ``[models, n]``, not negative, of any real type or boolean: the weight of each row in each member's loss.
        seeds: one per member: of its initial weights and, with ``stream="own"``, of its order of rows.
        start: weights to begin from instead of fresh ones, stacked ``[models, ...]`` by name, as
            :attr:`~expunge.engine.ensemble.Ensemble.state` holds them; names left out begin fresh.
    """

    weights: Tensor
    seeds: Sequence[int]
    start: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, first: int, last: int) -> Members:
        """Members ``first`` to ``last - 1``, as copies that hold on to no more than themselves."""
        start = {name: value[first:last].clone() for name, value in self.start.items()}
        return Members(self.weights[first:last].clone(), tuple(self.seeds[first:last]), start)


def train_members(spec: Spec, members: Members, observe: Observe | None = None, watch: Watch | None = None) -> Tensors:
    """Train the members, all at once.

    The result depends on nothing but the first two arguments (and the arithmetic of the machine): the global random generators
    are left as they were. Without dropout, which members are trained together does not matter either, up to rounding; dropout
    draws different masks for each member from one generator that is seeded by the seeds of all.

    A step in whose batch all rows of a member weigh nothing has the gradient zero for it; momentum and weight decay go on.
    Memory: about four times the stacked weights with Adam, and the activations of ``members x batch`` rows.

    Args:
        spec: what they have in common.
        members: what distinguishes them.
        observe: called after each step.
        watch: called after each step too, to look at the parameters: on the device, and not to be changed or kept.

    Returns:
        Stacked parameters and buffers, ``[models, ...]`` by name, in main memory.

    Raises:
        InputError: see :func:`check`.
        Destroyed: the weights of a member became NaN or infinite.
    """
    check(spec, members)

    def after(step: int, rows: Tensor, now: Tensors) -> None:
        if watch is not None:
            watch(step, rows, now)
        if observe is not None:
            observe(step)

    devices = [torch.device(spec.device)] if spec.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), freed_memory_kept():
        model, parameters, buffers = _begin(spec, members)
        torch.manual_seed(_seed("dropout", spec.training.seed, *members.seeds))
        _descend(spec, members, Function(model, spec.forward), (parameters, buffers), after)
    state = {name: value.detach().cpu() for name, value in {**parameters, **buffers}.items()}
    for seed, fine in zip(members.seeds, _finite(state, len(members)).tolist(), strict=True):
        if not fine:
            raise Destroyed(
                f"The weights of the member with seed {seed} became NaN or infinite.", "Choose a smaller lr or a clip."
            )
    return state


def check(spec: Spec, members: Members) -> None:
    """Check that the members can be trained, before anything is.

    Raises:
        InputError: shapes do not match, weights are negative, not finite or all zero for a member, seeds are negative, inputs
            hold NaN or infinity, or a normalisation layer of the model mixes rows that the weights mean to keep apart.
    """
    rows = check_rows(spec.inputs, spec.targets)
    weights = members.weights
    if weights.ndim != 2 or weights.shape != (len(members), rows) or not len(members):
        raise InputError(
            f"The weights of {len(members)} members over {rows} rows must have the shape [{len(members)}, {rows}]; "
            f"got {list(weights.shape)}.",
            "Give one row of weights and one seed per member, and at least one member.",
        )
    if weights.dtype != torch.bool and not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise InputError("Weights of rows must be finite and not negative.", "Give 0 to leave a row out.")
    if empty := (~weights.any(dim=1)).nonzero().flatten().tolist():
        raise InputError(f"Member {empty[0]} has the weight 0 on every row.", "Leave at least one row to learn from.")
    if any(seed < 0 for seed in members.seeds):
        raise InputError(f"Seeds of members must be in [0, inf); got {min(members.seeds)}.")
    for tensor in leaves(spec.inputs):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor).reshape(rows, -1).all(dim=1)).nonzero()[0])
            raise InputError(f"Row {bad} of the inputs holds NaN or infinity.", "Repair the row, or leave it out of the inputs.")
    with torch.random.fork_rng(devices=[]):
        model = spec.model()
    _check_start(model, members)
    uneven = bool((weights != weights[:, :1]).any())
    for name, module in model.named_modules():
        _check_normalisation(name, module, apart=uneven and spec.training.stream == "shared")


def _check_start(model: nn.Module, members: Members) -> None:
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in members.start.items():
        expected = (len(members), *known[name].shape) if name in known else None
        if expected is None or tuple(value.shape) != expected:
            wanted = f"shape {list(expected)}" if expected else "no such name"
            raise InputError(f"The start {name!r} has shape {list(value.shape)}; the model has {wanted}.", "Stack states of it.")


def _check_normalisation(name: str, module: nn.Module, *, apart: bool) -> None:
    batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
    tracked = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    kind = type(module).__name__
    if tracked:
        raise InputError(
            f"The layer {name!r} ({kind}) tracks running statistics, which are written during a forward pass and hold rows of "
            "weight 0 too.",
            "Use GroupNorm, or track_running_stats=False.",
        )
    if batch and apart:
        raise InputError(
            f"The layer {name!r} ({kind}) normalises over the rows of a batch, so rows of weight 0 would still be learnt from.",
            'Use GroupNorm or LayerNorm, or stream="own", where a batch holds only rows of positive weight.',
        )


def _begin(spec: Spec, members: Members) -> tuple[nn.Module, Tensors, Tensors]:
    """A model in training mode, and the stacked parameters and buffers at the start, on the device."""
    models = []
    for seed in members.seeds:
        torch.manual_seed(seed)
        models.append(spec.model())
    frozen = {name for name, p in models[0].named_parameters() if not p.requires_grad}
    parameters, buffers = stack_module_state(models)
    held: Tensors = {**{n: p.detach() for n, p in parameters.items()}, **buffers}
    for name, value in members.start.items():
        held[name] = value.to(held[name].dtype)
    # A copy even where the start already lies on the device: it is written to.
    held = {name: value.to(spec.device, copy=True).contiguous() for name, value in held.items()}
    stacked = {name: held[name].requires_grad_() for name in parameters if name not in frozen}
    if not stacked:
        raise InputError("The model has no parameter that may move.", "Set requires_grad of those that should.")
    return models[0].to(spec.device).train(), stacked, {name: held[name] for name in held if name not in stacked}


def _descend(spec: Spec, members: Members, function: Function, state: tuple[Tensors, Tensors], after: Watch) -> None:
    (parameters, buffers), training = state, spec.training
    own = training.stream == "own"
    forward = vmap(function.at, in_dims=(0, 0 if own else None), randomness="different")
    tensors = list(parameters.values())
    optimizer = _optimizer(training, tensors)
    for step, index in enumerate(batches(training, members)):
        inputs = each(spec.inputs, lambda rows, index=index: rows[index].to(spec.device))  # type: ignore[misc]
        targets = spec.targets[index].to(spec.device)
        weights = members.weights.gather(1, index) if own else members.weights[:, index]
        with open_attention() if spec.device == "cpu" else nullcontext():
            outputs = forward({**parameters, **buffers}, inputs)
        if not own:
            targets = targets.expand(len(members), *targets.shape)
        losses = spec.loss(outputs.flatten(0, 1), targets.flatten(0, 1)).view(len(members), -1)
        weights = weights.to(spec.device, losses.dtype)
        total = weights.sum(1)
        loss = ((losses * weights).sum(1) / total.where(total > 0, 1.0)).sum()
        if training.restriction:
            loss = loss + training.restriction * _gradient_sizes(loss, tensors)
        for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
            # The fused optimisers read weights and gradients in memory order, whatever their strides are.
            tensor.grad = None if gradient is None else gradient.contiguous()
        if training.clip is not None:
            _clip(tensors, training.clip)
        for group in optimizer.param_groups:
            group["lr"] = training.lr * course(training, step)
        optimizer.step()
        after(step + 1, index, parameters)


def batches(training: Training, members: Members) -> Iterator[Tensor]:
    """Row numbers of each step: ``[batch]`` for all, or ``[models, batch]`` with streams of their own."""
    size, steps = training.batch, training.steps
    if training.stream == "shared":
        shared = BatchPlan({"rows": members.weights.shape[1]}, {"rows": size}, seed=training.seed, steps=steps)
        yield from (torch.tensor(plan["rows"]) for plan in shared)
        return
    supports = [row.nonzero().flatten() for row in members.weights]
    # The step is the anchor, so that the stream of rows cycles and all batches have the same size.
    plans = [
        BatchPlan({"step": 1, "rows": len(rows)}, {"step": 1, "rows": size}, seed=_seed("rows", training.seed, seed), steps=steps)
        for rows, seed in zip(supports, members.seeds, strict=True)
    ]
    for step in range(steps):
        yield torch.stack([rows[plan.plan(step)["rows"]] for rows, plan in zip(supports, plans, strict=True)])


def visits(training: Training, rows: int) -> int:
    """How many rows a member's training reads, each as often as it is read: the cost that no machine changes.

    Args:
        training: steps, batch and stream.
        rows: how many rows there are to read, at least 1.
    """
    if training.stream == "own":
        return training.steps * training.batch
    passes, rest = divmod(training.steps, -(-rows // training.batch))
    return passes * rows + min(rest * training.batch, rows)


def _optimizer(training: Training, tensors: list[Tensor]) -> torch.optim.Optimizer:
    fused = tensors[0].device.type in ("cpu", "cuda")
    if training.optimizer == "sgd":
        momentum, decay = training.momentum, training.weight_decay
        return torch.optim.SGD(tensors, lr=training.lr, momentum=momentum, weight_decay=decay, fused=fused)
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return kind(tensors, lr=training.lr, weight_decay=training.weight_decay, fused=fused)


def _gradient_sizes(loss: Tensor, tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each member's gradient on each tensor, added up over tensors and members; differentiable.

    ``sum over tensors ||d CE(batch) / d theta||_2``, as the published code of IAU has it (the paper writes one norm, of the
    gradient of a row).
    """
    found = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    tiny = torch.finfo(loss.dtype).tiny  # the slope of a root at 0 is infinite
    return torch.stack([(g.flatten(1).square().sum(1) + tiny).sqrt().sum() for g in found if g is not None]).sum()


def _clip(tensors: list[Tensor], limit: float) -> None:
    """Scale down the gradient of each member whose norm over all its parameters exceeds ``limit``."""
    gradients = [t.grad for t in tensors if t.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients])
    scale = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp_max(1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))


def course(training: Training, step: int) -> float:
    """Factor of the step size at a step counted from 0; linear and cosine would reach 0 one step after the last."""
    done = step / training.steps
    if training.decay == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if training.decay == "cosine" else 1.0


def _seed(*parts: object) -> int:
    """A seed in [0, 2^63) from a tuple of words and numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _finite(state: Tensors, members: int) -> Tensor:
    """Whether all weights of each member are finite, ``[models]``."""
    fine = torch.ones(members, dtype=torch.bool)
    for value in state.values():
        if value.is_floating_point():
            fine &= torch.isfinite(value).reshape(members, -1).all(dim=1)
    return fine
