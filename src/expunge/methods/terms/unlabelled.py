"""Terms on features alone, which read no label: label-agnostic forgetting (Shen et al. 2024, arXiv 2404.00506)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.core.search import Search
from expunge.engine.parameters import block_index
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term
from expunge.methods.terms.functions import cosine_distance


class Unlabelled(Term):
    """A mean over the tokens (of rows: the rows) of a step, of a function of the features after one block.

    The published losses are sums over batches of equal size. By Adam both take the same steps, but for the last, smaller batch
    of a pass over the forget set, whose rows here count for more.
    """

    per: ClassVar[Literal["target", "example", "token"]] = "token"
    reads: ClassVar[Stream]

    layer: int = Field(-1, ge=-512, lt=512, description="block, counted from 0, negative from the end")

    @property
    def stream(self) -> Stream:
        """The stream that the class reads."""
        return self.reads

    def block(self, layers: Sequence[str]) -> str:
        """What is read of it."""
        return layers[block_index(self.layer, layers)]

    def features(self, views: Views, of: Of) -> Tensor:
        """Features of the class's stream, float32 ``[M, D]``."""
        return views[self.reads, of].features(self.block(views.layers)).float()


class Reconstruction(Unlabelled):
    """``sign * exp(m / (m + 1))`` with ``m = ||h(e) - e||^2`` by the autoencoder ``h`` of the stream: bounded, in ``[1, e)``."""

    uses: ClassVar[frozenset[str]] = frozenset({"autoencoders"})
    sign: ClassVar[float]

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Features of the current model."""
        return frozenset({(self.reads, Of.CURRENT, f"features:{self.block(layers)}")})

    def values(self, views: Views) -> Tensor:
        """One value per token, ``[M]``."""
        m = views.made["autoencoders"][self.reads].error(self.features(views, Of.CURRENT))
        found: Tensor = self.sign * (m / (m + 1)).exp()
        return found


@term
class LafKeep(Reconstruction):
    """Features of retain rows stay well reconstructed: ``mean exp(m / (m + 1))``, m by the autoencoder of all rows."""

    name: ClassVar[str] = "laf-keep"
    reads: ClassVar[Stream] = Stream.RETAIN
    sign: ClassVar[float] = 1.0


@term
class LafLeave(Reconstruction):
    """Features of forget rows become badly reconstructed: ``-mean exp(m / (m + 1))``, m by the forget set's autoencoder."""

    name: ClassVar[str] = "laf-leave"
    reads: ClassVar[Stream] = Stream.FORGET
    sign: ClassVar[float] = -1.0


class Alignment(Unlabelled):
    """On the cosine distance ``d`` of features from the frozen target's."""

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Features of both models."""
        value = f"features:{self.block(layers)}"
        return frozenset({(self.reads, Of.CURRENT, value), (self.reads, Of.REFERENCE, value)})

    def moved(self, views: Views) -> Tensor:
        """d of each token, in [0, 2], ``[M]``."""
        return cosine_distance(self.features(views, Of.CURRENT), self.features(views, Of.REFERENCE).detach())


@term
class LafStay(Alignment):
    """Features of retain rows stay where the target has them: ``mean_i d_i``, the numerator of the alignment loss."""

    name: ClassVar[str] = "laf-stay"
    reads: ClassVar[Stream] = Stream.RETAIN

    def values(self, views: Views) -> Tensor:
        """d of each token, ``[M]``."""
        return self.moved(views)


@term
class LafPart(Alignment):
    """Features of forget rows part from the target's: ``-log sum_j exp(d_j / tau)`` over those of a step.

    It is the denominator of the alignment loss, ``mean_i log(exp(d_i) / sum_j exp(d_j / tau))`` over retain rows i and forget
    rows j, so all forget rows of a step must be in one forward pass.
    """

    name: ClassVar[str] = "laf-part"
    reads: ClassVar[Stream] = Stream.FORGET
    whole: ClassVar[bool] = True

    tau: Annotated[float, Search(1.0, 50.0, log=True)] = Field(
        20.0, gt=0, description="temperature (published: 5 or 20, by task)"
    )

    def values(self, views: Views) -> Tensor:
        """The whole for each token, so that their mean is the whole, ``[M]``."""
        moved = self.moved(views)
        return -(moved / self.tau).logsumexp(0).expand(len(moved))
