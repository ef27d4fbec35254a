"""What a prepared method trains, and on what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.rows import Indices, Table
from expunge.engine.functional import Forward, RowLoss, Tensors, class_loss, digest_tensors, squared_loss
from expunge.engine.members import Members, Spec, Training, train_members, visits


def scores(model: nn.Module, inputs: Any) -> Tensor:
    """The outputs ``[rows, ...]`` of any torch module called with one tensor, or of a transformers classifier of it."""
    name = getattr(model, "main_input_name", None) if hasattr(model, "config") else None
    out = model(**{name: inputs}) if name else model(inputs)
    found: Tensor = out if isinstance(out, Tensor) else out["logits"]
    return found


@dataclass(frozen=True)
class Source:
    """What is trained, and on what. A later deletion is given the same, except that deleted rows may be gone from the table.

    Args:
        table: rows with stable ids.
        build: makes a module with fresh random weights from torch's global generator. For workers in other processes it must be
            picklable, as the two functions below must be.
        training: how it is trained; a method says what it counts as one training.
        forward: how the model is called.
        loss: (outputs, targets) -> one loss per row; none: cross-entropy for classes, squared error for numbers.
        device: where it is trained.
    """

    table: Table
    build: Callable[[], Any] | None = None
    training: Training | None = None
    forward: Forward = scores
    loss: RowLoss | None = None
    device: str = "cpu"

    @property
    def model(self) -> Callable[[], nn.Module]:
        """The builder.

        Raises:
            InputError: there is none.
        """
        if self.build is None:
            raise InputError("Nothing says which model is trained.", "Give a function that makes it with fresh weights.")
        return self.build

    @property
    def plan(self) -> Training:
        """How the model is trained.

        Raises:
            InputError: nothing says it.
        """
        if self.training is None:
            raise InputError("Nothing says how the model is trained.", "Give steps, batch and lr.")
        return self.training

    def part(self, stages: int, stage: int, seed: int, *, growing: bool) -> Any:
        """A stage's part of the training: ``growing`` stages get steps in proportion to their number, others equally many.

        What it is, a :class:`~expunge.engine.members.Training` here, only :meth:`visits` and :meth:`learn` need to know.

        Raises:
            InputError: there are too few steps for all stages.
        """
        whole = self.plan
        least = stages * (stages + 1) // 2 if growing else stages
        if whole.steps < least:
            raise InputError(f"{whole.steps} steps are too few for {stages} slices.", f"Give {least} steps or fewer slices.")
        done = [r * (r + 1) / (stages * (stages + 1)) if growing else r / stages for r in (stage, stage + 1)]
        first, last = (round(whole.steps * share) for share in done)
        return whole.model_copy(update={"steps": last - first, "seed": seed})

    @property
    def rate(self) -> float:
        """Step size of the training, for trainings beside it.

        Raises:
            InputError: nothing says it.
        """
        return self.plan.lr

    def described(self) -> dict[str, Any] | None:
        """What the training depends on, as JSON: what a folder must have been made with."""
        return None if self.training is None else self.training.model_dump(mode="json")

    def shortened(self, share: float) -> Any:
        """A share (in (0, 1]) of the training, for :meth:`visits` and :meth:`learn`.

        Raises:
            InputError: nothing says how the model is trained.
        """
        whole = self.plan
        return whole.model_copy(update={"steps": max(1, round(share * whole.steps))})

    def warm(self) -> None:
        """Load what learning needs: the first optimiser that a process makes imports torch's compiler, which takes seconds."""
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

    def visits(self, part: Any, rows: int) -> int:
        """Rows read, each as often as it is, in a part of the training on so many rows."""
        return visits(part, rows) if rows else 0

    def learn(self, inputs: Tensor, targets: Tensor, part: Any, seed: int, start: Tensors) -> Tensors:
        """State of a model after a part of the training, from ``start``, or fresh from ``seed`` where it names nothing."""
        spec = Spec(self.model, inputs, targets, part, self.row_loss, self.forward, self.device)
        members = Members(torch.ones(1, len(targets)), (seed,), {name: value.unsqueeze(0) for name, value in start.items()})
        return {name: value[0] for name, value in train_members(spec, members).items()}

    @property
    def row_loss(self) -> RowLoss:
        """The loss of each row."""
        return self.loss or (class_loss if self.table.task == "classification" else squared_loss)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Place of each id in the table."""
        return {name: i for i, name in enumerate(self.table.ids)}

    def at(self, ids: Sequence[str]) -> Indices:
        """Places of some ids in the table.

        Raises:
            InputError: one is not in the table.
        """
        for name in ids:
            if name not in self.positions:
                raise InputError(f"The row {name!r} was trained on and is not in the data.", "Give the data of the training.")
        return np.array([self.positions[name] for name in ids], dtype=np.int64)

    def rows(self, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Inputs ``[k, ...]`` and targets ``[k]`` of some ids, in that order."""
        at = self.at(ids)
        return torch.from_numpy(self.table.inputs[at]), torch.from_numpy(self.table.targets[at])

    def subjects(self, ids: Sequence[str]) -> list[str]:
        """The subject of each of some rows; where the data name none, the row itself."""
        names = self.table.subjects
        return [(names[i] if names else "") or self.table.ids[i] for i in self.at(ids).tolist()]

    def trimmed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows without what is padding in all of them."""
        return inputs, targets

    def records(self, ids: Sequence[str]) -> list[Record]:
        """Some records as texts.

        Raises:
            InputError: the rows are no text.
        """
        raise InputError("Rows of numbers hold no words that could be replaced.", "Choose protect=gradients.")

    def encoded(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of records of text, which need not be those of the table.

        Raises:
            InputError: the rows are no text.
        """
        raise InputError("Rows of numbers hold no words that could be replaced.", "Choose protect=gradients.")

    def fresh(self, seed: int) -> dict[str, Tensor]:
        """State of an untrained model; torch's global generator is left as it was."""
        return {name: value.detach() for name, value in state_of(self.made(seed)).items()}

    def made(self, seed: int) -> nn.Module:
        """An untrained model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()

    def module(self, state: dict[str, Tensor]) -> nn.Module:
        """A model with the weights of ``state`` (parameters and buffers by name), in evaluation mode.

        Raises:
            InputError: names or shapes are others.
        """
        model = self.made(0)
        held = state_of(model)
        if {n: v.shape for n, v in held.items()} != {n: v.shape for n, v in state.items()}:
            raise InputError("The weights are of another model.", "Give the one of the training.")
        with torch.no_grad():
            for name, value in held.items():
                value.copy_(state[name])
        return model.to(self.device).eval()

    def signature(self) -> str:
        """What tells one architecture from another: names, shapes and types of a fresh model's state, and its fresh values."""
        state = self.fresh(0)
        return digest_tensors(state[name] for name in sorted(state))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, as they are."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
