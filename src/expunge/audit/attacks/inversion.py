"""Inversion of prompts: do log-probabilities still tell who was asked about, after the prompt itself is gone?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.adapters.head import base
from expunge.adapters.passes import evaluating
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.generations import generate
from expunge.audit.inverter import Sequel, fit_inverter, recovered
from expunge.audit.kernel.arrays import Bools, Integers
from expunge.audit.kernel.inversion import log_ratios
from expunge.audit.metrics.papers import INVERSION
from expunge.audit.metrics.registry import Range, mean_number
from expunge.audit.metrics.rouge import lacks_questions
from expunge.audit.probes import take_clusters
from expunge.audit.store import device_of
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Number
from expunge.data.records import Item, Record
from expunge.engine.parts import Paper

_TOGETHER = 8  # texts whose log-probabilities over the whole vocabulary are held at a time


@attack
class PromptInversion(Attack):
    """The hidden prompt is reconstructed from the log-probabilities of the tokens that a model answers with (PILS).

    The model answers each prompt greedily; of each token, a few log-ratios hold its whole distribution
    (:mod:`~expunge.audit.kernel.inversion`). An inverter is trained, for each model anew and on its own answers, on retain
    prompts and on one half of the questions about every forgotten subject (in other words too, where records have them), and
    reads the other half. The value is the
    log-probability that it gives to the *telling* tokens of a prompt: those that stand in prompts about one subject alone, such
    as a name.

    What it finds is narrower than knowledge of facts: that the model still tells the forgotten subjects apart, so that who has
    log-probabilities, and not the prompt, finds out who was asked about. A retrained model has never seen them, but echoes
    something of any name; it is the control. A model that answers every such question alike hides its prompts better than
    retrained models do.

    The paper trains a T5-base on a million instructions and inverts prompts that have nothing to do with them; here a small
    encoder-decoder learns from the questions of the audit. With few of them it may learn too little even from the target. Then
    the target cannot be told from retrained models, and the audit says that the attack tells nothing.
    """

    name: ClassVar[str] = "prompt-inversion"
    title: ClassVar[str] = "Inversion of prompts"
    formula: ClassVar[str] = (
        "mean over telling tokens of log q(x_i | x_<i, a_1..a_T), a_t = log p_t(chosen_1..c) - log p_t(chosen_0)"
    )
    paper: ClassVar[Paper] = INVERSION
    access: ClassVar[Access] = Access.SCORES
    criterion: ClassVar[Criterion] = Criterion.LIKELIHOOD
    passes: ClassVar[str] = (
        "1 generation and 1 forward pass, also of retain records, and the training of an inverter for each model"
    )
    range: ClassVar[Range] = (None, 0.0)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.GENERATE, Offer.LOGITS, Offer.SEQUENCE})

    tokens: int = Field(16, ge=1, description="tokens of the answer that are read, at most")
    ratios: int = Field(0, ge=0, description="log-ratios of each token; 0: as many as the model is wide, and extra ones")
    extra: int = Field(100, ge=0, description="log-ratios beyond the width, against rounding")
    retain_examples: int = Field(256, ge=8, description="retain prompts that are learnt from, at most")
    epochs: int = Field(50, ge=1, description="passes of the inverter's training")
    rate: float = Field(3e-3, gt=0, description="its learning rate")
    noise: float = Field(0.5, ge=0, description="added to standardised log-ratios in its training: with few prompts it helps")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Prompts, a retain set, and subjects with several questions."""
        if "retain" not in evidence.sets:
            return "it needs a retain set"
        clusters = evidence.clusters(name)
        if not any(clusters.count(c) > 1 for c in set(clusters)):
            return "it needs forget subjects with two questions or more: it learns from some what it tries on the others"
        return lacks_questions(evidence, name)

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """Log-probability of the telling tokens; ``tokens``: share of them that are the likeliest; ``exact``: whole prompts."""
        adapter, seed = evidence.adapter(label), evidence.protocol.seed
        records = list(evidence.records(name))
        chosen = take_clusters(evidence.clusters("retain"), self.retain_examples, seed)
        others = [evidence.records("retain")[int(i)] for i in chosen]
        out = {k: np.full(len(records), np.nan) for k in ("", "tokens", "exact")}
        tried = held_out(evidence.clusters(name), seed)
        try:
            more = rewordings([r for r, t in zip(records, tried, strict=True) if not t] + others)
            pairs = self.sequels(evidence, label, adapter, [*records, *others, *more])
            learnt = [p for i, p in enumerate(pairs) if i >= len(records) or not tried[i]]
            words = np.concatenate([p.prompt for p in pairs])
            inverter = fit_inverter(learnt, words, epochs=self.epochs, rate=self.rate, noise=self.noise, seed=seed)
        except InputError as error:
            evidence.miss(f"{self.title} of {label!r} was not measured: {error.message}")
            return {k: Values(v, np.zeros(len(v), dtype=np.bool_)) for k, v in out.items()}
        kept = [evidence.clusters("retain")[int(i)] for i in chosen]
        telling = telling_tokens([p.prompt for p in pairs[: len(records) + len(others)]], [*evidence.clusters(name), *kept])
        where = [i for i in np.flatnonzero(tried).tolist() if telling[i].any()]
        for i, (logs, right) in zip(where, recovered(inverter, [pairs[i] for i in where]), strict=True):
            out[""][i], out["tokens"][i], out["exact"][i] = logs[telling[i]].mean(), right[telling[i]].mean(), right.all()
        present = np.isin(np.arange(len(records)), where)
        return {k: Values(v, present) for k, v in out.items()}

    def sequels(self, evidence: Evidence, label: str, adapter: Adapter, records: Sequence[Item]) -> list[Sequel]:
        """What follows each record's prompt: log-ratios of the tokens of the greedy answer, its end among them.

        Raises:
            InputError: the model does not say how wide it is, and ``ratios`` is 0.
        """
        examples = [adapter.encode(r) for r in records]
        made = generate(
            adapter, examples, self.tokens, store=evidence.store, fingerprint=evidence.subject(label).fingerprint,
            batch_tokens=evidence.protocol.batch_tokens, progress=evidence.progress, what=f"{label}: answers to be inverted",
        )  # fmt: skip
        answered = [adapter.written(e, g.tokens, ended=g.ended) for e, g in zip(examples, made, strict=True)]
        device, chosen = device_of(adapter.model), None
        out: list[Sequel] = []
        with torch.no_grad(), evaluating(adapter.model):
            for at in range(0, len(answered), _TOGETHER):
                batch = adapter.collate(answered[at : at + _TOGETHER]).to(device)
                logits = adapter.forward(adapter.model, batch, frozenset({"logits"})).logits.double().cpu().numpy()
                if chosen is None:
                    chosen = self._chosen(adapter, logits.shape[-1], evidence.protocol.seed)
                ends = np.cumsum([0, *batch.counts])
                for i, example in enumerate(examples[at : at + _TOGETHER]):
                    ratios = log_ratios(logits[ends[i] : ends[i + 1]], chosen)[: self.tokens]
                    out.append(Sequel(ratios, np.asarray(example.data.ids[: example.data.start], dtype=np.int64)))
        return out

    def _chosen(self, adapter: Adapter, vocabulary: int, seed: int) -> Integers:
        """Random tokens, as in the paper: almost surely independent; the same for all models of one vocabulary."""
        width = getattr(base(adapter.model).config, "hidden_size", 0)
        if not (self.ratios or width):
            raise InputError("The model does not say how wide its states are.", "Give ratios, the log-ratios to be read.")
        count = min(vocabulary, 1 + (self.ratios or width + self.extra))
        return np.random.default_rng([seed, 21]).permutation(vocabulary)[:count].astype(np.int64)

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The value, the share of telling tokens that are read right, and the share of prompts that are read as a whole."""
        out = super().compute(evidence, label)
        for name in evidence.sets:
            if f"{name}.{self.name}" not in out:
                continue
            for part, note in (("tokens", "share of telling tokens"), ("exact", "share of whole prompts")):
                found = self.column(evidence, label, name, part)
                number = mean_number(evidence, name, found, self.direction, (0.0, 1.0))
                if number is not None:
                    out[f"{name}.{self.name}.{part}"] = number.model_copy(
                        update={"note": f"{note} that the inverter reads right"}
                    )
        return out


def rewordings(records: Sequence[Item]) -> list[Record]:
    """The questions in other words, of those records that have them."""
    texts = [r for r in records if isinstance(r, Record) and r.question_paraphrase]
    return [replace(r, id=f"{r.id}#reworded", prompt=r.question_paraphrase or r.prompt) for r in texts]


def held_out(clusters: Sequence[str], seed: int) -> Bools:
    """Which records are tried: half of those of each subject, rounded down, drawn with ``seed``; the others are learnt from."""
    tried = np.zeros(len(clusters), dtype=np.bool_)
    rng = np.random.default_rng([seed, 22])
    for name in sorted(set(clusters)):
        own = rng.permutation([i for i, c in enumerate(clusters) if c == name])
        tried[own[: len(own) // 2]] = True
    return tried


def telling_tokens(prompts: Sequence[Integers], clusters: Sequence[str]) -> list[Bools]:
    """Of each prompt, which of its tokens stand in several prompts about its subject, and in none about another ``[n]``."""
    owners: dict[int, set[str]] = {}
    for prompt, cluster in zip(prompts, clusters, strict=True):
        for token in set(prompt.tolist()):
            owners.setdefault(token, set()).add(cluster)
    seen: dict[str, dict[int, int]] = {}
    for prompt, cluster in zip(prompts, clusters, strict=True):
        counts = seen.setdefault(cluster, {})
        for token in set(prompt.tolist()):
            counts[token] = counts.get(token, 0) + 1
    return [
        np.array([len(owners[t]) == 1 and seen[c][t] > 1 for t in prompt.tolist()], dtype=np.bool_)
        for prompt, c in zip(prompts, clusters, strict=True)
    ]
