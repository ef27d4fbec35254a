"""Inverted hinge loss: a loss term and the method made of it."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from expunge.core.access import Of, Stream
from expunge.engine.parts import Need, Paper, Recipe, Term, Views
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.registry import method, term
from expunge.methods.terms.likelihood import NLL

LOKU = Paper(
    "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs",
    "Sungmin Cha, Sungjun Cho, Dasol Hwang, Moontae Lee",
    2024,
    "https://arxiv.org/abs/2408.06621",
)


@term
class InvertedHinge(Term):
    """``1 + p(y) - max_{v != y} p(v)`` per target, in [0, 2]: the true token gives way to its best rival, the rest stays."""

    name: ClassVar[str] = "inverted-hinge"
    stream: ClassVar[Stream] = Stream.FORGET

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Logits of the forget targets under the model being changed."""
        return frozenset({(Stream.FORGET, Of.CURRENT, "logits")})

    def values(self, views: Views) -> Tensor:
        """One value per target, ``[N]``."""
        view = views.current(Stream.FORGET)
        p, true = view.logits.softmax(-1), view.targets.unsqueeze(1)
        rival = p.scatter(1, true, 0.0).amax(1)
        return 1 + p.gather(1, true).squeeze(1) - rival


@method(
    "ihl",
    title="Inverted hinge loss",
    paper=LOKU,
    formula="L = mean_tokens (1 + p(y) - max_{v != y} p(v)) + NLL(retain)",
    published=Fixed(lr=1e-4, epochs=5),
    with_paper={"parameters": {"name": "lora", "rank": 32, "alpha": 64.0}},
)
def ihl() -> Recipe:
    """Make the second choice the first. The paper trains a LoRA of rank 4 to 32 from an initialisation of its own."""
    return compose("ihl", forget=[InvertedHinge()], retain=[NLL()])
