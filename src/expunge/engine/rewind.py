"""Rewinding: after training, back to the epoch that looks most as if the forget set had never been seen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from expunge.adapters.base import Adapter, Example
from expunge.adapters.passes import evaluating
from expunge.core.errors import InputError
from expunge.core.files import atomic_path
from expunge.engine import checkpoint
from expunge.engine.gradients import fitting


@torch.no_grad()
def error_rate(adapter: Adapter, model: nn.Module, examples: Sequence[Example], max_units: int) -> float:
    """Share of targets for which the model's best class is another one, in [0, 1]; in evaluation mode.

    Raises:
        InputError: the examples have no targets.
    """
    wrong = total = 0
    device = next(model.parameters()).device
    with evaluating(model):
        for chosen in fitting(examples, max_units):
            batch = adapter.collate(chosen).to(device)
            for start, logits in adapter.logit_blocks(model, batch):
                targets = batch.targets[start : start + len(logits)]
                wrong += int((logits.argmax(-1) != targets).sum())
                total += len(targets)
    if not total:
        raise InputError("There are no targets whose error could be counted.")
    return wrong / total


class Rewind:
    """The weights after each epoch, in files, and the choice among them (SCRUB+R, Kurmanji et al. 2023, arXiv 2302.09880).

    The reference is the error of the *last* weights on validation rows: never trained on, with the classes of the forget set.
    The epoch whose error on the forget set is nearest to it is taken, the earliest of equal ones.

    Args:
        adapter: the modality.
        forget, validation: examples.
        max_units: size of a forward pass.
        folder: where the weights are kept until the choice; a run that goes on after a kill finds them there.
        ends: numbers of steps after which an epoch is over.
        rank: of this process, which keeps its own files.

    Raises:
        InputError: there are no validation rows, or the model has no classes to be wrong about.
    """

    def __init__(
        self,
        adapter: Adapter,
        forget: Sequence[Example],
        validation: Sequence[Example],
        *,
        max_units: int,
        folder: Path,
        ends: Collection[int],
        rank: int = 0,
    ) -> None:
        if not validation:
            raise InputError(
                "schedule.rewind chooses by rows that were never trained on, but there are none.",
                "Give a holdout set with the classes of the forget set, or schedule.rewind=false.",
            )
        self.adapter, self.forget, self.validation, self.max_units = adapter, forget, validation, max_units
        self.folder, self.ends, self.rank = folder, sorted(ends), rank

    def keep(self, model: nn.Module, done: int) -> None:
        """Write the weights if an epoch is over."""
        if done in self.ends:
            with atomic_path(self._path(done)) as temporary:
                save_file({k: v.contiguous() for k, v in checkpoint.snapshot(model).items()}, temporary)

    def choose(self, model: nn.Module, done: int) -> str:
        """Put the best of the weights of up to ``done`` steps back into ``model`` and say which they are."""
        reference = error_rate(self.adapter, model, self.validation, self.max_units)
        found = []
        for epoch, end in enumerate([e for e in self.ends if e <= done], start=1):
            checkpoint.restore(model, load_file(self._path(end)))
            error = error_rate(self.adapter, model, self.forget, self.max_units)
            found.append((abs(error - reference), epoch, end, error))
        _, epoch, end, error = min(found)
        checkpoint.restore(model, load_file(self._path(end)))
        return (
            f"Rewound to the end of epoch {epoch} of {len(found)}: its error on the forget set, {error:.3f}, is nearest to "
            f"that of the last epoch on {len(self.validation)} examples that were never trained on, {reference:.3f}."
        )

    def _path(self, end: int) -> Path:
        return self.folder / f"epoch-{end}-{self.rank}.safetensors"
