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
    """A metric's name for people, and what it says."""

    title: str
    text: str = ""


_PROBABILITY = "Geometric mean of the probabilities the model gives to the answer's tokens; between 0 and 1."

METRICS: Mapping[str, Term] = {
    "probability": Term("Answer probability", _PROBABILITY),
    "nll": Term("Answer loss", "Mean negative log-likelihood per answer token, in nats; 0 is perfect recall."),
    "loss": Term("Answer loss", "Mean negative log-likelihood per answer token, in nats; 0 is perfect recall."),
    "rouge-l-recall": Term("ROUGE-L recall", "Share of the true answer's words that the generated answer repeats in order."),
    "rouge-l": Term("ROUGE-L", "Overlap, in order, of the generated answer with the true one."),
    "truth-ratio": Term(
        "Truth ratio",
        "How probable wrong answers are against a correct paraphrase; large means the truth is no longer preferred.",
    ),
    "model-utility": Term(
        "Model utility", "Harmonic mean of probability, ROUGE-L recall and truth ratio over the sets that must be kept."
    ),
    "forget-quality": Term(
        "Forget quality",
        "Kolmogorov-Smirnov p-value between the truth ratios of this model and the retrained one. A large p is no proof of "
        "equality, and p-values of sets of different sizes cannot be ranked.",
    ),
    "extraction-strength": Term(
        "Extraction strength", "Share of the answer that the model completes exactly once it is given the part before."
    ),
    "exact-memorization": Term("Exact memorisation", "Share of the answer's tokens that the model ranks first."),
    "exact-memorisation": Term("Exact memorisation", "Share of the answer's tokens that the model ranks first."),
    "verbmem": Term("Verbatim memorisation", "ROUGE-L between the model's continuation of a passage and the true one."),
    "knowmem": Term("Knowledge memorisation", "ROUGE-L of the answers to questions about the passages."),
    "privleak": Term(
        "PrivLeak",
        "How far a membership attack's AUC lies from its AUC on the retrained model, in per cent: one side is under-unlearning, "
        "the other over-unlearning.",
    ),
    "auc": Term(
        "Membership attack AUC", "How well the attack tells forget examples from examples never trained on; 0.5 is guessing."
    ),
    "relearn": Term(
        "Relearning", "After a few steps on part of the forget set: what comes back of the other part, which was not shown."
    ),
    "quantise": Term("Quantisation", "The same measurement after the weights were rounded to few bits."),
    "repetition": Term("Repetition", "Share of generated text that repeats itself."),
    "degeneration": Term("Degeneration", "Share of generated answers that are broken text."),
}


def term(document: AuditDocument, key: str) -> Term:
    """The title and meaning of the number called ``key`` (``forget.probability``, ``privleak.min-k``)."""
    parts = key.split(".")
    if parts[0] in document.data and len(parts) > 1:
        parts = parts[1:]
    declared: Any = document.protocol.get("metrics")
    for name in (".".join(parts), parts[0]):
        own = declared.get(name) if isinstance(declared, Mapping) else None
        if isinstance(own, Mapping):
            title = str(own.get("title") or METRICS.get(name, Term(_plain(name))).title)
            text = str(own.get("formula") or own.get("text") or METRICS.get(name, Term("")).text)
            return Term(_with_rest(title, parts, name), text)
        if name in METRICS:
            return Term(_with_rest(METRICS[name].title, parts, name), METRICS[name].text)
    return Term(_plain(" ".join(parts)))


def _with_rest(title: str, parts: list[str], name: str) -> str:
    rest = parts[len(name.split(".")) :]
    return f"{title}, {' '.join(rest)}" if rest else title


def _plain(name: str) -> str:
    words = name.replace("-", " ").replace("_", " ").replace(".", " ").strip()
    return words[:1].upper() + words[1:]


def used(documents: Sequence[AuditDocument]) -> list[tuple[str, str]]:
    """Title and meaning of every metric in ``documents`` that has one, each once, by title."""
    terms = {term(d, key) for d in documents for m in d.models for key in m.numbers}
    told: dict[str, str] = {}
    for found in sorted(terms, key=lambda t: t.title):
        if found.text and found.text not in told.values():
            told[found.title.split(",")[0]] = found.text
    return list(told.items())
