"""DP2Unlearning: a base that is differentially private in what may be deleted; a deletion fine-tunes it on what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.engine.functional import Tensors
from expunge.engine.parts import Paper
from expunge.engine.prepared import Job, Prepared, Work
from expunge.engine.private import (
    Mechanism,
    check_gradients,
    check_private,
    noise_for,
    of_group,
    rate_of,
    train_privately,
)
from expunge.engine.private import spent as epsilon_of
from expunge.engine.record import missing, stale
from expunge.engine.rewording import Rewording, digest, open_rewriter
from expunge.engine.source import Source
from expunge.engine.tasks import threads
from expunge.methods.prepared.registry import prepared

_BASE, _FILE = "base.safetensors", "model.safetensors"
_OPEN = "the model in use before the deletion, and weights or settings that were chosen by looking at it."


@prepared
class DP2Unlearning(Prepared):
    """A base model is trained on all records under (epsilon, delta); in use is that base, fine-tuned on the raw records.

    A deletion takes the base again and fine-tunes it on the records that are left, so a deleted one reaches the result through
    the private base alone. The fine-tuning takes ``share`` of the steps of a full training (published: about half). There are two
    ways to the base.

    ``protect="gradients"``: DP-SGD with Poisson sampling. The gradient of each ``unit``, a record or all records of one subject,
    is clipped to norm ``clip``, the sum gets Gaussian noise whose size an accountant derives from the budget before anything is
    trained. The published epsilons are 0.1 to 100 at a delta of 1e-9 to 1e-12, clip 1, 10 passes of batches of 16 with SGD; its
    learning rate of 5e-5 hardly trains (all of its DP-SGD bases score alike in the paper's own files), so here the step size is
    that of the training unless ``base_lr`` says otherwise; a training by Adam says little about it, so give it there. Gradients
    are taken by ``vmap``, so layers that share a weight (tied embeddings) and layers that opacus has no rule for (RMSNorm) are
    right; before training those of two records are compared with backward passes of their own.

    ``protect="words"`` (language models): the nouns of each record are drawn anew from what a masked language model proposes, by
    the exponential mechanism with clipped logits (:class:`~expunge.engine.rewording.Rewording`), and the base is trained on the
    rewritten records as usual. Every replaced word spends ``epsilon`` again: a record with n of them has n epsilon, which plan
    and report state. The published script for this draws by ``exp(epsilon u)`` with a cosine similarity u and no sensitivity in
    the exponent; its epsilon is none of differential privacy, and it is not offered. Published is also a list of candidates that
    depends on the whole record (``words.seen=all``); by default it depends on the kept words alone, so that the bound holds.
    """

    name: ClassVar[str] = "dp2u"
    title: ClassVar[str] = "DP2Unlearning (private base, fine-tuned on what is left)"
    paper: ClassVar[Paper] = Paper(
        "DP2Unlearning: An Efficient and Guaranteed Unlearning Framework for LLMs",
        "Tamim Al Mahmud, Najeeb Jebreel, Josep Domingo-Ferrer, David Sanchez",
        2025,
        "https://arxiv.org/abs/2504.13774",
    )
    formula: ClassVar[str] = (
        "base: theta <- theta - lr/B (sum_i g_i min(1, C/|g_i|) + N(0, (sigma C)^2)), or trained on records whose words are "
        "drawn by P(c) ~ exp(epsilon u(c) / (2 Delta)); model = fine-tune(base, records that are left)"
    )
    guarantee: ClassVar[str] = (
        "Certified: (epsilon, delta)-differential privacy of each deleted record (or subject, or its replaced words), through "
        "the base alone."
    )
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES, Offer.EACH})
    caveats: ClassVar[tuple[str, ...]] = (
        "Records that are left are learnt without any protection, and what they say about a deleted one stays.",
        "Several units, or several deletions, have a multiple of the epsilon together.",
        "A base with little epsilon has hardly learnt: then the model is what its fine-tuning makes of it.",
        "Words that are not replaced, their order, and how many are replaced reach a base of protect=words as they are.",
        "The noise and the draws come from an ordinary generator with the given seed: keep the seed as secret as the records.",
    )

    epsilon: float = Field(1.0, gt=0, le=1000, description="budget of the base for each unit; with protect=words for each word")
    delta: float = Field(1e-9, gt=0, lt=1, description="probability with which the bound may fail; less than 1 / units")
    protect: Literal["gradients", "words"] = Field(
        "gradients", description="what keeps the base private: noise on clipped gradients, or words drawn anew (texts only)"
    )
    unit: Literal["row", "subject"] = Field("row", description="what the noise protects: one record, or all of one subject")
    clip: float = Field(1.0, gt=0, description="largest norm of a unit's gradient")
    base_passes: float = Field(
        10, gt=0, description="passes over the units in which a base of noisy gradients is trained, on average"
    )
    base_batch: int = Field(16, ge=1, description="units in a step of such a base, on average")
    base_lr: float | None = Field(None, gt=0, description="step size of such a base; none: that of the training")
    words: Rewording = Field(default_factory=Rewording, description="how words are drawn anew, with protect=words")
    share: float = Field(0.5, gt=0, le=1, description="steps of the fine-tuning, as a share of those of the training")
    seed: int = Field(0, ge=0, description="seed of the initial weights, of the sampling and of the noise")
    threads: int = Field(1, ge=1, description="threads in which the model is trained")

    def plan(self, source: Source) -> dict[str, Any]:
        """Rows, each with its unit or the number of its replaced words; and the noise that the budget asks for."""
        source.shortened(self.share)
        return self._plan_words(source) if self.protect == "words" else self._plan_gradients(source)

    def verify(self, job: Job, gone: Sequence[str]) -> None:
        """The base is there and is the one of the training."""
        record = job.record
        if not record.trained:
            return
        found = record.stamp(_BASE)
        if found is None:
            raise missing(record.folder / _BASE)
        if found[0] != self._base_key(job):
            raise stale(record.folder / _BASE)

    def bring(self, job: Job) -> None:
        """Train the base if there is none, and fine-tune it on the rows that are left; an interrupted training begins again."""
        record = job.record
        found = record.stamp(_BASE)
        if not record.trained and (found is None or found[0] != self._base_key(job)):
            record.save(_BASE, self._base_key(job), self._worded(job) if self.protect == "words" else self._noised(job))
        made = record.stamp(_FILE)
        if made is None or made[0] != self._key(job):
            record.save(_FILE, self._key(job), self._tuned(job))

    def work(self, job: Job) -> Work:
        """The base once, the fine-tuning each time."""
        record, left = job.record, len(job.record.remaining)
        tuned = job.source.visits(job.source.shortened(self.share), left)
        if record.pending is None and len(record.requests) == 1:
            if self.protect == "words":
                base = job.source.visits(job.source.shortened(1.0), left)
            else:
                mechanism = record.plan["mechanism"]
                base = round(mechanism["steps"] * mechanism["rate"] * left)
            return Work(base + tuned, (), (self._budget(job),))
        return Work(tuned, (f"fine-tuning of the private base on the {_noun(job)}s that are left",), (self._budget(job),))

    def module(self, job: Job) -> nn.Module:
        """The model in use."""
        return job.source.module(job.record.load(_FILE, self._key(job)))

    def promise(self, job: Job) -> str:
        """The bound for what was deleted so far, its unit, and what it does not cover."""
        record, noun = job.record, _noun(job)
        out = set(record.deleted) - set(record.without)
        numbers = [row[1] for row in record.plan["rows"] if row[0] in out and len(row) > 1]
        if self.protect == "words":
            return self._worded_promise(numbers)
        units = max(1, len(set(numbers)) if self.unit == "subject" else len(out))
        what = f"all {noun}s of one subject" if self.unit == "subject" else f"one {noun}"
        whose, many = (
            (f"each deleted {noun}", f"{noun}s") if self.unit == "row" else (f"the subject of each deleted {noun}", "subjects")
        )
        spent = record.plan["spent"]
        epsilon, delta = of_group(spent, self.delta, units)
        together = (
            f" For the {units} {many} deleted so far together: epsilon {epsilon:.4g}, delta {delta:.3g}." if units > 1 else ""
        )
        return (
            f"Certified: (epsilon {spent:.4g}, delta {self.delta:.3g})-differential privacy of {whose}, by the private "
            f"base alone; unit of protection: {what}.{together} Not covered: what {noun}s that are left say about it, {_OPEN}"
        )

    def full_visits(self, job: Job) -> int:
        """A training anew, without any base."""
        return job.source.visits(job.source.shortened(1.0), len(job.record.remaining))

    # ---- noisy gradients -------------------------------------------------------------------------------------------------

    def _plan_gradients(self, source: Source) -> dict[str, Any]:
        ids = list(source.table.ids)
        names = source.subjects(ids) if self.unit == "subject" else ids
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        if self.delta >= 1 / len(number):
            raise InputError(
                f"delta={self.delta:g} would allow one of {len(number)} {self.unit}s to be told in full.",
                f"Give less than {1 / len(number):.3g}.",
            )
        model = source.module(source.fresh(self.seed))
        check_private(model)
        check_gradients(model, source.trimmed(*source.rows(ids[:2])), source.forward, source.row_loss)
        rate = rate_of(len(number), self.base_batch)
        steps = max(1, round(self.base_passes / rate))
        noise = noise_for(self.epsilon, self.delta, rate=rate, steps=steps)
        held = Mechanism(steps, rate, self.clip, noise, self.base_lr or source.rate)
        return {
            "rows": [[i, number[n]] for i, n in zip(ids, names, strict=True)] if self.unit == "subject" else [[i] for i in ids],
            "mechanism": {"steps": steps, "rate": rate, "clip": self.clip, "noise": noise, "lr": held.lr},
            "spent": epsilon_of(held, self.delta),
        }

    def _noised(self, job: Job) -> Tensors:
        source, mechanism = job.source, Mechanism(**job.record.plan["mechanism"])
        inputs, targets = source.rows(job.record.remaining)
        model = source.module(source.fresh(self.seed))
        with threads(self.threads):
            return train_privately(
                model, inputs, targets, mechanism, forward=source.forward, loss=source.row_loss, seed=self.seed,
                units=self._units(job), trim=source.trimmed,
                observe=lambda step: job.tell(step, mechanism.steps, "training of the private base"),
            )  # fmt: skip

    def _units(self, job: Job) -> Tensor | None:
        """The unit of each row, counted from 0 without gaps."""
        if self.unit == "row":
            return None
        left = set(job.record.remaining)
        numbers = [row[1] for row in job.record.plan["rows"] if row[0] in left]
        place = {n: i for i, n in enumerate(dict.fromkeys(numbers))}
        return torch.tensor([place[n] for n in numbers])

    # ---- words drawn anew ------------------------------------------------------------------------------------------------

    def _plan_words(self, source: Source) -> dict[str, Any]:
        ids = list(source.table.ids)
        if self.unit == "subject":
            raise InputError("The unit of protect=words is the replaced words of a record.", "Leave unit out.")
        records = source.records(ids)
        rewriter = open_rewriter(self.words, self.epsilon, self.seed, source.device)
        counts = [rewriter.count(r) for r in records]
        if not any(counts):
            raise InputError(f"nouns={self.words.nouns} finds no word in any record.", "Choose nouns=long.")
        bare = sum(not n for n in counts)
        return {
            "rows": [[i, n] for i, n in zip(ids, counts, strict=True)],
            "mechanism": {"model": digest(rewriter), "mean": sum(counts) / len(counts), "most": max(counts), "bare": bare},
        }

    def _worded(self, job: Job) -> Tensors:
        source = job.source
        rewriter = open_rewriter(self.words, self.epsilon, self.seed, source.device)
        if digest(rewriter) != job.record.plan["mechanism"]["model"]:
            raise InputError("The masked language model is not the one of the plan.", "Give the same, or choose another folder.")
        left, made = source.records(job.record.remaining), []
        with threads(self.threads):
            for done, record in enumerate(left, 1):
                made.append(rewriter.rewrite(record))
                job.tell(done, len(left), "drawing words anew")
            return source.learn(*source.encoded(made), source.shortened(1.0), self.seed, {})

    def _worded_promise(self, counts: Sequence[int]) -> str:
        most, total = max(counts, default=0), sum(counts)
        composed = (
            f"their words compose to epsilon {most * self.epsilon:.4g} for the deleted record with most ({most} words) and "
            f"{total * self.epsilon:.4g} for all that were deleted so far together."
        )
        kept = "words that are not replaced, their order, how many are replaced"
        if self.words.seen == "all":
            return (
                f"Approximate: epsilon {self.epsilon:.4g} bounds the choice of each replaced word among its candidates, but "
                f"these follow from the whole record, and nothing bounds what they tell. As far as the choices go, {composed} "
                f"Not covered: {kept}, what records that are left say about it, {_OPEN}"
            )
        return (
            f"Certified: (epsilon {self.epsilon:.4g}, delta 0)-differential privacy of each replaced word, by the private base "
            f"alone; {composed} Unit of protection: the replaced words of one record, given its other words and their places. "
            f"Not covered: {kept}, what records that are left say about it, {_OPEN}"
        )

    # ---- fine-tuning and report ------------------------------------------------------------------------------------------

    def _tuned(self, job: Job) -> Tensors:
        start = job.record.load(_BASE, self._base_key(job))
        inputs, targets = job.source.rows(job.record.remaining)
        with threads(self.threads):
            return job.source.learn(inputs, targets, job.source.shortened(self.share), self.seed, start)

    def _budget(self, job: Job) -> str:
        plan = job.record.plan
        held = plan["mechanism"]
        if self.protect == "words":
            bare = f" {held['bare']} records have no word that is replaced." if held["bare"] else ""
            return (
                f"Each replaced word has epsilon {self.epsilon:.4g}; the words of a record compose to epsilon "
                f"{held['most'] * self.epsilon:.4g} at most and {held['mean'] * self.epsilon:.4g} on average.{bare}"
            )
        noun = "subject" if self.unit == "subject" else _noun(job)
        return (
            f"The base holds epsilon {plan['spent']:.4g} at delta {self.delta:.3g} for each {noun}: {held['steps']} steps, each "
            f"{noun} in a share of {held['rate']:.3g} of them, noise {held['noise']:.3g} times the clip of {held['clip']:g}."
        )

    def _base_key(self, job: Job) -> str:
        return job.record.key("base", job.record.without)

    def _key(self, job: Job) -> str:
        return job.record.key("model", [list(r.ids) for r in job.record.requests])


def _noun(job: Job) -> str:
    return "record" if job.source.table.task == "text" else "row"
