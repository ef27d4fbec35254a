"""Concept vectors: has the place in the weights that holds a concept changed, and does the model still depend on it?

After Hong, Yu, Yang et al. (2024, arXiv 2406.11614). A value vector is a column of a feed-forward layer's output matrix; read
through the model's head it promotes some words. The sets hold :class:`~expunge.data.concepts.Concept` records, which say where
each vector is (``where=given``). That holds for one model only; for any other the vector is looked for (``where=found``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Adapter
from expunge.audit.attacks.traces import attributions, columns, jaccard, noised, promoted, strongest
from expunge.audit.evidence import Evidence, Values
from expunge.audit.facts import COMMON
from expunge.audit.generations import generate
from expunge.audit.metrics.likeness import alike
from expunge.audit.metrics.papers import CONCEPT_VECTORS
from expunge.audit.metrics.registry import Need, Range, RecordMetric, mean_number, metric
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Direction, Number
from expunge.data.concepts import Concept
from expunge.data.records import Record
from expunge.engine.parts import Paper

Where = Literal["given", "found"]
Place = tuple[int, int]
_READ = ("cosine", "distance", "overlap", "article", "related")
Ids = NDArray[np.int64]
PLAIN = frozenset(COMMON.split())  #: words that the article of any concept holds


def concept_words(before: Ids, after: Ids, article: set[int]) -> tuple[float, float]:
    """Words of the article among those that a vector promotes: how many there are now, and how many of the old ones.

    ``|after and A| / |before and A|`` (the paper's precise Jaccard; it may exceed 1) and ``|after and before and A| / |before
    and A|``, in [0, 1]. NaN where the vector promoted no word of the article.

    Args:
        before, after: ids of the words that the vector promotes most ``[k]``, in the target and in the model.
        article: ids of the words of the article, without those that have no meaning of their own.
    """
    old, new = set(map(int, before)) & article, set(map(int, after)) & article
    if not old:
        return float("nan"), float("nan")
    return len(new) / len(old), len(new & old) / len(old)


class _OnConcepts(RecordMetric):
    """What is measured at the vectors of concepts."""

    sets: ClassVar[tuple[str, ...] | None] = ("forget",)
    asks: ClassVar[bool] = True
    paper: ClassVar[Paper] = CONCEPT_VECTORS
    on_request: ClassVar[bool] = True
    direction: ClassVar[Direction] = Direction.FORGET_DOWN

    where: Where = Field("given", description="given: the vectors that the data name; found: by attribution, in any model")
    texts: str = Field("completion", description="the set with texts on the concepts, by which vectors are found")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Concepts, the target, and texts where vectors are looked for."""
        if not all(isinstance(r, Concept) for r in evidence.records(name)):
            return "its records name no value vectors"
        if not evidence.labels("target"):
            return "it needs the target model"
        return f"it needs a set {self.texts!r}" if self.where == "found" and self.texts not in evidence.sets else ""

    def places(self, evidence: Evidence, name: str) -> list[Place | None]:
        """Layer and unit of each concept's vector; None where it is to be found and there is no text on the concept.

        Found are those whose removal would raise the target's loss on the concept's texts most, to first order, and on the texts
        of the other concepts least.
        """
        concepts = concepts_of(evidence, name)
        if self.where == "given":
            return [(c.layer, c.unit) for c in concepts]
        target = evidence.labels("target")[0]

        def make() -> list[Place | None]:
            adapter, budget = dense(evidence.adapter(target)), evidence.protocol.batch_tokens
            texts = [belonging(evidence, name, c, self.texts) for c in concepts]
            scores = {i: attributions(adapter, [adapter.encode(r) for r in t], budget) for i, t in enumerate(texts) if t}
            out: list[Place | None] = [None] * len(concepts)
            for i, own in scores.items():
                others = [s for k, s in scores.items() if k != i]
                contrast = own - torch.stack(others).mean(0).clamp_min(0) if others else own
                layer, unit = strongest(contrast, 1)[0]
                out[i] = (layer, unit)
            return out

        return evidence.memo(("concept places", evidence.subject(target).fingerprint, name, self.texts), make)


def dense(adapter: Adapter) -> Adapter:
    """The adapter, or one of a copy whose low-rank updates are added to the weights that they change."""
    if not callable(getattr(adapter.model, "merge_and_unload", None)):
        return adapter
    made = adapter.copy()
    joined: Any = made.model
    made.model = joined.merge_and_unload()
    return made


def concepts_of(evidence: Evidence, name: str) -> list[Concept]:
    """The concepts of a set."""
    return [r for r in evidence.records(name) if isinstance(r, Concept)]


def belonging(evidence: Evidence, name: str, concept: Concept, other: str) -> list[Record]:
    """The records of another set that are about a concept: those of its subject, or all if there is one concept without one."""
    records: list[Record] = list(evidence.records(other))
    return [r for r in records if r.subject == concept.subject]


@metric
class ConceptVectors(_OnConcepts):
    """How far the vectors that hold concepts have moved from where they are in the target, and what words they promote now.

    The value is the cosine; beside it the distance, the overlap (Jaccard) of the words that are promoted most, and what is left
    of those that occur in the concept's article. The words are read through the model's own head, so they can change where the
    vector has not. An unchanged vector says that knowledge was hidden, and not removed; a changed one proves nothing by itself.
    Models that began at other random weights have other vectors in the same place: their cosine is near 0 and means nothing.
    """

    name: ClassVar[str] = "concept-vectors"
    title: ClassVar[str] = "Concept vectors"
    formula: ClassVar[str] = "cos(v, v_target) of the concept's value vector; mean over concepts"
    range: ClassVar[Range] = (-1.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    evaluate = staticmethod(concept_words)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.LOSSES, Offer.SEQUENCE})

    words: int = Field(200, ge=1, description="words that a vector promotes most; at most a tenth of all")

    def measured(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """``cosine``, ``distance``, ``overlap``, ``article`` and ``related`` of each concept."""
        key = ("concept vectors", self.model_dump_json(), evidence.subject(label).fingerprint, name)
        return evidence.memo(key, lambda: self._measured(evidence, label, name))

    def _read(self, evidence: Evidence, label: str, name: str) -> tuple[Tensor, Ids, list[set[int]]]:
        """A model's vectors that have a place, the words that they promote, and the words of the articles in its tokens."""
        key = ("concept vectors read", self.model_dump_json(), evidence.subject(label).fingerprint, name)

        def make() -> tuple[Tensor, Ids, list[set[int]]]:
            places = self.places(evidence, name)
            adapter = dense(evidence.adapter(label))
            vectors = columns(adapter, [p for p in places if p])
            pairs = zip(concepts_of(evidence, name), places, strict=True)
            articles = [article_words(adapter, c.article) for c, p in pairs if p]
            return vectors, promoted(adapter, vectors, self.words), articles

        return evidence.memo(key, make)

    def _measured(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        target = evidence.labels("target")[0]
        placed = np.array([p is not None for p in self.places(evidence, name)])
        if not placed.any():
            return {k: _spread(np.zeros(0), placed) for k in _READ}
        full, before, articles = self._read(evidence, target, name)
        try:
            own, after, _ = self._read(evidence, label, name)
            same = own.shape == full.shape
            reason = "" if same else "the model has another shape than the target."
        except InputError as error:
            reason = str(error)
        if reason:
            evidence.miss(f"{self.title} of {label!r} were not compared: {reason}")
            return {k: _spread(np.full(len(full), np.nan), placed) for k in _READ}
        told = [concept_words(b, a, w) for b, a, w in zip(before, after, articles, strict=True)]
        found = {
            "cosine": torch.cosine_similarity(own, full, dim=-1).clamp(max=1).numpy(),
            "distance": (own - full).norm(dim=-1).numpy(),
            "overlap": np.array([jaccard(a, b) for a, b in zip(after, before, strict=True)]),
            "article": np.array([t[0] for t in told]), "related": np.array([t[1] for t in told]),
        }  # fmt: skip
        return {k: _spread(v, placed) for k, v in found.items()}

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The cosine of each concept's vector."""
        return self.measured(evidence, label, name)["cosine"]

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The cosine, and ``.distance``, ``.overlap``, ``.article``, ``.related``."""
        out = super().compute(evidence, label)
        for name in [n for n in (self.sets or ()) if f"{n}.{self.name}" in out]:
            held = self.measured(evidence, label, name)
            for key, most in (("distance", None), ("overlap", 1.0), ("article", None), ("related", 1.0)):
                direction = Direction.REFERENCE if key == "distance" else Direction.FORGET_DOWN
                number = mean_number(evidence, name, held[key], direction, (0.0, most))
                if number is not None:
                    out[f"{name}.{self.name}.{key}"] = number
        return out


def article_words(adapter: Adapter, article: str) -> set[int]:
    """Ids of the tokens of an article whose words have a meaning of their own; nothing for a model without a tokenizer."""
    tokenizer: Any = getattr(adapter, "tokenizer", None)
    if tokenizer is None or not article:
        return set()
    ids = {int(i) for i in tokenizer(article, add_special_tokens=False, verbose=False)["input_ids"]}
    return {i for i in ids if (word := tokenizer.decode([i]).strip().casefold()) and word not in PLAIN and word[0].isalnum()}


@metric
class ConceptEffect(_OnConcepts):
    """Does the model still answer from the concept's vector? How much more its answers change by noise on it than other answers.

    Noise is put on the vector, and the model is asked before and after. The value is the likeness (ROUGE-L F1) of the answers to
    unrelated questions less that of the answers about the concept. In the target it validates the vector, as the paper does: near
    0, the vector does not hold the concept, and its other numbers say nothing. In an unlearned model a value as high as in the
    target says that the knowledge is used as before; near 0, the answers no longer come from there.
    """

    name: ClassVar[str] = "concept-effect"
    title: ClassVar[str] = "Effect of noise on the concept's vector"
    formula: ClassVar[str] = "likeness(unrelated answers) - likeness(answers about the concept), before and after noise"
    range: ClassVar[Range] = (-1.0, 1.0)
    needs: ClassVar[tuple[Need, ...]] = (Need.ANSWER,)
    evaluate = staticmethod(alike)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.LOSSES, Offer.SEQUENCE, Offer.GENERATE})

    noise: float = Field(0.1, gt=0, description="standard deviation of the noise on each weight of the vector; published: 0.1")
    relative: bool = Field(False, description="the noise is in units of the vector's root mean square")
    own: str = Field("qa", description="the set with questions about the concepts")
    unrelated: str = Field("unrelated", description="the set with questions about other things")
    max_new_tokens: int = Field(100, ge=1, description="longest answer in tokens")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Questions of both kinds, too."""
        missing = [s for s in (self.own, self.unrelated) if s not in evidence.sets]
        return super().lacks(evidence, name) or (f"it needs a set {missing[0]!r}" if missing else "")

    def sides(self, evidence: Evidence, label: str, name: str) -> NDArray[np.float64]:
        """Likeness of answers about each concept and of unrelated ones, ``[concepts, 2]``."""
        key = ("concept effect", self.model_dump_json(), evidence.subject(label).fingerprint, name)

        def make() -> NDArray[np.float64]:
            places = self.places(evidence, name)
            adapter, out = dense(evidence.adapter(label)), []
            for number, (concept, place) in enumerate(zip(concepts_of(evidence, name), places, strict=True)):
                asked = [belonging(evidence, name, concept, s) for s in (self.own, self.unrelated)]
                if place is None or not all(asked):
                    out.append([np.nan, np.nan])
                    continue
                before = [self._said(evidence, adapter, side) for side in asked]
                generator = torch.Generator().manual_seed(1_000_003 * evidence.protocol.seed + number)
                with noised(adapter, [place], self.noise, generator, relative=self.relative):
                    after = [self._said(evidence, adapter, side) for side in asked]
                out.append([alike(a, b) for a, b in zip(after, before, strict=True)])
            return np.array(out)

        return evidence.memo(key, make)

    def _said(self, evidence: Evidence, adapter: Adapter, records: Sequence[Record]) -> list[str]:
        examples = [adapter.encode(r) for r in records]
        made = generate(adapter, examples, self.max_new_tokens, batch_tokens=evidence.protocol.batch_tokens)
        return [g.text for g in made]

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """The difference of both sides for each concept."""
        try:
            found = self.sides(evidence, label, name)
        except InputError as error:
            evidence.miss(f"{self.title} was not measured of {label!r}: {error}")
            found = np.full((len(evidence.records(name)), 2), np.nan)
        return _spread(found[:, 1] - found[:, 0], np.ones(len(found), dtype=bool))


def _spread(values: NDArray[Any], placed: NDArray[np.bool_]) -> Values:
    """Values of the concepts whose vectors have a place, among all concepts."""
    array = np.full(len(placed), np.nan)
    array[placed] = values
    return Values(array, ~np.isnan(array))
