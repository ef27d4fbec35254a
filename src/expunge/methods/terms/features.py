"""Terms on hidden states: steering to a random direction (RMU), staying at the reference's, looking where a proxy looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid, normalize

from expunge.adapters.base import Example, Outputs
from expunge.core.access import Of, Stream
from expunge.core.search import Search
from expunge.engine.parameters import block_index
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term


class States(Term):
    """A term on the hidden states after one block, averaged over tokens.

    The mean runs over the tokens of all sequences together, so sequences of unequal length are weighed by their length
    (a known implementation averages inverse lengths separately, which is neither this nor the mean of sequence means).
    """

    per: ClassVar[Literal["target", "example", "token"]] = "token"
    reads: ClassVar[Stream]

    layer: int | None = Field(
        None,
        ge=-512,
        lt=512,
        description="block, counted from 0, negative from the end; none: 7/32 of the depth, as in the paper",
    )
    tokens: Literal["all", "supervised"] = Field(
        "all", description="which input tokens: also those of the prompt, or targets only"
    )

    @property
    def stream(self) -> Stream:
        """The stream that the class reads."""
        return self.reads

    def states(self, views: Views, of: Of) -> Tensor:
        """Hidden states of the chosen block, ``[M, D]``, float32."""
        return views[self.reads, of].features(self.block(views.layers)).float()

    def block(self, layers: Sequence[str]) -> str:
        """Name of the block."""
        return layers[block_index(self.layer, layers)]

    def counted(self, view: Outputs, per_token: Tensor) -> Tensor:
        """Values ``[M]``, 0 at tokens that do not count."""
        return per_token if self.tokens == "all" else per_token.masked_fill(~view.token_supervised, 0.0)

    def count(self, examples: Sequence[Example]) -> int:
        """Tokens that count."""
        return sum(e.size if self.tokens == "all" else e.n_targets for e in examples)


class Features(States):
    """Squared distance of hidden states: ``reduce=sum`` is the squared norm; ``reduce=mean``, common in code, D times smaller."""

    reduce: Literal["sum", "mean"] = Field("sum", description="over hidden dimensions")

    def distance(self, view: Outputs, states: Tensor, goal: Tensor) -> Tensor:
        """Squared distance of each token, 0 where it does not count, ``[M]``."""
        squares = (states - goal).square()
        return self.counted(view, squares.sum(-1) if self.reduce == "sum" else squares.mean(-1))


@term
class RMU(Features):
    """Representation misdirection (Li et al. 2024, arXiv 2403.03218): steer forget states to ``coefficient * u``.

    ``u`` is drawn uniformly from ``[0, 1)^D`` and normalised; it depends on ``seed`` and D only, not on the device. The
    coefficient 6.5 was chosen for the norm of the states of a 7B model; widely used implementations take 2.
    """

    name: ClassVar[str] = "rmu"
    reads: ClassVar[Stream] = Stream.FORGET

    coefficient: Annotated[float, Search(around=10)] = Field(
        6.5, gt=0, description="length c of the vector that the states are steered to"
    )
    seed: int = Field(0, ge=0, description="seed of the random direction")

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Features of the current model."""
        return frozenset({(self.reads, Of.CURRENT, f"features:{self.block(layers)}")})

    def direction(self, size: int) -> Tensor:
        """The unit vector u, ``[size]``, on the CPU."""
        u = torch.rand(size, generator=torch.Generator().manual_seed(self.seed))
        unit: Tensor = u / u.norm()
        return unit

    def values(self, views: Views) -> Tensor:
        """Squared distance of each token's state to the vector, ``[M]``."""
        states = self.states(views, Of.CURRENT)
        goal = self.direction(states.shape[-1]).to(states.device) * self.coefficient
        return self.distance(views.current(self.reads), states, goal)


@term
class FeatureMatch(Features):
    """Retain states stay where the frozen target has them: the retain side of RMU (Li et al. 2024, arXiv 2403.03218)."""

    name: ClassVar[str] = "features"
    reads: ClassVar[Stream] = Stream.RETAIN

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Features of both models."""
        value = f"features:{self.block(layers)}"
        return frozenset({(self.reads, Of.CURRENT, value), (self.reads, Of.REFERENCE, value)})

    def values(self, views: Views) -> Tensor:
        """Squared distance of each token's state to that of the reference, ``[M]``."""
        goal = self.states(views, Of.REFERENCE).detach()
        return self.distance(views.current(self.reads), self.states(views, Of.CURRENT), goal)


@term
class Deviation(States):
    """Forget states turn away from where the frozen target has them (KUDA, arXiv 2602.19275).

    ``-(2 / beta) log sigmoid(beta D)`` per token with ``D = 1 - cos(h + nudge |h| u, h_ref)``, or ``form=cosine``: the cosine
    itself. At the start h is h_ref, where the cosine is largest and its gradient 0: without the nudge, a fixed random unit vector
    u by a small share of the state's length, nothing would ever move. The paper's code is not public and its formulas were not at
    hand: this follows the structure of its description, and beta (its inverse temperature: the larger, the sooner a token that
    has turned away is left in peace) has a default of ours.
    """

    name: ClassVar[str] = "deviation"
    reads: ClassVar[Stream] = Stream.FORGET

    form: Literal["sigmoid", "cosine"] = Field("sigmoid", description="log-sigmoid of the deviation, or the cosine as it is")
    beta: float = Field(1.0, gt=0, description="inverse temperature of the log-sigmoid")
    nudge: float = Field(0.05, gt=0, le=1, description="length of the first push, as a share of the state's own")
    seed: int = Field(0, ge=0, description="seed of its direction")

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Features of both models."""
        value = f"features:{self.block(layers)}"
        return frozenset({(self.reads, Of.CURRENT, value), (self.reads, Of.REFERENCE, value)})

    def values(self, views: Views) -> Tensor:
        """The loss of each token, ``[M]``."""
        states, before = self.states(views, Of.CURRENT), self.states(views, Of.REFERENCE).detach()
        drawn = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(self.seed))
        push = normalize(drawn, dim=0).to(states.device) * self.nudge * states.detach().norm(dim=1, keepdim=True)
        cosine = cosine_similarity(states + push, before, dim=1)
        value = cosine if self.form == "cosine" else -2 / self.beta * logsigmoid(self.beta * (1 - cosine))
        return self.counted(views.current(self.reads), value)


@term
class AttentionMaps(Term):
    """Forget rows are looked at as a network looks at them that has never seen them (Tarun et al. 2023, arXiv 2210.08196).

    ``sum over layers of mean_p (A_p - A_p(incompetent))^2`` with the attention map ``A``: squared activations, averaged over
    channels, as one vector per row, of length 1. Of a layer that puts out a vector (of a perceptron) the squares themselves.
    """

    name: ClassVar[str] = "attention-maps"

    layers: tuple[int, ...] | None = Field(
        None, description="blocks, counted from 0, negative from the end; none: all but the last, which makes the output"
    )

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def blocks(self, layers: Sequence[str]) -> list[str]:
        """Names of the blocks."""
        if self.layers is None:
            return list(layers[:-1] or layers)
        return [layers[block_index(i, layers)] for i in self.layers]

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Maps of both networks."""
        sources = (Of.CURRENT, Of.INCOMPETENT)
        return frozenset((Stream.FORGET, of, f"maps:{name}") for name in self.blocks(layers) for of in sources)

    def values(self, views: Views) -> Tensor:
        """Squared distance of the maps of each row, ``[N]``."""
        parts = []
        for name in self.blocks(views.layers):
            ours, theirs = (_direction(views[Stream.FORGET, of].maps(name)) for of in (Of.CURRENT, Of.INCOMPETENT))
            parts.append((ours - theirs).square().mean(1))
        return torch.stack(parts).sum(0)


def _direction(maps: Tensor) -> Tensor:
    """Each row at length 1, in float32 at least."""
    return normalize(maps.to(torch.promote_types(maps.dtype, torch.float32)), dim=1)
