"""Terms that push a score past a sigmoid: NPO and its relatives. One link function, different scores."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.core.search import Search
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term
from expunge.methods.terms.functions import preference_link, sequence_mean, sequence_ratio


class Preference(Term):
    """``(2/beta) softplus(-beta * score)``, where the score grows as the forget answer loses probability."""

    per: ClassVar[Literal["target", "example", "token"]] = "example"
    reads: ClassVar[tuple[tuple[Stream, Of], ...]]

    beta: Annotated[float, Search(0.01, 1.0, log=True)] = Field(
        0.1, gt=0, description="inverse temperature: the smaller, the more like gradient ascent"
    )

    @property
    def stream(self) -> Stream:
        """Forget examples."""
        return Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Losses only, so that the reference can be cached."""
        return frozenset((stream, of, "losses") for stream, of in self.reads)

    def values(self, views: Views) -> Tensor:
        """The link of the score, float32."""
        return preference_link(self.score(views), self.beta)

    @abc.abstractmethod
    def score(self, views: Views) -> Tensor:
        """What the sigmoid is taken of, before ``beta``."""


@term
class NPO(Preference):
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    Score: ``log p_ref(y|x) - log p(y|x)`` *summed* over the answer's tokens (a token mean would make beta 0.1 far too small
    and the term plain ascent). At the reference its gradient is that of the summed ascent for every beta, and its value is
    ``(2/beta) ln 2``.
    """

    name: ClassVar[str] = "npo"
    reads: ClassVar[tuple[tuple[Stream, Of], ...]] = ((Stream.FORGET, Of.CURRENT), (Stream.FORGET, Of.REFERENCE))

    def score(self, views: Views) -> Tensor:
        """Log-ratio of the sequence, ``[B]``."""
        return sequence_ratio(views.current(Stream.FORGET), views.reference(Stream.FORGET))


@term
class TNPO(NPO):
    """NPO with every token as its own sequence (Wang et al. 2025, arXiv 2502.19301).

    The gradient is that of token-wise ascent weighted by ``2 p^beta / (p^beta + p_ref^beta)``.
    """

    name: ClassVar[str] = "tnpo"
    per: ClassVar[Literal["target", "example", "token"]] = "target"

    def score(self, views: Views) -> Tensor:
        """Log-ratio of the token, ``[N]``."""
        return views.current(Stream.FORGET).losses - views.reference(Stream.FORGET).losses


@term
class SimNPO(Preference):
    """NPO without a reference (Fan et al. 2024, arXiv 2410.07163): score ``NLL / length - delta``.

    So every answer has the same total weight whatever its length, and answers that were hard from the start are not pushed
    as hard as well-known ones. ``delta`` is the paper's margin ``gamma``, under the name that implementations use because
    they call the coefficient of the term gamma.
    """

    name: ClassVar[str] = "simnpo"
    reads: ClassVar[tuple[tuple[Stream, Of], ...]] = ((Stream.FORGET, Of.CURRENT),)

    beta: Annotated[float, Search(0.5, 10.0, log=True)] = Field(
        4.5, gt=0, description="inverse temperature (paper: 2.5 to 4.5 on TOFU, 0.7 on MUSE)"
    )
    delta: Annotated[float, Search(0.0, 2.0)] = Field(
        0.0, ge=0, description="margin: mean loss per token at which the push is half of its maximum"
    )

    def score(self, views: Views) -> Tensor:
        """Mean loss minus the margin, ``[B]``."""
        return sequence_mean(views.current(Stream.FORGET)) - self.delta


@term
class DPO(Preference):
    """Direct preference optimisation with the forget answer as the loser (Rafailov et al. 2023, arXiv 2305.18290).

    Score: log-ratio of the forget answer (as in NPO) minus that of the alternative, both summed over tokens. The factor
    2/beta, which standard DPO does not have, is kept so that NPO is exactly this term without its winner, and so that the
    step does not depend on beta.
    """

    name: ClassVar[str] = "dpo"
    paired: ClassVar[bool] = True
    reads: ClassVar[tuple[tuple[Stream, Of], ...]] = (
        (Stream.FORGET, Of.CURRENT), (Stream.FORGET, Of.REFERENCE),
        (Stream.ALTERNATIVE, Of.CURRENT), (Stream.ALTERNATIVE, Of.REFERENCE),
    )  # fmt: skip

    def score(self, views: Views) -> Tensor:
        """Difference of the two log-ratios, ``[B]``."""
        lost = sequence_ratio(views.current(Stream.FORGET), views.reference(Stream.FORGET))
        return lost - sequence_ratio(views.current(Stream.ALTERNATIVE), views.reference(Stream.ALTERNATIVE))
