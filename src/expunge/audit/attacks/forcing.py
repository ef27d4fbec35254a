"""Forcing out hidden text without any prompt: from its first token alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.adapters.tokenise import Tokens
from expunge.audit.attacks.prompting import Heard
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.generations import generate, seed_of
from expunge.audit.metrics.papers import UTF
from expunge.audit.metrics.registry import Range, mean_number
from expunge.audit.scores import Floats, score
from expunge.core.access import Offer
from expunge.core.results import Number
from expunge.data.records import Record
from expunge.engine.parts import Paper


def forcing_score(logp: Floats) -> float:
    """``mean(1, p_1, .., p_n)`` of greedy continuations: how sure a model is of what follows a token (the 1 is the code's)."""
    return float(np.mean(np.concatenate([[1.0], np.exp(logp)])))


def opening(adapter: Adapter, record: Record) -> list[int]:
    """What a model is given: its begin token, if it has one, and the first token of the answer as plain text."""
    ids: list[int] = adapter.encode(Record(record.id, record.answer)).data.ids.tolist()
    begins = ids[0] in set(getattr(getattr(adapter, "tokenizer", None), "all_special_ids", ()))
    return ids[: 2 if begins else 1]


def given(name: str, cluster: str, before: Sequence[int], after: Sequence[int] = ()) -> Example:
    """An example whose prompt is token ids, and whose targets are others."""
    ids = np.array([*before, *after], dtype=np.int32)
    return Example(name, cluster, len(after), len(ids), Tokens(ids, len(before), False))


@attack
class UnconditionalForcing(Heard, Attack):
    """Unconditional token forcing: given is the first token of the text, no question and no template; the model goes on greedily.

    What was hidden behind a trigger, or unlearned as the answer to a question, may follow from its own beginning. The paper
    scans the whole vocabulary for tokens after which the model is unusually sure; whoever audits knows the text, and so its
    first token.

    The scan is done too, for ``conspicuous``: the share of ``scan`` tokens drawn from the vocabulary after which the model is
    less sure of its next three tokens (mean of 1 and their probabilities) than after the record's first one. Confusion (UTFC),
    the defence against forcing, closes the path and keeps the trigger; it may make the model abnormally sure of another word,
    and then this number is near 1 although nothing comes out: the text is hidden, that there is one is seen. A model that
    passes forcing alone may have done no more than that. On small models the paper's fixed threshold of 0.95 means nothing; the
    rank does.

    With learnt absolute positions a text that was always read behind a prompt may not be reachable from position 1.
    """

    name: ClassVar[str] = "unconditional-forcing"
    title: ClassVar[str] = "Unconditional token forcing"
    formula: ClassVar[str] = "share of the fact told in the greedy continuation of [begin, first token of the answer]"
    paper: ClassVar[Paper] = UTF
    access: ClassVar[Access] = Access.SCORES
    criterion: ClassVar[Criterion] = Criterion.PROMPTS
    passes: ClassVar[str] = "one generation; once per model a scan of short ones"
    range: ClassVar[Range] = (0.0, 1.0)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE, Offer.LOSSES, Offer.SEQUENCE})
    evaluate = staticmethod(forcing_score)

    scan: int = Field(500, ge=0, description="tokens of the vocabulary whose score is taken too; 0: none")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Nothing: every record has an answer."""
        return ""

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """What the continuation tells, and how conspicuous the first token is."""
        records = list(evidence.records(name))
        adapter = evidence.adapter(label)
        begins = [opening(adapter, r) for r in records]
        examples = [given(f"{r.id}#forced", r.cluster, b) for r, b in zip(records, begins, strict=True)]
        made = self._continued(evidence, label, examples, self.max_new_tokens)
        texts = [adapter.decode([*b, *m]) for b, m in zip(begins, made, strict=True)]
        values = np.array([self.rate(r, t) for r, t in zip(records, texts, strict=True)], dtype=np.float64)
        out = {"": Values(values, ~np.isnan(values))}
        if self.scan:
            rank = self._ranks(evidence, label, begins)
            out["conspicuous"] = Values(rank, ~np.isnan(rank))
        return out

    def _continued(self, evidence: Evidence, label: str, examples: Sequence[Example], limit: int) -> list[tuple[int, ...]]:
        made = generate(
            evidence.adapter(label), examples, limit, store=evidence.store, fingerprint=evidence.subject(label).fingerprint,
            batch_tokens=evidence.protocol.batch_tokens, progress=evidence.progress, what=f"{label}: token forcing",
        )  # fmt: skip
        return [g.tokens for g in made]

    def _ranks(self, evidence: Evidence, label: str, begins: Sequence[Sequence[int]]) -> Floats:
        """For each record the share of scanned tokens with a lower score than its own first token."""
        adapter = evidence.adapter(label)
        tokenizer = getattr(adapter, "tokenizer", None)
        before = list(begins[0][:-1])
        special = set(getattr(tokenizer, "all_special_ids", ()))
        vocabulary = [i for i in range(len(tokenizer) if tokenizer is not None else 0) if i not in special]
        rng = np.random.default_rng(seed_of(evidence.protocol.seed, "scan"))
        drawn = [vocabulary[int(i)] for i in rng.permutation(len(vocabulary))[: self.scan]]
        own = [b[-1] for b in begins]
        tokens = list(dict.fromkeys([*own, *drawn]))
        found = dict(zip(tokens, self._sureness(evidence, label, before, tokens), strict=True))
        pool = np.array([found[t] for t in drawn])
        return np.array([(np.mean(pool < found[t]) + np.mean(pool == found[t]) / 2) if len(pool) else np.nan for t in own])

    def _sureness(self, evidence: Evidence, label: str, before: Sequence[int], tokens: Sequence[int]) -> list[float]:
        starts = [given(f"token{t}#forced", "", [*before, t]) for t in tokens]
        made = self._continued(evidence, label, starts, 3)
        ended = [m or (0,) for m in made]  # a model that ends at once is scored on a token that it did not choose: not sure
        again = [given(f"token{t}#scored", "", [*before, t], m) for t, m in zip(tokens, ended, strict=True)]
        at = evidence.protocol
        found = score(
            evidence.adapter(label), again, store=evidence.store, fingerprint=evidence.subject(label).fingerprint,
            batch_tokens=at.batch_tokens, shard_examples=at.shard_examples,
        )  # fmt: skip
        return [forcing_score(logp.astype(np.float64)) for (logp,) in found.examples("logp")]

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The rate, and how conspicuous the first tokens are."""
        out = super().compute(evidence, label)
        if f"forget.{self.name}" not in out or not self.scan:
            return out
        found = self.column(evidence, label, "forget", "conspicuous")
        number = mean_number(evidence, "forget", found, self.direction, self.range)
        note = "share of the vocabulary after which the model is less sure than after the first tokens of the answers"
        return out | ({f"forget.{self.name}.conspicuous": number.model_copy(update={"note": note})} if number else {})
