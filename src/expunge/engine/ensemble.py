"""Many models of one architecture at once: retrained and shadow models, datamodels, shards.

The members are trained in chunks (:func:`~expunge.engine.members.train_members`), here or on the workers of a Ray cluster.
A chunk that is done is a file named by the content that made it, so a run that was killed goes on with the next one, and
another run that asks for the same members finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import vmap

from expunge.adapters.passes import evaluating
from expunge.core.errors import InputError
from expunge.core.files import atomic_path, digest_json
from expunge.engine.functional import Function, Tensors, check_rows, count_rows, digest_tensors, each, leaves, open_attention
from expunge.engine.members import Members, Spec, check, train_members
from expunge.engine.tasks import Workers, spread

Progress = Callable[[int, int], None]  #: (member steps done, member steps in all)

_FORMAT = 1  #: of the files of chunks and of what their keys are made of


@dataclass(frozen=True)
class Ensemble:
    """Trained members.

    Args:
        spec: what they have in common.
        state: parameters and buffers by name, stacked: ``[models, ...]``, in main memory.
        chunk: members per vectorised forward pass.
    """

    spec: Spec
    state: Tensors
    chunk: int = 32

    def __len__(self) -> int:
        return len(next(iter(self.state.values())))

    def member(self, i: int) -> Tensors:
        """The state dict of member ``i``, as views into the stack.

        Raises:
            InputError: there is no such member.
        """
        if not 0 <= i < len(self):
            raise InputError(f"There is no member {i}.", f"Members are counted from 0 to {len(self) - 1}.")
        return {name: value[i] for name, value in self.state.items()}

    def logits(self, inputs: Any, *, rows: int = 1024) -> Tensor:
        """Outputs of every member in evaluation mode, ``[models, n, ...]`` in main memory.

        Args:
            inputs: n rows, as the members were trained on.
            rows: rows per forward pass; memory holds ``chunk x rows`` rows of activations beside the result.
        """
        return self._collect(inputs, rows, lambda outputs, _: outputs)

    def margins(self, inputs: Any, targets: Tensor, *, rows: int = 1024) -> Tensor:
        """:func:`margins` of every member, float64 ``[models, n]``; scores are not kept.

        Raises:
            InputError: inputs and targets differ in rows; see also :func:`margins`.
        """
        check_rows(inputs, targets)
        return self._collect(inputs, rows, lambda outputs, at: margins(outputs, targets[at].cpu().expand(outputs.shape[:2])))

    def losses(self, inputs: Any, targets: Tensor, *, rows: int = 1024) -> Tensor:
        """The loss of every row for every member in evaluation mode, ``[models, n]``.

        Raises:
            InputError: inputs and targets differ in rows.
        """
        check_rows(inputs, targets)

        def compute(outputs: Tensor, at: slice) -> Tensor:
            wanted = targets[at].cpu().expand(len(outputs), *targets[at].shape)
            return self.spec.loss(outputs.flatten(0, 1), wanted.flatten(0, 1)).view(outputs.shape[:2])

        return self._collect(inputs, rows, compute)

    def _collect(self, inputs: Any, rows: int, compute: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """``compute`` over the outputs of blocks ``[chunk, rows, ...]``, put together."""
        total = count_rows(inputs)
        held: Tensor | None = None
        for members, at, outputs in self._blocks(inputs, total, max(1, rows)):
            found = compute(outputs, at)
            if held is None:
                held = found.new_empty(len(self), total, *found.shape[2:])
            held[members, at] = found
        if held is None:
            raise InputError("There are no rows to compute outputs for.", "Give at least one row.")
        return held

    @torch.no_grad()
    def _blocks(self, inputs: Any, total: int, rows: int) -> Iterator[tuple[slice, slice, Tensor]]:
        with torch.random.fork_rng(devices=[]):
            model = self.spec.model().to(self.spec.device)
        forward = vmap(Function(model, self.spec.forward).at, in_dims=(0, None))
        with evaluating(model):
            for first in range(0, len(self), self.chunk):
                members = slice(first, min(first + self.chunk, len(self)))
                state = {name: value[members].to(self.spec.device) for name, value in self.state.items()}
                for start in range(0, total, rows):
                    at = slice(start, min(start + rows, total))
                    block = each(inputs, lambda t, at=at: t[at].to(self.spec.device))  # type: ignore[misc]
                    with open_attention() if self.spec.device == "cpu" else nullcontext():
                        outputs = forward(state, block).cpu()
                    yield members, at, outputs


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit margin ``z_y - log sum_{c != y} exp z_c = log p_y - log(1 - p_y)``, in float64.

    It is computed from logits and not from probabilities, which saturate. It is the statistic of LiRA (Carlini et al. 2022,
    arXiv 2112.03570, section IV) and of datamodels.

    Args:
        logits: ``[..., classes]``, at least two classes.
        targets: ``[...]``, the true classes (int64).

    Raises:
        InputError: there are fewer than two classes, shapes do not match, or a target is no class.
    """
    classes = logits.shape[-1] if logits.ndim else 0
    if classes < 2 or logits.shape[:-1] != targets.shape:
        raise InputError(
            f"Margins need scores [..., classes] of at least two classes and targets [...]; got {list(logits.shape)} and "
            f"{list(targets.shape)}.",
            "For a model with one output per row use its losses.",
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise InputError(f"Targets must be classes in [0, {classes}); found {int(targets.min())} to {int(targets.max())}.")
    scores, index = logits.double(), targets.unsqueeze(-1)
    others = scores.scatter(-1, index, float("-inf")).logsumexp(-1)
    return scores.gather(-1, index).squeeze(-1) - others


def train_ensemble(
    spec: Spec,
    members: Members,
    *,
    chunk: int = 32,
    folder: Path | None = None,
    workers: Workers = "local",
    address: str | None = None,
    progress: Progress | None = None,
) -> Ensemble:
    """Train all members, ``chunk`` at a time.

    Args:
        spec: what they have in common.
        members: their weights over the rows ``[models, n]``, and seeds.
        chunk: members trained at once. Memory grows with it and not with the number of members, the result aside. About 32
            for small perceptrons, 8 to 16 for small convolutional networks and transformers.
        folder: where finished chunks are kept and looked for; None keeps none. The key of a chunk is a hash of the settings, the
            chunk's rows of the weights, seeds and starts, the data, and the untrained model with its losses.
        workers: "local": one chunk after the other in this process; "ray": one task per chunk. A task is
            :func:`~expunge.engine.members.train_members`, which depends on nothing but its arguments.
        address: of a Ray cluster; None joins the one that this process is connected to, or starts one on this machine and ends it
            afterwards. Models and functions of ``spec`` must be importable on the workers, or be defined in the main script.
        progress: called with the member steps done and to do: after each step, with Ray after each chunk.

    Returns:
        The trained members, in the order given.

    Raises:
        InputError: see :func:`~expunge.engine.members.check`; the chunk is below 1.
        MissingExtra: workers are "ray" and ray is not installed.
        Destroyed: the weights of a member became NaN or infinite.
    """
    if chunk < 1:
        raise InputError(f"The number of members trained at once must be in [1, inf); got {chunk}.")
    if address is not None and workers != "ray":
        raise InputError("An address is given, but members are trained in this process.", 'Choose workers="ray".')
    check(spec, members)
    parts = [slice(a, min(a + chunk, len(members))) for a in range(0, len(members), chunk)]
    paths = _paths(folder, spec, members, parts)
    meter = _Meter(spec.training.steps, len(members), progress)
    state: Tensors = {}
    missing = []
    for part, path in zip(parts, paths, strict=True):
        if path is not None and path.is_file():
            _fill(state, len(members), part, load_file(path))
            meter.finished(part)
        else:
            missing.append(part)
    kept = dict(zip(((p.start, p.stop) for p in parts), paths, strict=True))
    work = _with_ray(spec, members, missing, meter, address) if workers == "ray" else _here(spec, members, missing, meter)
    for part, found in work:
        path = kept[part.start, part.stop]
        if path is not None:
            with atomic_path(path) as temporary:
                save_file({name: value.contiguous() for name, value in found.items()}, temporary)
        _fill(state, len(members), part, found)
    return Ensemble(spec, state, chunk)


class _Meter:
    """Adds up member steps."""

    def __init__(self, steps: int, members: int, progress: Progress | None) -> None:
        self.steps, self.total, self.done, self.progress = steps, steps * members, 0, progress

    def finished(self, part: slice) -> None:
        self.step(part, self.steps)
        self.done += (part.stop - part.start) * self.steps

    def step(self, part: slice, step: int) -> None:
        """Steps done by the members of an unfinished part."""
        if self.progress is not None:
            self.progress(self.done + (part.stop - part.start) * step, self.total)


def _here(spec: Spec, members: Members, parts: Sequence[slice], meter: _Meter) -> Iterator[tuple[slice, Tensors]]:
    for part in parts:
        observe = None if meter.progress is None else lambda step, part=part: meter.step(part, step)
        found = train_members(spec, members.part(part.start, part.stop), observe)
        meter.done += (part.stop - part.start) * meter.steps
        yield part, found


def _with_ray(
    spec: Spec, members: Members, parts: Sequence[slice], meter: _Meter, address: str | None
) -> Iterator[tuple[slice, Tensors]]:
    if not parts:  # no cluster need be started
        return
    jobs = (((part.start, part.stop), members.part(part.start, part.stop)) for part in parts)
    for (first, last), found in spread(_task, spec, jobs, workers="ray", address=address):
        part = slice(first, last)
        meter.finished(part)
        yield part, {name: torch.from_numpy(value.copy()) for name, value in found.items()}


def _task(spec: Spec, members: Members) -> dict[str, Any]:
    """What a worker does; arrays of NumPy travel without a copy."""
    return {name: value.numpy() for name, value in train_members(spec, members).items()}


def _fill(state: Tensors, members: int, part: slice, found: Tensors) -> None:
    for name, value in found.items():
        if name not in state:
            state[name] = value.new_empty(members, *value.shape[1:])
        state[name][part] = value


def _paths(folder: Path | None, spec: Spec, members: Members, parts: Sequence[slice]) -> list[Path | None]:
    """The file of each chunk."""
    if folder is None:
        return [None] * len(parts)
    common = [
        _FORMAT,
        spec.training.model_dump(),
        digest_tensors(leaves(spec.inputs)),
        digest_tensors(iter([spec.targets])),
        _signature(spec, members.seeds[0]),
    ]
    return [folder / f"{digest_json([*common, *_distinct(members, part)])}.safetensors" for part in parts]


def _distinct(members: Members, part: slice) -> list[Any]:
    start = sorted(members.start)
    return [
        digest_tensors(row.double() for row in members.weights[part]),
        list(members.seeds[part]),
        start,
        digest_tensors(members.start[name][part] for name in start),
    ]


@torch.no_grad()
def _signature(spec: Spec, seed: int) -> list[Any]:
    """What tells one model and loss from another: layers, fresh weights, and the losses of some rows in three digits.

    The losses are there for what layers and weights do not show, such as another activation in the forward pass.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.model()
    inputs = each(spec.inputs, lambda t: t[:8].cpu())
    with evaluating(model):
        losses = spec.loss(spec.forward(model, inputs), spec.targets[:8].cpu())
    fresh = model.state_dict()
    return [repr(model), sorted(fresh), digest_tensors(fresh[k] for k in sorted(fresh)), [f"{v:.2e}" for v in losses.tolist()]]
