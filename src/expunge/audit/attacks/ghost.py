"""Ghost sentences: random words that somebody put into texts, so that training on them can be proved, and unlearning too.

A sentence of words drawn at random is found nowhere else: who continues it has read it. A record is a plain text (or a prompt
and its continuation as one text) in which the sentence is the marked span; without a span the whole text is the sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from scipy import special

from expunge.adapters.base import Example
from expunge.audit.asking import Ask, encoded, told
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.generations import seed_of
from expunge.audit.metrics.papers import GHOST
from expunge.audit.metrics.registry import Range
from expunge.audit.scores import Floats, score
from expunge.core.access import Offer
from expunge.core.results import Direction, Number
from expunge.core.statistics import wilson
from expunge.data.records import Record
from expunge.engine.parts import Paper


@dataclass(frozen=True)
class Ghost:
    """A sentence and the text before it."""

    before: str
    words: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The words, one space apart."""
        return " ".join(self.words)


def ghost(record: Record) -> Ghost | None:
    """The ghost sentence of a record; none where it is a question and answer, or has fewer than three words."""
    if not (record.is_text or record.verbatim):
        return None
    start, stop = (record.spans[0][0], record.spans[-1][1]) if record.spans else (0, len(record.answer))
    parts = tuple(record.answer[start:stop].split())
    return Ghost(record.prompt + record.answer[:start], parts) if len(parts) > 2 else None


def same_words(text: str, expected: Sequence[str]) -> bool:
    """Whether a text begins with these words, whatever their case and the marks around them."""
    found = [w.strip(".,;:!?\"'()").lower() for w in text.split()[: len(expected)]]
    return found == [w.strip(".,;:!?\"'()").lower() for w in expected]


def by_chance(hits: int, tries: int, words: int, k: int) -> float:
    """Probability of at least ``hits`` in ``tries`` sentences if each comes by a chance of ``words ** -k``."""
    return 1.0 if hits <= 0 else float(special.betainc(hits, tries - hits + 1, float(words) ** -k))


class GhostAttack(Attack):
    """What both tests share: which records have a sentence, and the list its words are from."""

    paper: ClassVar[Paper] = GHOST
    range: ClassVar[Range] = (0.0, 1.0)

    def lacks(self, evidence: Evidence, name: str) -> str:
        """At least one sentence."""
        if any(isinstance(r, Record) and ghost(r) for r in evidence.records(name)):
            return ""
        return "it needs plain texts with a sentence of random words in them (their marked span, or the whole text)"

    def pool(self, evidence: Evidence) -> list[str]:
        """All words of the sentences of all sets: the list from which they were drawn, as far as it can be seen."""
        found = {w for n in evidence.sets for r in evidence.records(n) if isinstance(r, Record) for w in _words(r)}
        return sorted(found)


def _words(record: Record) -> tuple[str, ...]:
    found = ghost(record)
    return found.words if found else ()


@attack
class GhostLastWords(GhostAttack):
    """Last-k words test: given all but the last ``k`` words of the sentence, does the model write these?

    By chance a hit comes about once in ``|W|^k`` sentences (``|W|``: words of the list), so one or two already tell. Words are
    compared, not tokens. ``subjects`` is the share of subjects (users, works) with at least one hit.
    """

    name: ClassVar[str] = "ghost-last-words"
    title: ClassVar[str] = "Ghost sentence, last words"
    formula: ClassVar[str] = "share of sentences whose last k words follow greedily from what comes before them"
    access: ClassVar[Access] = Access.TEXT
    criterion: ClassVar[Criterion] = Criterion.BEHAVIOUR
    passes: ClassVar[str] = "one generation"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE, Offer.SEQUENCE})

    k: int = Field(1, ge=1, le=5, description="words to be guessed")
    alone: bool = Field(False, description="whether the sentence is given without the text before it")
    max_new_tokens: int = Field(24, ge=1, description="longest continuation in tokens")

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """1 for a hit, 0 for none; absent for records without a sentence, or one that is too short."""
        records = list(evidence.records(name))
        found = [ghost(r) for r in records]
        asks = [self._ask(r, g) for r, g in zip(records, found, strict=True)]
        style = f"{self.name} {self.model_dump_json()}"
        texts = told(evidence, label, name, asks, self.max_new_tokens, style=style, suffix="#ghost", stops=())
        values = np.full(len(records), np.nan)
        for i, (held, text) in enumerate(zip(found, texts, strict=True)):
            if held is not None and text is not None:
                values[i] = float(same_words(text, held.words[-self.k :]))
        return Values(values, ~np.isnan(values))

    def _ask(self, record: Record, held: Ghost | None) -> Ask | None:
        if held is None or len(held.words) <= self.k:
            return None
        head, tail = " ".join(held.words[: -self.k]), " ".join(held.words[-self.k :])
        before = "" if self.alone else held.before
        return Ask(replace(record, prompt=before + head, answer=" " + tail, messages=(), verbatim=True, spans=()))

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The share of hits, and the share of subjects with one."""
        out = super().compute(evidence, label)
        key = f"forget.{self.name}"
        if key not in out:
            return out
        found = self.values(evidence, label, "forget")
        hits, tries = int(np.nansum(found.values)), int(found.present.sum())
        chance = by_chance(hits, tries, len(self.pool(evidence)), self.k)
        out[key] = out[key].model_copy(
            update={"note": f"{hits} hits of {tries}; by chance so many or more have probability {chance:.2g}"}
        )
        names = np.array(evidence.clusters("forget"))[found.present]
        caught = {c for c, v in zip(names, found.values[found.present], strict=True) if v > 0}
        share = wilson(len(caught), len(set(names)), evidence.protocol.level)
        note = "share of subjects with at least one hit"
        return out | {f"{key}.subjects": share.number(self.direction, self.range, note)}


@attack
class GhostPerplexity(GhostAttack):
    """Perplexity test: is the sentence likelier than fresh ones from the same words, which nobody has ever published?

    The value of a record is the share of ``fresh`` sentences that are less likely (ties count half): 1 for what was learnt, 0.5
    for what was never seen, and near 0 for what was pushed away, which is a trace too. Its mean is the ROC AUC between inserted
    and fresh sentences. The words are drawn from all sentences of the request's sets, or from a list.
    """

    name: ClassVar[str] = "ghost-perplexity"
    title: ClassVar[str] = "Ghost sentence, perplexity"
    formula: ClassVar[str] = "share of fresh sentences with a higher perplexity; p = (1 + #{fresh <= observed}) / (1 + #fresh)"
    access: ClassVar[Access] = Access.SCORES
    criterion: ClassVar[Criterion] = Criterion.LIKELIHOOD
    passes: ClassVar[str] = "one pass per fresh sentence"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.LOSSES, Offer.SEQUENCE})

    fresh: int = Field(20, ge=1, description="fresh sentences per record")
    alone: bool = Field(False, description="whether the sentence is read without the text before it")
    words: tuple[str, ...] = Field((), description="the list of words; none: those of the sentences at hand")

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """The share of fresh sentences that are less likely, and the p-value."""
        records = list(evidence.records(name))
        adapter, at = evidence.adapter(label), evidence.protocol
        pool = list(self.words) or self.pool(evidence)
        examples: list[Example] = []
        owners: list[int] = []
        for i, record in enumerate(records):
            held = ghost(record)
            for j, sentence in enumerate(self._sentences(evidence, record, held, pool) if held else ()):
                examples.append(encoded(adapter, Ask(self._read(record, held, sentence)), f"#ghost{j}"))
                owners.append(i)
        found = score(
            adapter, examples, store=evidence.store, fingerprint=evidence.subject(label).fingerprint,
            batch_tokens=at.batch_tokens, shard_examples=at.shard_examples, progress=evidence.progress,
            what=f"{label}: perplexity of ghost sentences",
        )  # fmt: skip
        losses, owner = found.nll("exclude"), np.array(owners, dtype=np.int64)
        share, p = np.full((2, len(records)), np.nan)
        for i in np.unique(owner):
            share[i], p[i] = standing(losses[owner == i][0], losses[owner == i][1:])
        return {"": Values(share, ~np.isnan(share)), "p": Values(p, ~np.isnan(p))}

    def _sentences(self, evidence: Evidence, record: Record, held: Ghost | None, pool: Sequence[str]) -> list[str]:
        if held is None:
            return []
        rng = np.random.default_rng(seed_of(evidence.protocol.seed, record.id))
        drawn = [" ".join(pool[int(i)] for i in rng.integers(len(pool), size=len(held.words))) for _ in range(self.fresh)]
        return [held.sentence, *drawn]

    def _read(self, record: Record, held: Ghost | None, sentence: str) -> Record:
        before = "" if held is None or self.alone else held.before.rstrip(" ")
        text: dict[str, Any] = {"prompt": before, "verbatim": True, "answer": " " + sentence} if before else {}
        return replace(record, **{"prompt": "", "answer": sentence, "verbatim": False, **text}, messages=(), spans=())

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The mean share, and how many sentences are below p = 0.05."""
        out = super().compute(evidence, label)
        key = f"forget.{self.name}"
        if key not in out:
            return out
        p = self.column(evidence, label, "forget", "p")
        low = int((p.values[p.present] <= 0.05).sum())
        found = wilson(low, int(p.present.sum()), evidence.protocol.level)
        note = "share of sentences that stand out from the fresh ones at p = 0.05; unseen ones do in one of twenty"
        return out | {f"{key}.found": found.number(Direction.REFERENCE, self.range, note)}


def standing(observed: float, fresh: Floats) -> tuple[float, float]:
    """Share of ``fresh`` losses above the observed one (ties half), and the p-value of one as low."""
    above = float(np.mean(fresh > observed) + np.mean(fresh == observed) / 2)
    return above, float((1 + np.sum(fresh <= observed)) / (1 + len(fresh)))
