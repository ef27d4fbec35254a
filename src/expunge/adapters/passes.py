"""One forward pass: which tokens go in, what is computed at the head, and what is kept of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.adapters import packing
from expunge.adapters.attending import attending
from expunge.adapters.base import Batch
from expunge.adapters.head import bare, base, head_of, is_plain, linear_losses, pick, replaced_head, take
from expunge.adapters.storage import block_names, forward_parameters
from expunge.core.errors import InputError

_INPUTS = ("input_ids", "attention_mask", "position_ids")


class _Enough(Exception):
    """Raised inside a forward pass once everything that was asked for is there."""


class Runner:
    """Runs batches through a model by the shortest way that a trial has shown to be right for it.

    Args:
        fused: whether losses may be computed without a graph over the scores.
        packed: whether ragged batches may be run without their padding.
    """

    def __init__(self, *, fused: bool, packed: bool) -> None:
        self.fused = fused
        self.packed = packed
        self._plain: bool | None = None
        self._packs: bool | None = None

    def run(self, model: nn.Module, batch: Batch, scores: str | None, inside: Sequence[str]) -> dict[str, Tensor]:
        """``scores`` ("losses", "logits" or none) and what is found ``inside`` the blocks, by name, as flat tensors.

        Names of the latter are ``features:<block>``, or those of :func:`~expunge.adapters.attending.attending`.
        """
        fuse = scores == "losses" and self._fuses(model)
        head: Any = _head(model)

        def compute(rows: Callable[[Tensor], Tensor], states: Tensor, original: Any) -> Tensor:
            if scores is None:
                return states[..., :1, :1]
            if fuse:
                return linear_losses(head, rows(states), batch.targets)[None, :, None]
            out: Tensor = original(rows(states)[None])
            return out

        found = self._pass(model, batch, compute, inside, needs_head=scores is not None)
        if scores is not None:
            got = found.pop("logits")
            got = got.reshape(-1) if fuse else got.reshape(-1, got.shape[-1])
            got = got.to(torch.promote_types(got.dtype, torch.float32))
            if scores == "losses" and not fuse:
                got = functional.cross_entropy(got, batch.targets, reduction="none")
            found[scores] = got
        return found

    def logit_blocks(self, model: nn.Module, batch: Batch, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Pairs of first target and scores ``[<=rows, V]``; the head runs block by block if nothing comes after it."""
        if not self._fuses(model):
            logits = self.run(model, batch, "logits", ())["logits"]
            for a in range(0, len(logits), rows):
                yield a, logits[a : a + rows]
            return
        caught: list[Tensor] = []

        def compute(select: Callable[[Tensor], Tensor], states: Tensor, _: Any) -> Tensor:
            caught.append(select(states))
            return states[..., :1, :1]

        self._pass(model, batch, compute, (), needs_head=True)
        head = _head(model)
        for a in range(0, len(batch.targets), rows):
            block = head(caught[0][a : a + rows])
            yield a, block.to(torch.promote_types(block.dtype, torch.float32))

    def _pass(
        self, model: nn.Module, batch: Batch, compute: Callable[..., Tensor], inside: Sequence[str], *, needs_head: bool
    ) -> dict[str, Tensor]:
        """Run the model, ``compute(rows, states, head)`` standing in for its head; ``rows`` picks the predicting states."""
        # The last token of an example predicts nothing: it is only run if its features are asked for.
        width = batch.tensors["input_ids"].shape[1] - (0 if inside else 1)
        layers = [name.removeprefix("features:") for name in inside if name.startswith("features:")]
        attention = [name for name in inside if not name.startswith("features:")]
        layout = None if attention else self._layout(model, batch, width, bool(inside))
        if layout is None:
            inputs = self._inputs(batch, width)

            def rows(states: Tensor) -> Tensor:
                return pick(states, batch.owner, batch.tensors["predict"], width)
        else:
            cells = batch.token_owner * width + batch.tensors["real"]
            cells = cells if layers else cells[batch.tensors["inner"]]
            inputs = {k: batch.tensors[k][:, :width].reshape(-1).index_select(0, cells)[None] for k in _INPUTS}
            index = batch.tensors["row"] + batch.owner if layers else batch.tensors["row"]

            def rows(states: Tensor) -> Tensor:
                return take(states[0], index)

        accepted = forward_parameters(base(model))
        options: dict[str, Any] = {k: v for k, v in inputs.items() if k in accepted}
        if "use_cache" in accepted:
            options["use_cache"] = False
        if "prompt_lengths" in accepted:  # a model that decides by the prompt what it does with all of a sequence
            options["prompt_lengths"] = _prompt_lengths(batch)
        found: dict[str, Tensor] = {}
        early = not needs_head and not attention and _may_stop(model)
        with (
            nullcontext() if torch.is_grad_enabled() else evaluating(model),
            replaced_head(_head(model), lambda states, original: compute(rows, states, original)),
            _captured(base(model), layers, found, early, watch=bool(inside)),
            attending(model, attention, batch.tensors["attention_mask"][:, :width], found),
            nullcontext() if layout is None else packing.packed(model, layout),
        ):
            try:
                out = model(**options)
            except _Enough:
                out = found
        values = {} if not needs_head else {"logits": out["logits"]}
        for name in inside:
            states = out[name]
            values[name] = states[0] if layout else pick(states, batch.token_owner, batch.tensors["real"], width)
        return values

    def _inputs(self, batch: Batch, width: int) -> dict[str, Tensor]:
        """What the model is called with, for batches that are not packed: the first ``width`` columns."""
        return {k: batch.tensors[k][:, :width] for k in _INPUTS}

    def _probe(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model is called with to see what it does with the scores of a few tokens ``[1, T]``."""
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _layout(self, model: nn.Module, batch: Batch, width: int, everything: bool) -> packing.Layout | None:
        """How the batch is packed; none if that would save less than a sixteenth, or does not work with this model."""
        if not self.packed:
            return None
        # Tried whatever the first batch looks like: a sharded model's processes must all run the trial, or none.
        if self._packs is None:
            self._packs = packing.packable(model, 1) and self._trial(model)
        count = sum(batch.token_counts) - (0 if everything else batch.n_examples)
        if not self._packs or count > batch.n_examples * width * 15 // 16 or not packing.packable(model, width):
            return None
        if everything:
            return packing.Layout.of(batch.token_counts, batch.token_owner, batch.tensors["real"])
        inner = batch.tensors["inner"]
        return packing.Layout.of([n - 1 for n in batch.token_counts], batch.token_owner[inner], batch.tensors["real"][inner])

    def _trial(self, model: nn.Module) -> bool:
        """Whether packing leaves the states before the head as they are, and goes through every block's attention."""
        inner: Any = bare(model)
        device = inner.get_input_embeddings().weight.device
        sizes, vocabulary = np.array([2, 7, 4]), inner.get_input_embeddings().weight.shape[0]
        real = torch.from_numpy(np.arange(sizes.max()) < sizes[:, None])
        ids = (torch.arange(real.numel()).reshape(real.shape) % vocabulary).to(device)
        places = torch.arange(real.shape[1]).expand(real.shape).to(device)
        cells = real.reshape(-1).nonzero().squeeze(1).to(device)
        owner, column = (t.to(device) for t in real.nonzero(as_tuple=True))
        layout = packing.Layout.of([int(n) for n in sizes], owner, column)
        options = {"use_cache": False} if "use_cache" in forward_parameters(base(model)) else {}
        caught: list[Tensor] = []

        def compute(states: Tensor, _: Any) -> Tensor:
            caught.append(states.reshape(-1, states.shape[-1]))
            return states[..., :1, :1]

        with torch.no_grad(), evaluating(inner), replaced_head(_head(model), compute):
            if "position_ids" not in forward_parameters(base(model)):
                return False
            inner(input_ids=ids, attention_mask=real.long().to(device), position_ids=places, **options)
            flat = {"input_ids": ids, "position_ids": places, "attention_mask": real.long().to(device)}
            try:
                with packing.packed(model, layout):
                    inner(**{k: v.reshape(-1)[cells][None] for k, v in flat.items()}, **options)
            except Exception:  # attention that looks at its own name (Falcon) fails in its own way: it cannot be packed
                return False
        apart, together = (c.float() for c in (caught[0][cells], caught[1]))
        tolerance = 1e-4 if caught[0].dtype in (torch.float32, torch.float64) else 3e-2
        close = bool((apart - together).abs().max() <= tolerance * apart.abs().max())
        return close and layout.calls == len(block_names(base(model)))

    def _fuses(self, model: nn.Module) -> bool:
        if not self.fused or not is_plain(_head(model)):
            return False
        if self._plain is None:
            self._plain = nothing_after(model, self._probe)
        return self._plain


def _prompt_lengths(batch: Batch) -> Tensor:
    """Tokens before the first target of each example, int64 ``[B]``; 1 where there is no prompt."""
    first = batch.owner.new_full((batch.n_examples,), torch.iinfo(torch.int64).max)
    return first.scatter_reduce(0, batch.owner, batch.tensors["predict"], "amin") + 1


def _head(model: nn.Module) -> nn.Module:
    head = head_of(model)
    if head is None:
        raise InputError("The model has no language-modelling head.", "Load it with AutoModelForCausalLM.")
    return head


def nothing_after(model: nn.Module, probe: Callable[[Tensor], dict[str, Tensor]] | None = None) -> bool:
    """Whether the model returns its head's output as it is (some cap or scale it): looked at on a few tokens."""
    caught: list[Tensor] = []

    def compute(states: Tensor, original: Any) -> Tensor:
        caught.append(original(states))
        return caught[-1]

    head, inner = _head(model), bare(model)
    ids = torch.arange(2, device=next(head.parameters()).device)[None]
    inputs = probe(ids) if probe is not None else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), evaluating(inner), replaced_head(head, compute):
        logits = inner(**inputs)["logits"]
    return len(caught) == 1 and torch.equal(logits.float(), caught[0].float())


def _may_stop(model: nn.Module) -> bool:
    """Whether a forward pass may be left in the middle: not under a wrapper that counts on its end."""
    inner = bare(model)
    checkpointing = torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return inner is model and not checkpointing and not any("FSDP" in type(m).__name__ for m in (inner, base(model)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, every module is in evaluation mode; those that were training go back to it."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _captured(inner: nn.Module, layers: Sequence[str], found: dict[str, Tensor], early: bool, *, watch: bool) -> Iterator[None]:
    """Collect the outputs of the named blocks in ``found``; with ``watch`` all in it is added to what the model returns, so that
    wrappers see it."""
    handles: list[Any] = []

    def after_block(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[f"features:{name}"] = output if isinstance(output, Tensor) else output[0]
            if early and len(found) == len(layers):
                raise _Enough

        return hook

    def after_model(_module: nn.Module, _inputs: Any, output: Any) -> dict[str, Tensor]:
        return {"logits": output["logits"], **found}

    try:
        handles += [inner.get_submodule(layer).register_forward_hook(after_block(layer)) for layer in layers]
        if watch:
            handles.append(inner.register_forward_hook(after_model))
        yield
    finally:
        for handle in handles:
            handle.remove()
