"""What goes into the linear modules of a model over a data set: second moments, and the directions that they leave free.

One service for closed-form edits and for gradients that must not disturb: a change of a weight ``W [out, in]`` by
``Delta P``, with ``P`` the projector onto the directions in which the inputs of a data set hold nothing (the null space of their
second moment), leaves the module's outputs on that data set as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Batch, Example
from expunge.adapters.passes import evaluating
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.engine.gradients import Tell, fitting

_ROWS = 1024
_HELD = 4  # matrices of the size of one moment that its eigenvectors need in passing


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear module.

    Attributes:
        module: its name.
        size: D, entries of its input.
        transposed: whether the weight is ``[in, out]`` (the Conv1D of GPT-2), not ``[out, in]``.
    """

    module: str
    size: int
    transposed: bool

    def right(self, matrix: Tensor) -> Tensor:
        """A matrix in the weight's own shape as ``[out, in]``, or back: it is its own inverse."""
        return matrix.T if self.transposed else matrix


def linear_weights(model: nn.Module) -> dict[str, LinearWeight]:
    """The weights of all linear modules, by the parameter's name."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        transposed = type(module).__name__ == "Conv1D"
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and (transposed or isinstance(module, nn.Linear)):
            found[f"{name}.weight"] = LinearWeight(name, weight.shape[0 if transposed else 1], transposed)
    return found


@dataclass
class Moment:
    """Sum of ``k k^T`` over the inputs ``k`` of one module, not centred.

    Attributes:
        total: ``[D, D]``, float64 unless asked otherwise.
        count: how many inputs.
    """

    total: Tensor
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Take in inputs ``[M, D]``."""
        for part in torch.split(rows.detach(), _ROWS):  # so that no more than these are held in the type of the sum
            held = part.to(self.total.dtype)
            self.total.addmm_(held.T, held)
        self.count += len(rows)

    def mean(self) -> Tensor:
        """``E k k^T``, ``[D, D]``."""
        return self.total / max(1, self.count)


def flat_rows(batch: Batch, states: Tensor) -> Tensor:
    """What a module sees, or makes, of the real tokens of a batch, ``[M, D]`` in the order of ``batch.token_owner``.

    Args:
        batch: whose forward pass ran over all its tokens.
        states: ``[B, T, D]`` (padded), ``[1, M, D]`` (packed) or ``[B, D]`` (rows).
    """
    if states.ndim == 2:
        return states
    flat, where = states.reshape(-1, states.shape[-1]), cells(batch, states)
    return flat if where is None else flat[where]


def cells(batch: Batch, states: Tensor) -> Tensor | None:
    """Where in ``states``, all but the last dimension made flat, the real tokens stand; none: they are all there is, in order."""
    if states.ndim != 3 or states.shape[:2].numel() == len(batch.token_owner) or "real" not in batch.tensors:
        return None
    return batch.token_owner * states.shape[1] + batch.tensors["real"]


@contextmanager
def watched(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, the mapping that it gives holds what went into each of the named modules last, as it was (:func:`flat_rows`).

    Raises:
        InputError: there is no such module.
    """
    known = dict(model.named_modules())
    missing = [m for m in modules if m not in known]
    if missing:
        raise InputError(f"The model has no module {missing[0]!r}.", f"Some that exist: {', '.join(list(known)[1:6])}.")
    seen: dict[str, Tensor] = {}

    def before(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    handles = [known[name].register_forward_pre_hook(before(name)) for name in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def whole_pass(adapter: Adapter, modules: Sequence[str] = ()) -> frozenset[str]:
    """What to ask of a forward pass so that all tokens run through the blocks (and through the head, if it is watched)."""
    if Offer.FEATURES not in adapter.offers:
        return frozenset({"losses"})
    layers = adapter.layers()
    inside = bool(layers) and all(m.startswith(tuple(f"{layer}." for layer in layers)) for m in modules)
    return frozenset({f"features:{layers[-1]}"} | (set() if inside else {"losses"}))


def check_room(
    sizes: Sequence[int],
    device: torch.device,
    what: str,
    width: int = 8,
    *,
    of: str = "modules",
    remedy: str = "Choose fewer or smaller modules (parameters.layers, parameters.patterns).",
) -> None:
    """Refuse moments and projectors of so many inputs that would not fit into free memory.

    Args:
        sizes: D of each module.
        device: where they are held.
        what: asks for them.
        width: bytes of a number.
        of: what there is a moment for.
        remedy: for the message.

    Raises:
        InputError: they would not fit.
    """
    import psutil

    needed = width * (sum(d * d for d in sizes) + _HELD * max(sizes, default=0) ** 2)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"{what} holds a {max(sizes)} x {max(sizes)} matrix for each of {len(sizes)} {of}: "
            f"{needed / 2**30:.1f} GiB with what their eigenvectors need, and {free / 2**30:.1f} GiB are free.",
            remedy,
        )


def input_moments(
    adapter: Adapter,
    model: nn.Module,
    modules: Sequence[str],
    examples: Sequence[Example],
    *,
    max_units: int,
    limit: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    what: str = "The second moment",
    tell: Tell | None = None,
) -> dict[str, Moment]:
    """Second moments of what goes into linear modules, in one pass over a data set and in evaluation mode.

    Memory is ``8 D^2`` bytes for each module beside a forward pass of ``max_units``, whatever the size of the data set; no input
    is kept.

    Args:
        adapter: the modality.
        model: the adapter's model, or a wrapped one.
        modules: names of linear modules of ``model``.
        examples: the data set; every real token counts, also those of prompts.
        max_units: examples per forward pass.
        limit: examples at most, drawn by ``seed``; none: all.
        dtype: of the sums.
        what: is named in the error if there is no room.
        tell: called after every forward pass.

    Raises:
        InputError: no such module, no room, no examples, or a module through which nothing passed.
    """
    held = _drawn(examples, limit, seed, what)
    device = next(model.parameters()).device
    sizes = {w.module: w.size for w in linear_weights(model).values()}
    strange = [m for m in modules if m not in sizes]
    if strange:
        raise InputError(f"{strange[0]!r} is no linear module of the model.", f"Some that are: {', '.join(list(sizes)[:5])}.")
    check_room([sizes[m] for m in modules], device, what, torch.empty((), dtype=dtype).element_size())
    found = {m: Moment(torch.zeros(sizes[m], sizes[m], dtype=dtype, device=device)) for m in modules}
    want = whole_pass(adapter, modules)
    parts = list(fitting(held, max_units))
    with evaluating(model), torch.no_grad(), watched(model, modules) as seen:
        for done, part in enumerate(parts, start=1):
            batch = adapter.collate(part).to(device)
            seen.clear()
            adapter.forward(model, batch, want)
            for name in list(seen):
                found[name].add(flat_rows(batch, seen.pop(name)))
            if tell is not None:
                tell(done, len(parts))
    idle = [m for m, moment in found.items() if not moment.count]
    if idle:
        raise InputError(f"No input passed through the module {idle[0]!r}.", "Choose modules that the forward pass runs through.")
    return found


def state_moments(
    adapter: Adapter,
    layers: Sequence[str],
    examples: Sequence[Example],
    *,
    width: int,
    max_units: int,
    limit: int | None = None,
    seed: int = 0,
    what: str = "The second moment",
    tell: Tell | None = None,
) -> dict[str, Moment]:
    """Second moments of the states after blocks, in one pass over a data set and in evaluation mode; no state is kept.

    Args:
        adapter: holds the model.
        layers: names of blocks.
        examples: the data set; every real token counts, also those of prompts.
        width: D, entries of a state.
        max_units: examples per forward pass.
        limit: examples at most, drawn by ``seed``; none: all.
        what: is named in the error.
        tell: called after every forward pass.

    Raises:
        InputError: no examples.
    """
    held = _drawn(examples, limit, seed, what)
    device = next(adapter.model.parameters()).device
    found = {n: Moment(torch.zeros(width, width, dtype=torch.float64, device=device)) for n in layers}
    parts = list(fitting(held, max_units))
    with evaluating(adapter.model), torch.no_grad():
        for done, part in enumerate(parts, start=1):
            outputs = adapter.forward(adapter.model, adapter.collate(part).to(device), frozenset(f"features:{n}" for n in layers))
            for name, moment in found.items():
                moment.add(outputs.features(name))
            if tell is not None:
                tell(done, len(parts))
    return found


def _drawn(examples: Sequence[Example], limit: int | None, seed: int, what: str) -> list[Example]:
    if not examples:
        raise InputError(f"{what} needs examples, but there are none.", "Give a retain set.")
    held = list(examples)
    if limit is None or limit >= len(held):
        return held
    order = np.random.default_rng([seed, 41]).permutation(len(held))[:limit]
    return [held[int(i)] for i in sorted(order)]


@dataclass(frozen=True)
class NullSpace:
    """A projector ``P`` onto the directions that a data set leaves free, held as the smaller of both sides.

    Attributes:
        basis: orthonormal columns, ``[D, k]``.
        free: whether the columns span the free directions (``P = B B^T``) or those that are in use (``P = 1 - B B^T``).
        rank: dimension of the free space.
        edge: largest eigenvalue of the mean second moment that counts as free; 0 if none does.
    """

    basis: Tensor
    free: bool
    rank: int
    edge: float

    def narrowed(self) -> NullSpace:
        """The same in float32, half as large."""
        return replace(self, basis=self.basis.float())

    @property
    def size(self) -> int:
        """D."""
        return len(self.basis)

    def project(self, rows: Tensor) -> Tensor:
        """``rows @ P`` for ``[..., D]``, in the type of ``rows``."""
        basis = self.basis.to(rows.device, torch.promote_types(rows.dtype, torch.float32))
        inside = ((rows.to(basis.dtype) @ basis) @ basis.T).to(rows.dtype)
        return inside if self.free else rows - inside


def null_space(
    moment: Tensor,
    *,
    threshold: float | None = None,
    energy: float | None = None,
    what: str = "The data",
    may_be_empty: bool = False,
) -> NullSpace:
    """The (relaxed) null space of a mean second moment.

    Args:
        moment: ``E k k^T``, symmetric, ``[D, D]``.
        threshold: directions whose eigenvalue is at most so large are free (the singular values of the moment).
        energy: or: the weakest directions that together hold at most this share of the trace are free; in [0, 1].
        what: is named in the error.
        may_be_empty: give a projector to 0 if no direction is free.

    Raises:
        InputError: neither or both limits are given, or no direction is free.
    """
    if (threshold is None) == (energy is None):
        raise InputError("A null space is cut at a threshold of eigenvalues or at a share of energy.", "Give one of both.")
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(0.0)
    # Below rounding of the largest eigenvalue nothing can be told from 0.
    floor = float(values[-1]) * len(values) * torch.finfo(moment.dtype).eps
    if threshold is not None:
        rank = int((values <= max(threshold, floor)).sum())
    else:
        limit = max(float(energy or 0.0) * float(values.sum()) * (1 + 1e-9), floor)
        rank = int((values.cumsum(0) <= limit).sum())
    if rank == 0 and not may_be_empty:
        raise InputError(
            f"{what} leaves no direction free: the smallest of {len(values)} eigenvalues is {float(values[0]):.2e}, "
            f"the mean {float(values.mean()):.2e}.",
            "Raise the threshold (or the share of energy), or take fewer examples.",
        )
    edge = float(values[rank - 1]) if rank else 0.0
    few = rank <= len(values) // 2
    return NullSpace((vectors[:, :rank] if few else vectors[:, rank:]).contiguous(), few, rank, edge)
