"""ECO: embedding-corrupted prompts."""

from __future__ import annotations

from expunge.engine.parts import Paper
from expunge.guards.actions.corrupt import Corrupt
from expunge.guards.detectors.classifier import Classifier
from expunge.guards.named import guard
from expunge.guards.policy import Row

_PAPER = Paper(
    "Large Language Model Unlearning via Embedding-Corrupted Prompts", "Liu, Wang, Flanigan, Liu", 2024,
    "https://arxiv.org/abs/2406.07933",
)  # fmt: skip


@guard(
    "eco",
    title="Embedding-corrupted prompts",
    paper=_PAPER,
    caveats=(
        "It needs a model whose embeddings can be reached: it cannot stand before another server.",
        "The classifier tells who may ask often what it was taught.",
        "Words around a question can hide it from the classifier; then nothing is corrupted.",
        "Answers under corruption are made up or meaningless, and are not marked as such.",
    ),
)
def eco_rows() -> list[Row]:
    """Classifies prompts, and corrupts the embeddings of those about a target when the prompt is read; decoding is free.

    Prompts that are not noticed are answered bit for bit as without it. The published classifier is a fine-tuned roberta-base
    (``detector.model=roberta-base``) with fixed thresholds; the default here is a regression on n-grams with a conformal one. The
    published code hooks every call of more than one token, and removes all hooks of the model when it ends; here a hook knows the
    columns of the prompt, and only its own are removed. How strong the noise must be: :func:`expunge.guards.strength.strength`.
    """
    return [Row(label="eco", detector=Classifier(), action=Corrupt())]
