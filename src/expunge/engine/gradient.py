"""What is done to the gradient: nothing, projection off retain gradients, null spaces, large entries only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Stream
from expunge.core.errors import InputError, nearest
from expunge.core.registry import Registry
from expunge.engine.moving import PLAIN, Moving
from expunge.engine.null_space import NullSpaceGradient
from expunge.engine.options import Engine
from expunge.engine.parts import Gradient, Recipe

GRADIENTS: Registry[type[Gradient]] = Registry("gradient rule", None, "expunge.gradients")

_ROUNDS = 12  # in which the step and the metric that depends on it must agree
_AGREED = 1e-5
_HALVINGS = 40
_FAR = 1e3  # share of the retain gradient, in lengths of the forget gradient, beyond which the root never lies
_TINY = 1e-300
_BLOCK = 2**16  # numbers of each direction at a time
_DEPENDENT = 1e-7  # share of the largest eigenvalue below which directions count as dependent


class Plain(Gradient):
    """The sum of both gradients, from one backward pass."""

    name: ClassVar[str] = "plain"
    by_term: ClassVar[bool] = False

    def combine(self, forget: list[Tensor], retain: list[Tensor], state: dict[str, Any], moving: Moving = PLAIN) -> list[Tensor]:
        """The sum; the engine never calls this, it lets one backward pass add them."""
        return [f + r for f, r in zip(forget, retain, strict=True)]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).to(torch.promote_types(tensor.dtype, torch.float32))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor], metric: Sequence[Tensor] | None = None) -> float:
    """``sum a m b``: tensor by tensor in the type of ``a``, at least float32, and over tensors in float64."""
    left = [_flat(x) for x in a] if metric is None else [_flat(x) * _flat(m) for x, m in zip(a, metric, strict=True)]
    return float(torch.stack([torch.dot(x, _flat(y).to(x.dtype)) for x, y in zip(left, b, strict=True)]).double().sum())


def project_off(
    vector: Sequence[Tensor], directions: Sequence[Sequence[Tensor]], metric: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """``vector`` without its part in the span of some directions: the result ``v`` has ``<d, v> = sum d m v = 0`` for each.

    By the Gram matrix of the directions, so no orthogonal basis is held beside them; dependent directions (and ones that are 0)
    do no harm. Beside the result it holds a few blocks of numbers.

    Args:
        vector: one tensor per parameter.
        directions: each in the same shapes.
        metric: positive factors of the inner product, in the same shapes; none: all 1.
    """

    def rows(at: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The directions' part of one tensor in blocks ``[k, <=_BLOCK]``, and the same times the metric."""
        flat = [_flat(d[at]) for d in directions]
        factors = None if metric is None else _flat(metric[at]).to(flat[0].dtype)
        for start in range(0, len(flat[0]), _BLOCK):
            part = slice(start, start + _BLOCK)
            held = torch.stack([f[part] for f in flat])
            yield part, held, held if factors is None else held * factors[part]

    found = list(vector)
    count = len(directions)
    gram = torch.zeros(count, count, dtype=torch.float64)
    inverse = gram
    for passes in range(1 if count == 1 else 2):  # the second pass removes what rounding left
        shares = torch.zeros(count, dtype=torch.float64)
        for at, value in enumerate(found):
            flat = _flat(value)
            for part, held, weighed in rows(at):
                shares += (weighed @ flat[part].to(held.dtype)).double().cpu()
                if passes == 0:
                    gram += (weighed @ held.T).double().cpu()
        if passes == 0:
            inverse = _inverse(gram)
        weights = inverse @ shares
        for at, value in enumerate(found):
            flat = _flat(value).clone()
            for part, held, _ in rows(at):
                flat[part] -= (weights.to(held) @ held).to(flat.dtype)
            found[at] = flat.view(value.shape).to(value.dtype)
    return found


def _inverse(gram: Tensor) -> Tensor:
    """Pseudo-inverse of a Gram matrix, after its directions are brought to length 1."""
    sizes = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    values, vectors = torch.linalg.eigh(gram / sizes[:, None] / sizes)
    kept = values > _DEPENDENT * len(gram)
    inverse: Tensor = vectors[:, kept] / values[kept] @ vectors[:, kept].T
    return inverse / sizes[:, None] / sizes


class Project(Gradient):
    """Geometric-disentanglement update: the forget gradient only outside the span of retain gradients, these as they are.

    ``g = g_f - sum_j c_j u_j + g_r`` with ``c`` such that the first two are orthogonal to every ``u_j`` (GU, arXiv 2511.17100).
    To first order the forget part of the step leaves the retain loss of the batch as it is. It attaches to any recipe with a
    forget and a retain term; ``retain.weight`` is the paper's alpha.

    * ``directions=1``: away from the retain gradient of the step, the rank-1 form. ``directions=k``: away from those of the last
      k steps, of which the oldest is dropped at each step (one published revision fills its basis once and never again; that is
      stale, and not followed).
    * ``scope=all``: one inner product over all tensors. ``scope=tensor``: one for each, the paper's form with 8 directions;
      it implies the other and takes more away. A tensor of no more than k entries then keeps no forget gradient.
    * ``geometry=optimizer``: orthogonal in the metric of the optimiser, so the *step* is, not only the gradient: for AdamW
      ``<a, b> = sum a b / (sqrt(v) + eps)``, which is whitening, projection and its undoing in one. The second moment is that
      after the step, found by repetition, since it depends on the result. Exact only with ``schedule.momentum=0`` (beta1 of
      Adam) and ``schedule.weight_decay=0``: momentum mixes in earlier directions. A run that is not exact says so;
      ``exact=true`` refuses it. In the first steps of AdamW, whose size hardly depends on that of the gradient, rounding shows:
      one forward pass or several end farther apart than otherwise. ``geometry=plain`` is the paper's first form; AdamW bends it.
    * ``when=conflict``: only where ``<g_f, g_r> < 0``. With one direction and plain geometry that is PCGrad's surgery of the
      forget gradient, ``gradient=pcgrad``.
    * ``tensors``: project these tensors only, and leave the forget gradient of the others alone. The published trainer
      takes the last five blocks, the last norm and the head; the invariance then holds for these tensors' part alone.

    Memory: two gradients of the P moving weights, and with k directions ``(k - 1) P`` more numbers in the precision of the
    weights, ``bytes = (k + 1) P * width``; under AdamW up to four more P in passing, for the metric. It does not grow with the
    retain set.
    """

    name: ClassVar[str] = "project"

    directions: int = Field(
        1, ge=1, le=64, description="retain gradients of how many steps the forget gradient is kept away from"
    )
    scope: Literal["all", "tensor"] = Field("all", description="one projection over all tensors, or one for each")
    when: Literal["always", "conflict"] = Field("always", description="project always, or only where both gradients conflict")
    geometry: Literal["optimizer", "plain"] = Field(
        "plain", description="inner product: that of the optimiser's step, or of the gradients as they are"
    )
    exact: bool = Field(False, description="refuse an optimiser under which the step is not orthogonal though the gradient is")
    tensors: tuple[str, ...] = Field((), description="regular expressions: only tensors with such a name; none: all")

    def begin(
        self, moving: Moving, adapter: Adapter, model: nn.Module, examples: Mapping[Stream, Sequence[Example]], engine: Engine
    ) -> dict[str, Any]:
        """Find the tensors to project, and refuse what would not be exact if that is asked for."""
        inexact = self.notes(moving)
        if self.exact and inexact:
            raise InputError(inexact[0], "Set schedule.momentum=0 schedule.weight_decay=0.")
        try:
            searches = [re.compile(p) for p in self.tensors]
        except re.error as error:
            raise InputError(f"A pattern of gradient={self.name} is no regular expression: {error}.") from None
        chosen = [i for i, n in enumerate(moving.names) if not searches or any(s.search(n) for s in searches)]
        if not chosen:
            close = nearest(self.tensors[0], {part for n in moving.names for part in n.split(".") if not part.isdigit()})
            raise InputError(
                f"gradient={self.name} finds no moving tensor called {' or '.join(self.tensors)}.",
                f"Some that move: {', '.join(close or moving.names[:5])}.",
            )
        return {"chosen": chosen}

    def notes(self, moving: Moving) -> list[str]:
        """Why the step is not orthogonal to the retain gradients, if it is not."""
        found = []
        if moving.memory:
            found.append(f"a share of {moving.memory:g} of earlier steps (momentum)")
        if moving.decay:
            found.append(f"weight decay of {moving.decay:g}")
        if not found:
            return []
        return [f"gradient={self.name} is exact for the gradient, not for the step: it also has {' and '.join(found)}."]

    def combine(self, forget: list[Tensor], retain: list[Tensor], state: dict[str, Any], moving: Moving = PLAIN) -> list[Tensor]:
        """Project the forget gradient off the last retain gradients and add this step's."""
        chosen = list(moving.made.get("chosen", range(len(forget))))
        largest = max((float(retain[i].abs().max()) for i in chosen if retain[i].numel()), default=0.0)
        # At a size of 1, so that products of small gradients are numbers too.
        now = [retain[i] / largest if largest > 0 else retain[i] for i in chosen]
        directions = [now, *state.get("recent", [])]
        found = self._projected(forget, retain, directions, chosen, moving)
        if self.directions > 1 and largest > 0:
            state["recent"] = directions[: self.directions - 1]
        return [f + r for f, r in zip(found, retain, strict=True)]

    def _projected(
        self, forget: list[Tensor], retain: list[Tensor], directions: list[list[Tensor]], chosen: list[int], moving: Moving
    ) -> list[Tensor]:
        """The forget gradient outside the directions, in the metric of the step that it makes with the retain gradient."""
        metric = self._metric(moving, forget, retain)
        found = self._off(forget, directions, chosen, metric)
        if metric is None:
            return found
        for _ in range(_ROUNDS):
            metric = self._metric(moving, found, retain)
            if self._agree(found, directions[0], chosen, metric):
                return found
            found = self._off(forget, directions, chosen, metric)
        # Before AdamW has a memory its step is a sign, and repetition need not settle; there is one direction then.
        return self._off_sign(forget, retain, directions[0], chosen, moving) if len(directions) == 1 else found

    def _metric(self, moving: Moving, forget: Sequence[Tensor], retain: Sequence[Tensor]) -> list[Tensor] | None:
        if self.geometry == "plain":
            return None
        return moving.scales([f + r for f, r in zip(forget, retain, strict=True)])

    def _groups(self, chosen: Sequence[int]) -> list[list[int]]:
        """Positions, among the chosen tensors, of those that are projected together."""
        everything = list(range(len(chosen)))
        return [everything] if self.scope == "all" else [[i] for i in everything]

    def _off(
        self, forget: Sequence[Tensor], directions: Sequence[Sequence[Tensor]], chosen: Sequence[int], metric: list[Tensor] | None
    ) -> list[Tensor]:
        """Projection in a given metric, group by group."""
        out = list(forget)
        for group in self._groups(chosen):
            places = [chosen[i] for i in group]
            vector = [forget[p] for p in places]
            spans = [[d[i] for i in group] for d in directions]
            factors = None if metric is None else [metric[p] for p in places]
            if self.when == "conflict" and _dot(vector, spans[0], factors) >= 0:
                continue
            for place, value in zip(places, project_off(vector, spans, factors), strict=True):
                out[place] = value
        return out

    def _off_sign(
        self, forget: list[Tensor], retain: list[Tensor], direction: list[Tensor], chosen: list[int], moving: Moving
    ) -> list[Tensor]:
        """Projection off one direction by halving: its share grows or shrinks until the step is orthogonal to it."""
        groups = [[(chosen[i], i) for i in group] for group in self._groups(chosen)]
        start = self._metric(moving, forget, retain) or []
        low, high = [0.0] * len(groups), [0.0] * len(groups)
        for at, group in enumerate(groups):
            ours, theirs = [forget[p] for p, _ in group], [direction[i] for _, i in group]
            if self.when == "always" or _dot(ours, theirs, [start[p] for p, _ in group]) < 0:
                high[at] = _FAR * (_dot(ours, ours) / max(_dot(theirs, theirs), _TINY)) ** 0.5
                low[at] = -high[at]
        found = forget
        for _ in range(_HALVINGS):
            shares = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
            found = list(forget)
            for group, share in zip(groups, shares, strict=True):
                for place, i in group:
                    found[place] = forget[place] - share * direction[i]
            metric = self._metric(moving, found, retain) or []
            for at, group in enumerate(groups):
                across = _dot([found[p] for p, _ in group], [direction[i] for _, i in group], [metric[p] for p, _ in group])
                low[at], high[at] = (shares[at], high[at]) if across > 0 else (low[at], shares[at])
        return found

    def _agree(
        self, found: Sequence[Tensor], held: Sequence[Tensor], chosen: Sequence[int], metric: Sequence[Tensor] | None
    ) -> bool:
        """Whether what was found is orthogonal to the retain gradient in the metric of the step that it makes."""
        if metric is None:
            return True
        for group in self._groups(chosen):
            places = [chosen[i] for i in group]
            ours, theirs, factors = [found[p] for p in places], [held[i] for i in group], [metric[p] for p in places]
            size = (_dot(ours, ours, factors) * _dot(theirs, theirs, factors)) ** 0.5
            across = _dot(ours, theirs, factors)
            if abs(across) > _AGREED * size and not (self.when == "conflict" and across > 0):
                return False
        return True


class ConflictProject(Project):
    """PCGrad on the forget side: project off the retain gradient, but only where the two conflict (``<g_f, g_r> < 0``).

    Yu et al. 2020, arXiv 2001.06782; the retain gradient is left as it is because keeping has priority here. It is
    ``gradient=project when=conflict geometry=plain``.
    """

    name: ClassVar[str] = "pcgrad"

    when: Literal["always", "conflict"] = Field("conflict", description="project always, or only where both gradients conflict")
    geometry: Literal["optimizer", "plain"] = Field(
        "plain", description="inner product: that of the optimiser's step, or of the gradients as they are"
    )


def begun(
    recipe: Recipe,
    adapter: Adapter,
    model: nn.Module,
    optimizer: Any,
    *,
    examples: Mapping[Stream, Sequence[Example]],
    engine: Engine,
) -> Moving:
    """What a recipe's rule may know of the tensors that move, with what it makes before the first step.

    Args:
        recipe: whose rule and schedule.
        adapter: the modality.
        model: to be trained; unwrapped.
        optimizer: of its moving tensors.
        examples: by stream.
        engine: seed, and examples per forward pass.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    moving = Moving(tuple(n for n, _ in named), optimizer, tuple(p for _, p in named), recipe.schedule.clip)
    with torch.random.fork_rng():
        torch.manual_seed(engine.seed)
        return replace(moving, made=recipe.gradient.begin(moving, adapter, model, examples, engine))


class Salient(Plain):
    """In every step only the entries with a large gradient move: ``|g| >= mean(|g|) + n_std * std(|g|)``.

    Mean and standard deviation are over all trainable entries together, ``g`` is the gradient of the whole loss in this step
    (weight saliency of Stable Sequential Unlearning, arXiv 2406.10952). All others keep their value in this step bit for bit:
    neither momentum nor weight decay moves them. The log says which share moved (``moved``).
    """

    name: ClassVar[str] = "salient"

    n_std: float = Field(0.0, ge=-4, le=16, description="standard deviations above the mean at which a gradient counts as large")

    def entries(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """The entries at or above the threshold."""
        count = sum(g.numel() for g in gradient)
        mean = sum(g.abs().sum(dtype=torch.float64) for g in gradient) / count
        square = sum((g.abs().double() - mean).square().sum() for g in gradient) / max(1, count - 1)
        threshold = mean + self.n_std * torch.as_tensor(square).sqrt()
        return [g.abs() >= threshold for g in gradient]


for rule in (Plain, Project, ConflictProject, NullSpaceGradient, Salient):
    GRADIENTS.add(rule.name, rule)
