"""A recipe's loss, term by term, without training: for tests, for teaching, and for comparing implementations.

From tensors in the layout of transformers (the shift by one position is done here, once)::

    values = loss_terms(
        "npo",
        forget=Given(logits, labels, reference_logits=reference),
        retain=Given(retain_logits, retain_labels),
    )
    values["forget.npo"], values["retain.nll"], values["total"]

From models and records::

    values = loss_on("npo", adapter, reference, forget_records, retain_records)
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Batch, Example, Outputs
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.options import Engine
from expunge.engine.parts import Need, Recipe, Views
from expunge.engine.preparation import run_preparation
from expunge.methods.alternatives import encoded
from expunge.methods.recipe import build

_MODELS = {
    Of.CURRENT: "the model",
    Of.REFERENCE: "the reference",
    Of.INCOMPETENT: "an incompetent teacher",
    Of.ORACLE: "an oracle",
}
IGNORE = -100  #: label of a position that is not supervised


@dataclass(frozen=True)
class Given:
    """What models say about one stream of examples, in the layout of transformers; shift and flattening are done for you.

    Attributes:
        logits: of the current model, ``[B, T, V]``; may require gradients.
        labels: token ids, -100 where not supervised, ``[B, T]``; position t is predicted by the logits at t - 1.
        reference_logits: of the frozen target, ``[B, T, V]``.
        features: hidden states of the current model by block name, ``[B, T, D]``, in the order of the blocks.
        reference_features: the same of the frozen target.
        attention_mask: 1 at real tokens, ``[B, T]``; none: all are real. Only terms on features look at it.
        incompetent_logits: of a network that has learnt nothing, ``[B, T, V]``.
        oracle_logits: of a model that never saw the forget set, ``[B, T, V]``.
        marked: which labels lie in a marked span, bool ``[B, T]``; none: no label does.
    """

    logits: Tensor
    labels: Tensor
    reference_logits: Tensor | None = None
    features: Mapping[str, Tensor] | None = None
    reference_features: Mapping[str, Tensor] | None = None
    attention_mask: Tensor | None = None
    incompetent_logits: Tensor | None = None
    oracle_logits: Tensor | None = None
    marked: Tensor | None = None


def loss_terms(
    recipe: Recipe | str, *, forget: Given | None = None, retain: Given | None = None, alternative: Given | None = None
) -> dict[str, Tensor]:
    """Every term of a recipe on given model outputs, and their total.

    Args:
        recipe: a recipe, or a method's name for its defaults.
        forget: the forget examples.
        retain: the retain examples.
        alternative: the forget prompts with other answers, one per forget example.

    Returns:
        Scalars that keep their gradient: ``"forget.NAME"`` and ``"retain.NAME"``, each the mean that the term is defined
        as, before its weight (``#2`` is added to a name that occurs again), and ``"total"``, the loss that the first training
        step on these examples would minimise (weights and the balance's first coefficients included).

    Raises:
        InputError: a term reads something that was not given, or shapes do not match.
    """
    recipe = build(recipe) if isinstance(recipe, str) else recipe
    used = sorted(name for t in recipe.terms() for name in t.uses)
    if used:
        raise InputError(f"{recipe.name!r} reads what a preparation makes ({', '.join(used)}).", "Use loss_on, which runs it.")
    given = {Stream.FORGET: forget, Stream.RETAIN: retain, Stream.ALTERNATIVE: alternative}
    layers = tuple(next((g.features for g in given.values() if g is not None and g.features), {}))
    outputs: dict[tuple[Stream, Of], Outputs] = {}
    examples: dict[Stream, list[Example]] = {}
    for stream, tensors in given.items():
        if tensors is not None:
            flat = _Flat(stream, tensors)
            examples[stream] = flat.examples()
            outputs[stream, Of.CURRENT] = flat.outputs(tensors.logits, tensors.features)
            outputs[stream, Of.REFERENCE] = flat.outputs(tensors.reference_logits, tensors.reference_features)
            outputs[stream, Of.INCOMPETENT] = flat.outputs(tensors.incompetent_logits, None)
            outputs[stream, Of.ORACLE] = flat.outputs(tensors.oracle_logits, None)
    for need in sorted(_needs(recipe, layers)):
        _check_given(recipe, need, outputs)
    return combine(recipe, Views(outputs, layers), examples)


def loss_on(
    recipe: Recipe | str,
    adapter: Adapter,
    reference: Adapter | None,
    forget: Sequence[Any],
    retain: Sequence[Any] = (),
    *,
    alternatives: Sequence[Any] | None = None,
    incompetent: Adapter | None = None,
    oracle: Adapter | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Every term of a recipe on given models and records, each stream in one batch; see :func:`loss_terms` for the result.

    The models are used as they are: call ``adapter.model.eval()`` first unless dropout is wanted.

    Args:
        recipe: a recipe, or a method's name for its defaults.
        adapter: holds the current model; gradients flow to it.
        reference: holds the frozen target, for recipes that read it (may be ``adapter`` itself).
        forget: records to forget.
        retain: records to keep.
        alternatives: one other answer (or class) per forget record; none: made as the method does by default.
        incompetent: holds a network that has learnt nothing, for recipes that read it.
        oracle: holds a model that never saw the forget set, for recipes that read it.
        seed: of the choice of alternatives, and of the recipe's preparation, which is run on the model as it is.

    Raises:
        InputError: the recipe reads records or a reference that were not given.
    """
    recipe = build(recipe) if isinstance(recipe, str) else recipe
    needs = recipe.needs(adapter.layers())
    examples = {Stream.FORGET: [adapter.encode(r) for r in forget], Stream.RETAIN: [adapter.encode(r) for r in retain]}
    if Stream.ALTERNATIVE in recipe.streams(adapter.layers()):
        if alternatives:
            pairs = zip(forget, alternatives, strict=True)
            examples[Stream.ALTERNATIVE] = [adapter.encode(r, answer=a, suffix="#alternative") for r, a in pairs]
        else:
            examples[Stream.ALTERNATIVE] = encoded(adapter, forget, recipe, "auto", seed)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = run_preparation(recipe.preparation, adapter, examples, Engine(seed=seed), scratch=Path(scratch))
    recipe = prepared.settled(recipe)
    needs = recipe.needs(adapter.layers())
    examples = {s: list(e) for s, e in prepared.examples.items()}
    outputs: dict[tuple[Stream, Of], Outputs] = {}
    for stream, of in sorted({(s, of) for s, of, _ in needs}):
        want = frozenset(v for s, o, v in needs if s is stream and o is of)
        if of in prepared.sources:
            batch = adapter.collate(examples[stream]).to(_device(adapter.model))
            outputs[stream, of] = prepared.sources[of].outputs(adapter.model, batch, want)
            continue
        holder = {Of.CURRENT: adapter, Of.REFERENCE: reference, Of.INCOMPETENT: incompetent, Of.ORACLE: oracle}[of]
        if holder is None:
            raise InputError(
                f"{recipe.name!r} reads {_MODELS[of]}, and none was given.", f"Give an adapter that holds it: {of}=..."
            )
        if not examples[stream]:
            raise InputError(f"{recipe.name!r} reads {stream} records, and none were given.")
        batch = holder.collate(examples[stream]).to(_device(holder.model))
        with torch.set_grad_enabled(of is Of.CURRENT and torch.is_grad_enabled()):
            outputs[stream, of] = holder.forward(holder.model, batch, want)
    return combine(recipe, Views(outputs, adapter.layers(), prepared.made), examples)


def combine(recipe: Recipe, views: Views, examples: Mapping[Stream, Sequence[Example]]) -> dict[str, Tensor]:
    """Mean of every term and the weighted total, from views that hold all that the terms read."""
    out: dict[str, Tensor] = {}
    parts: list[Tensor] = []
    sizes = [len(examples.get(stream, ())) for stream in (Stream.FORGET, Stream.RETAIN)]
    coefficients = recipe.balance.coefficients({}, sizes[0] / max(1, sum(sizes)))
    for side, terms, coefficient in zip(("forget", "retain"), (recipe.forget, recipe.retain), coefficients, strict=True):
        for term in terms:
            mean = term.total(views) / term.divisor(examples[term.stream])
            name = key = f"{side}.{term.name}"
            number = 2
            while key in out:
                key, number = f"{name}#{number}", number + 1
            out[key] = mean
            parts.append(mean * (term.weight * coefficient))
    out["total"] = torch.stack(parts).sum()
    return out


class _Flat:
    """The flattening of one stream: one row per supervised target, one per real token."""

    def __init__(self, stream: Stream, given: Given) -> None:
        labels, mask = given.labels, given.attention_mask
        if given.logits.ndim != 3 or given.logits.shape[:2] != labels.shape:
            raise InputError(f"{stream}: logits must be [B, T, V] and labels [B, T]; got {_shapes(given.logits, labels)}.")
        self.stream = stream
        self.shape = labels.shape
        self.real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
        supervised = labels != IGNORE
        self.chosen = supervised[:, 1:]
        self.owner, column = self.chosen.nonzero(as_tuple=True)
        self.targets = labels[:, 1:][self.chosen]
        per_example = self.chosen.sum(1)
        starts = per_example.cumsum(0) - per_example
        self.position = torch.arange(len(column), device=labels.device) - starts[self.owner]
        self.counts = tuple(per_example.tolist())
        self.token_owner = self.real.nonzero(as_tuple=True)[0]
        self.token_supervised = (supervised & (torch.arange(labels.shape[1], device=labels.device) > 0))[self.real]
        self.token_counts = tuple(self.real.sum(1).tolist())
        marked = torch.zeros_like(self.real) if given.marked is None else given.marked.bool()
        if marked.shape != labels.shape:
            raise InputError(f"{stream}: marks must have the shape of the labels; got {_shapes(marked, labels)}.")
        self.marked = marked[:, 1:][self.chosen]

    def examples(self) -> list[Example]:
        """Examples that only carry their sizes."""
        marked = torch.bincount(self.owner[self.marked], minlength=self.shape[0]).tolist()
        sizes = enumerate(zip(self.counts, self.token_counts, marked, strict=True))
        return [Example(f"{self.stream}{i}", f"{self.stream}{i}", n, size, None, n_marked=m) for i, (n, size, m) in sizes]

    def outputs(self, logits: Tensor | None, features: Mapping[str, Tensor] | None) -> Outputs:
        """The outputs of one model, with what it was given."""
        ids = tuple(f"{self.stream}{i}" for i in range(self.shape[0]))
        batch = Batch(
            ids,
            {},
            self.targets,
            self.owner,
            self.position,
            self.counts,
            self.token_owner,
            self.token_supervised,
            self.token_counts,
            self.marked,
        )
        values: dict[str, Tensor] = {}
        if logits is not None:
            if logits.shape[:2] != self.shape:
                raise InputError(f"{self.stream}: all logits must be of one shape; got {tuple(logits.shape)}.")
            values["logits"] = logits[:, :-1][self.chosen].float()
            values["losses"] = F.cross_entropy(values["logits"], self.targets, reduction="none")
        for layer, states in (features or {}).items():
            if states.ndim != 3 or states.shape[:2] != self.shape:
                raise InputError(f"{self.stream}: features must be [B, T, D]; got {tuple(states.shape)} for {layer!r}.")
            values[f"features:{layer}"] = states[self.real]
        return Outputs.of(batch, values)


def _needs(recipe: Recipe, layers: Sequence[str]) -> frozenset[Need]:
    try:
        return recipe.needs(layers)
    except InputError as error:
        raise InputError(
            f"{recipe.name!r} reads features that were not given: {error.message}", "Give features by block name."
        ) from None


def _check_given(recipe: Recipe, need: Need, outputs: Mapping[tuple[Stream, Of], Outputs]) -> None:
    stream, of, value = need
    found = outputs.get((stream, of))
    if found is None:
        raise InputError(
            f"{recipe.name!r} reads {stream} examples, and none were given.", f"Give {stream}=Given(logits, labels)."
        )
    if value.partition(":")[0] == "values":
        raise InputError(f"{recipe.name!r} reads value vectors of attention, which cannot be given.", "Use loss_on.")
    if value not in found.values:
        kind = "features" if value.startswith("features") else "logits"
        name = kind if of is Of.CURRENT else f"{of}_{kind}"
        raise InputError(
            f"{recipe.name!r} reads the {value} of the {of} model on {stream} examples.", f"Give {stream}=Given(..., {name}=...)."
        )


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(t.shape)) for t in tensors)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
