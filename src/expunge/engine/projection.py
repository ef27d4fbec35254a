"""Directions of the residual stream that hold what is to be forgotten, learnt and taken out for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter
from expunge.adapters.head import base
from expunge.adapters.projection import Projection, install, installed, settle
from expunge.adapters.storage import text_config
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.search import Search
from expunge.engine.covariance import Moment, check_room, null_space, state_moments
from expunge.engine.options import Engine
from expunge.engine.parts import Parameters
from expunge.engine.preparation import Examples, Tell


def directions(wanted: Tensor, kept: Tensor, count: int, energy: float) -> Tensor:
    """The directions that are strongest in one set of states once the span of another is taken out: ``top_k PCA(H (1 - P))``.

    P is the projector onto the strongest directions of the other set that together hold ``energy`` of its second moment. Nothing
    is centred.

    Args:
        wanted: mean second moment of H, ``[D, D]``, float64.
        kept: of the other set.
        count: k.
        energy: in (0, 1].

    Returns:
        Orthonormal rows ``[k, D]``, the strongest first.

    Raises:
        InputError: fewer than k directions are left.
    """
    rest = null_space(kept, energy=1.0 - energy, may_be_empty=True)
    left = rest.project(rest.project(wanted).T)
    values, vectors = torch.linalg.eigh((left + left.T) / 2)
    floor = float(values.abs().max()) * len(values) * torch.finfo(wanted.dtype).eps
    floor = max(floor, float(wanted.diagonal().sum()) * torch.finfo(torch.float32).eps)  # states are float32 at best
    found = int((values > floor).sum())
    if found < count:
        raise InputError(
            f"The forget states have {found} directions outside those of the retain set, and {count} are to be taken out.",
            "Lower parameters.energy or parameters.rank.",
        )
    strongest: Tensor = vectors[:, -count:].flip(1).T.contiguous()
    return strongest


class ProjectedStates(Parameters):
    """Directions after some blocks, taken out of the residual stream for good; the weights stay as they are (MRP, 2025).

    After block l the state h becomes ``h (1 - Q^T Q)``, Q an orthonormal basis of ``[W_old; W]``: W_old are the directions of
    earlier requests, W ``[k, D]`` is what is trained, through the decomposition, in float32. W begins as the k strongest
    directions of the forget states (the outputs of block l at all tokens) outside of the retain subspace, which is spanned by the
    strongest directions of the retain states that hold ``energy`` of their second moment. No states are kept: the two moments
    are summed in float64, ``8 D^2`` bytes each for every block.

    What is learnt becomes part of the model (:mod:`expunge.adapters.projection`), so a later request finds it as W_old. Training
    on other parts of the model cannot bring the directions back at that place.
    """

    name: ClassVar[str] = "projection"
    factors: ClassVar[bool] = True
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.FEATURES, Offer.TEXT})

    rank: Annotated[int, Search(1, 8)] = Field(2, ge=1, description="k: directions that a request takes out after each block")
    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="blocks, counted from 0, negative from the end; none: by 'count' and 'choice'"
    )
    count: int = Field(2, ge=1, description="number of blocks, where none are named")
    choice: Literal["middle", "random"] = Field(
        "middle", description="which: those in the middle, or as published any but the last, drawn by the seed"
    )
    seed: int = Field(0, ge=0, description="of the draw")
    energy: Annotated[float, Search(0.5, 0.999)] = Field(
        0.9, gt=0, le=1, description="share of the retain states' second moment that the protected subspace holds at the start"
    )
    start: Literal["forget", "official"] = Field(
        "forget",
        description="where W begins: what is strong in the forget states outside of the retain subspace, or as in the official "
        "code the other way round",
    )
    examples: int = Field(5000, ge=1, description="examples of each side from which the second moments are computed, at most")

    def blocks(self, layers: Sequence[str]) -> list[str]:
        """The names of the blocks, from the input to the output.

        Raises:
            InputError: the model has no such blocks, or fewer.
        """
        depth = len(layers)
        if self.layers is not None:
            wrong = [i for i in self.layers if not -depth <= i < depth]
            if wrong:
                raise InputError(
                    f"Layer {wrong[0]} is out of range: the model has {depth} blocks.", f"Use -{depth} to {depth - 1}."
                )
            return [layers[i] for i in sorted({i % depth for i in self.layers})]
        most = depth if self.choice == "middle" else depth - 1
        if self.count > most:
            raise InputError(
                f"Directions are to be taken out after {self.count} blocks; parameters.choice={self.choice} has {most} to offer.",
                "Lower parameters.count.",
            )
        if self.choice == "middle":
            first = (depth - self.count) // 2
            return list(layers[first : first + self.count])
        drawn = np.random.default_rng([self.seed, 53]).permutation(most)[: self.count]
        return [layers[int(i)] for i in sorted(drawn)]

    def memory(self, weights: int) -> int:
        """Nothing: the moments are checked against what is free where their size is known."""
        return 0

    def begin(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None = None) -> Any:
        """Find where W begins, and put it into the model.

        Raises:
            InputError: no such blocks, a set is missing, no room, as many directions as the states are wide, or none to take.
        """
        model: Any = adapter.model
        if base(model) is not model:
            raise InputError(
                f"Directions are taken out of a plain model, and this is a {type(model).__name__}.", "Merge its adapter first."
            )
        names = self.blocks(adapter.layers())
        held = {n: p.basis for n, p in installed(model).items()}
        width = int(text_config(model).hidden_size)
        self._check(names, held, width, next(model.parameters()).device)
        moments: list[dict[str, Moment]] = []
        for stream in self.reads:
            said = f"states of the {stream} set"
            moments.append(
                state_moments(
                    adapter, names, examples.get(stream, ()), width=width, max_units=engine.max_tokens, limit=self.examples,
                    seed=engine.seed, what=f"parameters={self.name} looks at {stream} examples",
                    tell=None if tell is None else partial(_told, tell, said),
                )
            )  # fmt: skip
        wanted, kept = moments if self.start == "forget" else moments[::-1]
        rows = {n: directions(wanted.pop(n).mean(), kept.pop(n).mean(), self.rank, self.energy) for n in names}
        model.requires_grad_(False)
        for name, found in rows.items():
            install(model, name, Projection(held.get(name, found.new_zeros(0, width)), found))
        return model

    def _check(self, names: Sequence[str], held: Mapping[str, Tensor], width: int, device: torch.device) -> None:
        for name in names:
            earlier = len(held.get(name, ()))
            if earlier + self.rank >= width:
                more = f" beside the {earlier} of earlier requests" if earlier else ""
                raise InputError(
                    f"{self.rank} directions{more} are to be taken out after {name!r}, where states are {width} wide: "
                    "nothing would be left.",
                    f"Give parameters.rank below {width - earlier}.",
                )
        check_room(
            [width] * (2 * len(names)), device, f"parameters={self.name}", remedy="Choose fewer blocks (parameters.count).",
            of="moments of states",
        )  # fmt: skip

    def prepare(self, model: Any, layers: Sequence[str]) -> Any:
        """Not enough: the directions depend on the data."""
        raise InputError("parameters=projection begins from the data.", "Call begin().")

    @contextmanager
    def undone(self, model: nn.Module) -> Iterator[None]:
        """Without the directions that are being learnt."""
        learnt = [(p, p.rows) for p in installed(model).values()]
        try:
            for projection, _ in learnt:
                projection.rows = None
            yield
        finally:
            for projection, rows in learnt:
                projection.rows = rows

    def end(self, model: nn.Module) -> None:
        """What was learnt is no parameter any more."""
        settle(model)


def _told(tell: Tell, what: str, done: int, total: int) -> None:
    tell(done, total, what)
