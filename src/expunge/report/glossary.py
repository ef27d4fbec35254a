"""What the words of a report mean: verdicts, directions and metrics, in plain sentences.

A document may bring its own descriptions (``protocol["metrics"][name] = {"title": ..., "formula": ...}``); the texts here
serve the names that it leaves unexplained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.audit.document import AuditDocument
from expunge.core.results import Direction, Verdict

VERDICTS: Mapping[Verdict, str] = {
    Verdict.FORGOTTEN: "Equivalent to models that never saw the forget set, within the stated margins, and it stays so under "
    "the attacks that were run.",
    Verdict.SUPPRESSED: "Behaves as if forgotten, but an attack brings back what it does not bring back in a retrained model.",
    Verdict.NOT_FORGOTTEN: "Still knows more of the forget set than retrained models do.",
    Verdict.DAMAGED: "Lost utility beyond the margin, or was pushed past the retrained models on the far side, which is itself "
    "a trace.",
    Verdict.NO_GOLD: "There is no retrained model to compare with, so nothing can be concluded about forgetting.",
    Verdict.UNDECIDED: "The evidence is too thin to decide at the stated margins: more examples or more seeds are needed.",
}

ARROWS: Mapping[Direction, str] = {
    Direction.FORGET_DOWN: "↓",
    Direction.UTILITY_UP: "↑",
    Direction.UTILITY_DOWN: "↓",
    Direction.REFERENCE: "=",
    Direction.ZERO: "→0",
}

SHORT_DIRECTIONS: Mapping[Direction, str] = {
    Direction.FORGET_DOWN: "to retrained",
    Direction.UTILITY_UP: "better",
    Direction.UTILITY_DOWN: "better",
    Direction.REFERENCE: "retrained",
    Direction.ZERO: "best at zero",
}

DIRECTIONS: Mapping[Direction, str] = {
    Direction.FORGET_DOWN: "Lower means more forgotten, down to the retrained model's value; below it is over-unlearning.",
    Direction.UTILITY_UP: "Higher means more useful.",
    Direction.UTILITY_DOWN: "Lower means more useful.",
    Direction.REFERENCE: "Best where it equals the retrained model's value.",
    Direction.ZERO: "Best at zero; either side is a trace.",
}


@dataclass(frozen=True)
class Term:
    """A metric's name for people, what it says, and its formula."""

    title: str
    text: str = ""
    formula: str = ""


METRICS: Mapping[str, Term] = {
    "probability": Term("Answer probability", "Geometric mean of the probabilities the model gives to the answer's tokens."),
    "option-probability": Term("Probability among options", "The true answer's share of the probability of all offered answers."),
    "loss": Term("Answer loss", "Mean negative log-likelihood per answer token, in nats; 0 is perfect recall."),
    "rouge-l-recall": Term("ROUGE-L recall", "Share of the true answer's words that the generated answer repeats in order."),
    "truth-ratio": Term(
        "Truth ratio",
        "How probable wrong answers are against a correct paraphrase; large means the truth is no longer preferred.",
    ),
    "model-utility": Term("Model utility", "Harmonic mean over the sets that must be kept; the smallest part dominates it."),
    "forget-quality": Term(
        "Forget quality",
        "Kolmogorov-Smirnov p-value between the truth ratios of this model and the retrained one. A large p is no proof of "
        "equality, and p-values of sets of different sizes cannot be ranked.",
    ),
    "extraction-strength": Term(
        "Extraction strength", "Share of the answer that the model completes exactly once it is given the part before."
    ),
    "exact-memorisation": Term("Exact memorisation", "Share of the answer's tokens that the model ranks first."),
    "verbatim-memorisation": Term(
        "Verbatim memorisation", "ROUGE-L between the model's continuation of a passage and the true one."
    ),
    "knowledge-memorisation": Term("Knowledge memorisation", "ROUGE-L of the answers to questions about the passages."),
    "forget-quality.d": Term("Forget quality, KS statistic", "Largest distance of the two distributions of truth ratios."),
    "forget-quality.log10-p": Term("Forget quality, log10 p", "The same p-value where it is too small to be written plainly."),
    "membership.tpr-at-1": Term(
        "Membership attack, TPR at 1% FPR", "Share of the forget set found when one non-member in a hundred is accused."
    ),
    "privleak": Term(
        "PrivLeak",
        "How far a membership attack's AUC lies from its AUC on the retrained model, in per cent: one side is under-unlearning, "
        "the other over-unlearning.",
    ),
    "membership": Term(
        "Membership attack AUC", "How well the attack tells forget examples from examples never trained on; 0.5 is guessing."
    ),
    "relearn": Term(
        "Relearning", "After a few steps on part of the forget set: what comes back of the other part, which was not shown."
    ),
    "quantise": Term("Quantisation", "The same measurement after the weights were rounded to few bits."),
    "read-out": Term(
        "Reading out",
        "A new last layer is fitted on the model's features of the retain rows and half of the forget rows: what it says of the "
        "other half.",
    ),
    "knn": Term("Nearest neighbours", "Accuracy of 5 nearest neighbours in the features, on unseen rows of the forgotten kind."),
    "unified": Term("Unified score (H-LR)", "Agreement of outputs and of features with retrained models, harmonic mean."),
    "cka": Term("CKA with retrained models", "Similarity of the last features to those of retrained models, 0 to 1."),
    "cka-target": Term("CKA with the target", "Similarity of the last features to the target's; 1: they have not moved."),
    "degenerate": Term("Degenerate answers", "Share of generated answers that are broken text."),
    "repetition": Term("Repetition", "Share of the words of generated answers that repeat earlier ones."),
    "ngram-entropy": Term("N-gram entropy", "Variety of the words in generated answers, in bits; short answers have little."),
    "unended": Term("Answers without an end", "Share of generated answers that ran into the length limit."),
}


_ROWS: Mapping[str, Term] = {
    "loss": Term(
        "Loss", "Loss of a row: the cross-entropy of its class in nats, or the error of its number; 0 is perfect recall."
    ),
}

_PARTS: Mapping[str, str] = {
    "loss": "LOSS",
    "min-k": "Min-K%",
    "min-k-plus-plus": "Min-K%++",
    "reference": "reference model",
}


def term(document: AuditDocument, key: str) -> Term:
    """The title and meaning of the number called ``key`` (``forget.probability``, ``privleak.min-k``).

    What the document's protocol declares (``title``, ``text``, ``formula``), for the whole key or for the metric in it, comes
    before :data:`METRICS`; a name that neither knows is shown as it is.
    """
    parts = key.split(".")
    declared: Any = document.protocol.get("metrics")
    whole = declared.get(key) if isinstance(declared, Mapping) else None
    if isinstance(whole, Mapping) and whole.get("title"):
        return Term(str(whole["title"]), str(whole.get("text", "")), str(whole.get("formula", "")))
    if parts[0] in document.data and len(parts) > 1:
        parts = parts[1:]
    own = declared.get(parts[0]) if isinstance(declared, Mapping) else None
    said = own if isinstance(own, Mapping) else {}
    special = METRICS.get(f"{parts[0]}.{parts[-1]}")
    known = special or _of_rows(document, parts[0]) or METRICS.get(parts[0], Term(_plain(parts[0])))
    rest = parts[1:-1] if special else parts[1:]
    named = str((not special and said.get("title")) or known.title)
    title = ", ".join((named, *(_PARTS.get(p, p.replace("-", " ")) for p in rest)))
    return Term(title, str(said.get("text") or known.text), str(said.get("formula") or known.formula))


def _of_rows(document: AuditDocument, name: str) -> Term | None:
    """What a name means where a row is answered by a class or a number, if that is something else than for answers in words."""
    return _ROWS.get(name) if document.modality in ("classification", "regression") else None


def used(documents: Sequence[AuditDocument]) -> list[Term]:
    """Every metric of ``documents`` that has something said about it, each once, by title."""
    terms = {term(d, key) for d in documents for m in d.models for key in m.numbers}
    told: dict[tuple[str, str], Term] = {}
    for found in sorted(terms, key=lambda t: t.title):
        if found.text or found.formula:
            told.setdefault((found.text, found.formula), Term(found.title.split(",")[0], found.text, found.formula))
    return list(told.values())


def _plain(name: str) -> str:
    words = name.replace("-", " ").replace("_", " ").strip()
    return words[:1].upper() + words[1:]
