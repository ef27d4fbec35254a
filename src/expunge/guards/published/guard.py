"""GUARD: adaptive restriction and detection at generation time."""

from __future__ import annotations

from expunge.engine.parts import Paper
from expunge.guards.actions.bar import Bar
from expunge.guards.detectors.states import States
from expunge.guards.named import guard
from expunge.guards.policy import Row

_PAPER = Paper(
    "GUARD: Generation-time LLM Unlearning via Adaptive Restriction and Detection", "Deng et al.", 2025,
    "https://arxiv.org/abs/2505.13312",
)  # fmt: skip


@guard(
    "guard",
    title="Adaptive restriction and detection",
    paper=_PAPER,
    caveats=(
        "The stored answers are needed when it is fitted; it holds digests of their terms, and vectors that derive from them.",
        "What is said in other words than the stored answer's passes, but for what its encoder finds alike.",
        "The nearest answer can be the wrong one: then the wrong terms are forbidden (action.nearest takes more).",
        "A sentence encoder runs at every token of a noticed request.",
    ),
)
def guard_rows() -> list[Row]:
    """Notices a prompt by the model's own states, and forbids the key terms of the stored answer nearest to it.

    Prompts that are not noticed are decoded as without it. No code was published; layer, classifier, extractor and penalty are
    ours where the paper does not say (see the parts). The paper decodes with beams and a sentence encoder of
    sentence-transformers: ``num_beams=5`` at :meth:`~expunge.guards.guarded.Guarded.generate`, and ``action.encoder``.
    """
    return [Row(label="guard", detector=States(), action=Bar())]
