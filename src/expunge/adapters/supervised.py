"""Models that answer a row with a class or a number: any torch module, and transformers' classifiers of images and texts.

One target belongs to each row, so everything per target is per row, and the terms written for tokens serve unchanged.
"""

from __future__ import annotations

import abc
import copy as copying
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from expunge.adapters import identity
from expunge.adapters.answers import Generation
from expunge.adapters.base import Adapter, Batch, Example, Outputs
from expunge.adapters.registry import adapter
from expunge.core.access import Offer
from expunge.core.errors import InputError, nearest
from expunge.core.files import atomic_path
from expunge.data.rows import Row

NUMBERS_PER_UNIT = 64  #: input numbers that cost about as much as a token: batches are filled by units

S = TypeVar("S", bound="SupervisedAdapter")


class SupervisedAdapter(Adapter):
    """What classifiers and regressors share: rows in, one output row each.

    A plain module is called with one tensor ``[B, ...]``; a transformers model by the name of its main input; token ids of
    unequal length are padded, and negative ones stand for padding.
    Batch normalisation uses its running statistics, unless training is told otherwise.

    Args:
        model: returns ``[B, C]`` (or an object with ``logits``).
        layers: names of the modules whose outputs are features, from the input to the output, ending with the one that makes the
            scores (its *input* is the last feature); none: the modules in which the model's parts are listed.
        dropout: leave the model's dropout to the training loop; else it is switched off in place.

    Raises:
        InputError: a layer that the model does not have.
    """

    offers: ClassVar[frozenset[Offer]]

    def __init__(self, model: nn.Module, *, layers: Sequence[str] | None = None, dropout: bool = False) -> None:
        self.model: Any = model
        names = dict(model.named_modules())
        for layer in layers or ():
            if layer not in names:
                close = nearest(layer, names)
                raise InputError(f"The model has no module {layer!r}.", f"Nearest: {', '.join(close)}." if close else "")
        self._layers = list(layers) if layers is not None else _parts(model)
        self._input = getattr(model, "main_input_name", None) if hasattr(model, "config") else None
        if not dropout:
            for module in model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = 0.0

    # ---- data ------------------------------------------------------------------------------------------------------

    def encode(self, record: Row, *, answer: Any = None, suffix: str = "", prompt: str | None = None) -> Example:
        """One example with one target; ``answer`` replaces the target.

        Raises:
            InputError: the target does not fit the model's outputs, or a prompt was given.
        """
        if prompt is not None:
            raise InputError("A row has no prompt.")
        target = self.target(record.target if answer is None else answer)
        cost = max(1, int(np.size(record.inputs)) // NUMBERS_PER_UNIT)
        return Example(record.id + suffix, record.cluster, 1, 1, (record.inputs, target), cost)

    def replace(self, example: Example, *, inputs: Any = None, answer: Any = None, suffix: str = "") -> Example:
        """The row with other inputs or another target."""
        held, target = example.data
        data = (held if inputs is None else np.asarray(inputs), target if answer is None else self.target(answer))
        return replace(example, id=example.id + suffix, data=data)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack the rows; one target each."""
        if not examples:
            raise InputError("A batch needs at least one example.")
        each = torch.arange(len(examples))
        ones = (1,) * len(examples)
        return Batch(
            tuple(e.id for e in examples), self._inputs([e.data[0] for e in examples]),
            torch.tensor([e.data[1] for e in examples], dtype=self.target_type), each, torch.zeros_like(each), ones,
            each, torch.ones(len(examples), dtype=torch.bool), ones,
        )  # fmt: skip

    def _inputs(self, rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
        if len({r.shape for r in rows}) == 1:
            stacked = torch.from_numpy(np.stack(rows))
            if self._input != "input_ids":
                return {self._input or "inputs": stacked}
            return self._tokens(stacked.long())
        if self._input != "input_ids" or any(r.ndim != 1 for r in rows):
            shapes = sorted({r.shape for r in rows})[:2]
            raise InputError(f"The rows have different shapes, such as {shapes[0]} and {shapes[1]}.", "Give all one shape.")
        ids = torch.full((len(rows), max(len(r) for r in rows)), -1)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.from_numpy(row)
        return self._tokens(ids)

    def _tokens(self, ids: Tensor) -> dict[str, Tensor]:
        """Token ids ``[B, longest]`` with padding, and where there is none; columns that are all padding are cut."""
        mask = ids >= 0
        width = max(1, int(mask.any(0).sum()))
        ids, mask = ids[:, :width], mask[:, :width]
        pad = int(getattr(self.model.config, "pad_token_id", None) or 0)
        return {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long()}

    # ---- the model ---------------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def target_type(self) -> torch.dtype:
        """Number type of the targets."""

    @abc.abstractmethod
    def target(self, value: Any) -> int | float:
        """A target as the model is trained on it.

        Raises:
            InputError: no such class, or no number.
        """

    @abc.abstractmethod
    def row_losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Loss of each row, ``[B]``, from the model's outputs ``[B, C]`` and the targets ``[B]``; differentiable."""

    def scores(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """The model's outputs, ``[B, C]`` (a single output per row gets a last dimension of 1)."""
        out = model(**tensors) if self._input else model(next(iter(tensors.values())))
        found: Tensor = out if isinstance(out, Tensor) else out["logits"]
        return found[:, None] if found.ndim == 1 else found

    def forward(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """One forward pass; features come as ``[B, D]``, whatever their shape inside the model.

        Raises:
            InputError: the model's outputs do not fit the labels.
        """
        values: dict[str, Tensor] = {}
        asked = [w for w in sorted(want) if w.partition(":")[0] in ("features", "maps")]
        with self._captured(model, asked, values):
            scores = self.scores(model, dict(batch.tensors))
        self.check_scores(scores, batch.n_examples)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if "logits" in want:
            values["logits"] = scores
        if "numbers" in want:
            values["numbers"] = scores[:, 0]
        if "losses" in want:
            values["losses"] = self.row_losses(scores, batch.targets)
        return Outputs.of(batch, values)

    @abc.abstractmethod
    def check_scores(self, scores: Tensor, rows: int) -> None:
        """Whether outputs ``[B, C]`` fit the targets.

        Raises:
            InputError: they do not.
        """

    def logit_blocks(self, model: nn.Module, batch: Batch, rows: int = 512) -> Iterator[tuple[int, Tensor]]:
        """The outputs of the whole batch as one block: classes are few."""
        with torch.no_grad():
            yield 0, self.forward(model, batch, frozenset({"logits"})).logits

    def generate(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int) -> list[Generation]:
        """Not what these models do.

        Raises:
            InputError: always.
        """
        raise InputError(f"A model for {self.modality} does not write text.", "Use metrics that need no generated text.")

    def layers(self) -> list[str]:
        """Names of the modules whose outputs are features; the last one makes the scores, and stands for its input."""
        return list(self._layers)

    @contextmanager
    def _captured(self, model: nn.Module, wanted: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
        inner: Any = _bare(model)

        def keep(name: str, value: Any) -> None:
            state: Tensor = value if isinstance(value, Tensor) else value[0]
            found[name] = state.flatten(1) if name.startswith("features:") else self._map(state)

        handles = []
        for want in wanted:
            layer = want.partition(":")[2]
            module = inner.get_submodule(layer)
            if layer == self._layers[-1]:
                handles.append(module.register_forward_pre_hook(lambda _m, inputs, name=want: keep(name, inputs[0])))
            else:
                handles.append(module.register_forward_hook(lambda _m, _i, out, name=want: keep(name, out)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _map(self, state: Tensor) -> Tensor:
        """Squares ``[B, P]`` of a vector, or their mean over channels: the first dimension of a row, the last of a sequence."""
        if state.ndim == 2:
            return state.square()
        return state.square().mean(-1 if self._input and state.ndim == 3 else 1).flatten(1)

    # ---- identity and storage ----------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Settings that, with the weights, decide what the model says."""
        return {"modality": self.modality}

    def fingerprint(self) -> str:
        """SHA-256 over weights, buffers and settings."""
        state = identity.weights_hash(_bare(self.model))
        state.update(json.dumps(self.describe(), sort_keys=True).encode())
        return str(state.hexdigest())

    def save(self, folder: Path, model: nn.Module | None = None, *, state: dict[str, Tensor] | None = None) -> None:
        """Write the weights to ``model.safetensors`` (a transformers model in its own layout) and the settings to ``model.json``.

        Raises:
            InputError: the folder holds something.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{str(folder)!r} exists and is not empty.", "Choose another folder, or remove it.")
        inner: Any = _bare(self.model if model is None else model)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            if hasattr(inner, "save_pretrained"):
                inner.save_pretrained(temporary, **({} if state is None else {"state_dict": state}))
            else:
                held = inner.state_dict() if state is None else state
                save_file({k: v.detach().cpu().contiguous().clone() for k, v in held.items()}, temporary / "model.safetensors")
            (temporary / "model.json").write_text(json.dumps(self.describe(), indent=2) + "\n", encoding="utf-8")

    def copy(self: S) -> S:
        """The same settings around a copy of the weights."""
        other = copying.copy(self)
        other.model = copying.deepcopy(self.model)
        return other


@adapter
class ClassifierAdapter(SupervisedAdapter):
    """A classifier of rows: any torch module that returns one score per class.

    The loss of a row is its cross-entropy.

    Args:
        model: returns scores ``[B, C]``.
        classes: names of the C classes, in the order of the outputs.
        layers, dropout: see :class:`SupervisedAdapter`.

    Raises:
        InputError: fewer than two classes.
    """

    modality: ClassVar[str] = "classification"
    offers: ClassVar[frozenset[Offer]] = frozenset(
        {Offer.LOSSES, Offer.LOGITS, Offer.FEATURES, Offer.MAPS, Offer.CLASSES, Offer.ROWS, Offer.EACH}
    )

    def __init__(
        self, model: nn.Module, classes: Sequence[str], *, layers: Sequence[str] | None = None, dropout: bool = False
    ) -> None:
        super().__init__(model, layers=layers, dropout=dropout)
        self.classes = tuple(str(c) for c in classes)
        if len(self.classes) < 2:
            raise InputError(f"A classifier needs at least two classes, not {len(self.classes)}.", "Name all of them.")

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.classes)

    @property
    def target_type(self) -> torch.dtype:
        """Class numbers."""
        return torch.int64

    def target(self, value: Any) -> int:
        """A class number, from a number or a name."""
        if isinstance(value, str):
            if value not in self.classes:
                close = nearest(value, self.classes)
                raise InputError(f"There is no class {value!r}.", f"Nearest: {', '.join(close or self.classes[:5])}.")
            return self.classes.index(value)
        number = int(value)
        if number != value or not 0 <= number < len(self.classes):
            raise InputError(f"The label {value} is out of range: there are {len(self.classes)} classes, counted from 0.")
        return number

    def row_losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each row in nats, ``[B]``."""
        return functional.cross_entropy(scores, targets, reduction="none")

    def check_scores(self, scores: Tensor, rows: int) -> None:
        """One row for each input, one score for each class."""
        if tuple(scores.shape) != (rows, len(self.classes)):
            raise InputError(
                f"The model returns {list(scores.shape)} for {rows} rows of {len(self.classes)} classes.",
                "It must return one score for each class of each row.",
            )

    def describe(self) -> dict[str, Any]:
        """Modality and classes."""
        return {"modality": self.modality, "classes": list(self.classes)}


@adapter
class RegressionAdapter(SupervisedAdapter):
    """A regressor of rows: any torch module that returns one number per row.

    Args:
        model: returns ``[B]`` or ``[B, 1]``.
        loss: absolute (``l1``) or squared (``mse``) error of a row; it is also what unlearning raises and keeps.
        layers, dropout: see :class:`SupervisedAdapter`.
    """

    modality: ClassVar[str] = "regression"
    offers: ClassVar[frozenset[Offer]] = frozenset(
        {Offer.LOSSES, Offer.NUMBERS, Offer.FEATURES, Offer.MAPS, Offer.ROWS, Offer.EACH}
    )

    def __init__(
        self,
        model: nn.Module,
        loss: Literal["l1", "mse"] = "l1",
        *,
        layers: Sequence[str] | None = None,
        dropout: bool = False,
    ) -> None:
        super().__init__(model, layers=layers, dropout=dropout)
        if loss not in ("l1", "mse"):
            raise InputError(f"The loss of a regression must be l1 or mse; got {loss!r}.")
        self.loss = loss

    @property
    def target_type(self) -> torch.dtype:
        """Floats of the model's own type."""
        floats = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return floats[0] if floats else torch.float32

    def target(self, value: Any) -> float:
        """A finite number."""
        number = float(value)
        if not np.isfinite(number):
            raise InputError(f"The target {value} is not finite.", "Fill it in, or leave the row out.")
        return number

    def row_losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Absolute or squared error of each row, ``[B]``."""
        error = scores[:, 0] - targets
        return error.abs() if self.loss == "l1" else error.square()

    def check_scores(self, scores: Tensor, rows: int) -> None:
        """One number for each row."""
        if tuple(scores.shape) != (rows, 1):
            raise InputError(
                f"The model returns {list(scores.shape)} for {rows} rows.", "A regressor must return one number for each row."
            )

    def describe(self) -> dict[str, Any]:
        """Modality and loss."""
        return {"modality": self.modality, "loss": self.loss}


def _bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of distribution, compilation and adapters."""
    inner: Any = model
    while True:
        held = getattr(inner, "_orig_mod", None)
        if held is None and type(inner).__name__ in ("DistributedDataParallel", "DataParallel"):
            held = inner.module
        if held is None and hasattr(inner, "get_base_model"):
            held = inner.get_base_model()
        if held is None:
            return inner  # type: ignore[no-any-return]
        inner = held


def _parts(model: nn.Module) -> list[str]:
    """The modules that a model lists in its outermost containers and that have parameters, in order."""
    found: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            whole = f"{prefix}{name}"
            if isinstance(child, (nn.Sequential, nn.ModuleList)) or (hasattr(child, "config") and list(child.children())):
                visit(child, whole + ".")
            elif next(child.parameters(), None) is not None:
                found.append(whole)

    visit(model, "")
    return found or [""]
