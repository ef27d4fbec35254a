"""The frozen target model, as cheaply as the recipe allows.

* ``cached``: the terms read only losses of the reference: they are computed once per example and stored by content;
  no second model, no second forward pass.
* ``adapter-off``: LoRA is trained: the same weights with the adapter switched off are the target; one more forward pass.
* ``copy``: the terms read logits or features of the reference and all weights move: a second copy in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Batch, Example, Outputs
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.core.files import atomic_path, digest_json
from expunge.engine.options import Engine
from expunge.engine.parts import Need, Recipe
from expunge.engine.preparation import ReferenceSource

Kind = Literal["none", "cached", "adapter-off", "copy"]


def choose(recipe: Recipe, needs: frozenset[Need], *, storable: bool = True) -> Kind:
    """The kind of reference that serves ``recipe``; ``storable`` says whether an example has the same losses in every step.

    Raises:
        InputError: the kind asked for cannot serve.
    """
    wanted = {value for _, of, value in needs if of is Of.REFERENCE}
    lora = recipe.parameters.switchable
    if not wanted:
        return "none"
    if recipe.reference == "cached" and wanted != {"losses"}:
        kinds = sorted({value.partition(":")[0] for value in wanted - {"losses"}})
        raise InputError(
            f"reference=cached holds log-probabilities only, but {recipe.name!r} reads {', '.join(kinds)} of the reference.",
            "Use reference=copy, or parameters=lora with reference=adapter-off.",
        )
    if recipe.reference == "cached" and not storable:
        raise InputError(
            "reference=cached holds one loss for each example, but these are drawn anew in every step.", "Use reference=copy."
        )
    if recipe.reference == "adapter-off" and not lora:
        raise InputError("reference=adapter-off needs parameters=lora.", "Add parameters=lora or use reference=copy.")
    if recipe.reference != "auto":
        return cast(Kind, recipe.reference)
    if wanted == {"losses"} and storable:
        return "cached"
    return "adapter-off" if lora else "copy"


def frozen_models(
    adapter: Adapter,
    recipe: Recipe,
    examples: Mapping[Stream, Sequence[Example]],
    engine: Engine,
    *,
    device: torch.device,
    store: Path | None = None,
) -> dict[Of, ReferenceSource]:
    """The frozen models that a recipe reads and that follow from the target: itself, and a network that has learnt nothing.

    Args:
        adapter: holds the target, on ``device``.
        recipe: what is read.
        examples: by stream; their losses under the target are computed now if they are all that is read of it.
        engine: seed, and examples per forward pass.
        device: where copies go.
        store: folder for cached losses.
    """
    needs = recipe.needs(adapter.layers())
    found: dict[Of, ReferenceSource] = {}
    kind = choose(recipe, needs, storable=not adapter.draws_anew)
    if kind == "copy":
        found[Of.REFERENCE] = CopyReference(adapter, device)
    elif kind == "adapter-off":
        found[Of.REFERENCE] = AdapterOffReference(adapter)
    elif kind == "cached":
        cached = CachedReference(adapter, store)
        for stream in sorted({s for s, of, _ in needs if of is Of.REFERENCE}):
            cached.fill(adapter.model, examples.get(stream, ()), engine.max_tokens, device)
        found[Of.REFERENCE] = cached
    if any(of is Of.INCOMPETENT for _, of, _ in needs):
        found[Of.INCOMPETENT] = IncompetentReference(adapter, device, engine.seed)
    return found


class CachedReference:
    """Per-target losses of the target model, computed once per example and kept by content hash.

    Args:
        adapter: with the target's weights in place when :meth:`fill` is called.
        store: folder of the cache; none keeps it in memory only.
    """

    def __init__(self, adapter: Adapter, store: Path | None = None) -> None:
        self.adapter, self.store = adapter, store
        self._losses: dict[str, np.ndarray] = {}

    def fill(self, model: nn.Module, examples: Sequence[Example], max_tokens: int, device: torch.device) -> bool:
        """Compute the losses of ``examples`` under ``model``, or read them; returns whether they were stored already."""
        path = None
        if self.store is not None:
            keys = [[e.id, e.n_targets, e.size] for e in examples]
            name = digest_json(["reference-losses-1", self.adapter.fingerprint(), keys, _content(self.adapter, examples)])
            path = self.store / f"reference-{name[:32]}.npz"
            if path.is_file():
                with np.load(path, allow_pickle=False) as data:
                    flat, ends = data["losses"], np.cumsum(data["counts"])
                parts = np.split(flat, ends[:-1])
                self._losses |= {e.id: p for e, p in zip(examples, parts, strict=True)}
                return True
        order = sorted(range(len(examples)), key=lambda i: examples[i].units)
        at = 0
        with torch.no_grad():
            while at < len(order):
                stop = at + 1
                while stop < len(order) and examples[order[stop]].units * (stop + 1 - at) <= max_tokens:
                    stop += 1
                chosen = [examples[i] for i in order[at:stop]]
                batch = self.adapter.collate(chosen).to(device)
                losses = self.adapter.forward(model, batch, frozenset({"losses"})).losses.float().cpu().numpy()
                ends = np.cumsum([e.n_targets for e in chosen])
                self._losses |= {e.id: p.copy() for e, p in zip(chosen, np.split(losses, ends[:-1]), strict=True)}
                at = stop
        if path is not None:
            with atomic_path(path) as temporary, temporary.open("wb") as handle:
                counts = np.array([e.n_targets for e in examples])
                np.savez(handle, losses=np.concatenate([self._losses[e.id] for e in examples]), counts=counts)
        return False

    def outputs(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """Read the cached losses of a batch."""
        flat = np.concatenate([self._losses[i] for i in batch.ids])
        return Outputs.of(batch, {"losses": torch.from_numpy(flat).to(batch.targets.device)})


class ModelReference:
    """Another model, which does not change: one trained without the forget set, for example."""

    def __init__(self, adapter: Adapter, device: torch.device) -> None:
        self.adapter = adapter
        self.adapter.model.eval().to(device)

    def outputs(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """Forward through the frozen model."""
        with torch.no_grad():
            return self.adapter.forward(self.adapter.model, batch, want)


class CopyReference(ModelReference):
    """A frozen second copy of the model."""

    def __init__(self, adapter: Adapter, device: torch.device) -> None:
        super().__init__(adapter.copy(), device)
        self.adapter.model.requires_grad_(False)


class TableReference:
    """Scores that were computed or predicted before, by example.

    Args:
        scores: by example id, ``[targets, V]`` each.
        source: what they are, for messages.
    """

    def __init__(self, scores: Mapping[str, Tensor], source: str) -> None:
        self.scores, self.source = scores, source

    def outputs(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """Look the scores of a batch up.

        Raises:
            InputError: something else than scores is asked for, or an example has none, or too many or too few.
        """
        if want - {"logits"}:
            raise InputError(f"{self.source} hold scores only, but {', '.join(sorted(want - {'logits'}))} is read.")
        for name, count in zip(batch.ids, batch.counts, strict=True):
            if name not in self.scores or len(self.scores[name]) != count:
                raise InputError(f"{self.source} have no scores for the example {name!r}.", "Give one row for each target.")
        flat = torch.cat([self.scores[name] for name in batch.ids])
        return Outputs.of(batch, {"logits": flat.to(batch.targets.device)})


class IncompetentReference(ModelReference):
    """A frozen network of the target's shape with fresh random weights: the incompetent teacher.

    Raises:
        InputError: a part of the model cannot be set back to random weights.
    """

    def __init__(self, adapter: Adapter, device: torch.device, seed: int) -> None:
        fresh = adapter.copy()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            reset_weights(fresh.model)
        super().__init__(fresh, device)
        fresh.model.requires_grad_(False)


def reset_weights(model: nn.Module) -> None:
    """Fresh random weights in place, by each module's own initialisation (of a transformers model: by the model's).

    Raises:
        InputError: a part of the model cannot be set back.
    """
    initialise = getattr(model, "init_weights", None)
    if hasattr(model, "config") and callable(initialise):
        for module in model.modules():
            if hasattr(module, "_is_hf_initialized"):
                del module._is_hf_initialized
        for parameter in model.parameters():
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
        initialise()
        return
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif own:
            raise InputError(
                f"The part {name or type(module).__name__!r} of the model cannot be set back to random weights.",
                "Give it a method reset_parameters().",
            )


class AdapterOffReference:
    """The current model with its LoRA switched off."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def outputs(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """Forward with the adapter disabled."""
        inner = getattr(model, "module", model)
        off: AbstractContextManager[object] = cast(Any, inner).disable_adapter()
        with torch.no_grad(), off:
            return self.adapter.forward(inner, batch, want)


def _content(adapter: Adapter, examples: Sequence[Example]) -> str:
    """Hash of what the examples hold, through the adapter's own collation (ids alone do not identify content)."""
    import hashlib

    state = hashlib.sha256()
    for example in examples:
        batch = adapter.collate([example])
        for name in sorted(batch.tensors):
            state.update(name.encode())
            state.update(batch.tensors[name].numpy().tobytes())
        state.update(batch.targets.numpy().tobytes())
    return state.hexdigest()
