"""DP2Unlearning: a base that is differentially private in every row; a deletion fine-tunes it on the rows that are left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from expunge.core.errors import InputError
from expunge.engine.functional import Tensors
from expunge.engine.members import Training
from expunge.engine.parts import Paper
from expunge.engine.prepared import Job, Prepared, Work
from expunge.engine.private import Mechanism, check_private, noise_for, of_group, rate_of, train_privately
from expunge.engine.private import spent as epsilon_of
from expunge.engine.record import missing, stale
from expunge.engine.source import Source
from expunge.engine.tasks import threads
from expunge.methods.prepared.registry import prepared

_BASE, _FILE = "base.safetensors", "model.safetensors"


@prepared
class DP2Unlearning(Prepared):
    """A base model is trained on all rows under (epsilon, delta); the model in use is that base, fine-tuned on the raw rows.

    A deletion takes the base again and fine-tunes it on the rows that are left, so a deleted row reaches the result through the
    private base alone. The fine-tuning takes ``share`` of the steps of a full training (published: about half). The base is
    trained by DP-SGD with Poisson sampling: each row's gradient is clipped to norm ``clip``, the sum gets Gaussian noise whose
    size an accountant derives from the budget before anything is trained. The published epsilons are 0.1 to 100 at a delta of
    1e-9 to 1e-12, clip 1, 10 passes of batches of 16 with SGD; its learning rate of 5e-5 hardly trains (all of its DP-SGD bases
    score alike in the paper's own files), so here the step size is that of the training unless ``base_lr`` says otherwise. The
    paper's second way to a private base, rewriting the words of texts, is not part of it: there every replaced word spends the
    budget again, and the published script draws without the sensitivity in the exponent.
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
        "base: theta <- theta - lr/B (sum_i g_i min(1, C/|g_i|) + N(0, (sigma C)^2)); model = fine-tune(base, rows that are left)"
    )
    guarantee: ClassVar[str] = "Certified: (epsilon, delta)-differential privacy of each deleted row, through the base alone."
    caveats: ClassVar[tuple[str, ...]] = (
        "Rows that are left are learnt without any protection, and what they say about a deleted one stays.",
        "Protected is a row. Several rows of one subject, or several deletions, have a multiple of the epsilon together.",
        "A base with little epsilon has hardly learnt: then the model is what its fine-tuning makes of it.",
        "The noise comes from an ordinary generator with the given seed: keep the seed as secret as the rows.",
    )

    epsilon: float = Field(1.0, gt=0, le=1000, description="budget of the base for each row")
    delta: float = Field(1e-9, gt=0, lt=1, description="probability with which the bound may fail; less than 1 / rows")
    clip: float = Field(1.0, gt=0, description="largest norm of a row's gradient")
    base_passes: float = Field(10, gt=0, description="passes over the rows in which the base is trained, on average")
    base_batch: int = Field(16, ge=1, description="rows in a step of the base, on average")
    base_lr: float | None = Field(None, gt=0, description="step size of the base; none: that of the training")
    share: float = Field(0.5, gt=0, le=1, description="steps of the fine-tuning, as a share of those of the training")
    seed: int = Field(0, ge=0, description="seed of the initial weights, of the sampling and of the noise")
    threads: int = Field(1, ge=1, description="threads in which the model is trained")

    def plan(self, source: Source) -> dict[str, Any]:
        """Rows, and the noise that the budget asks for."""
        table, training = source.table, source.plan
        if self.delta >= 1 / len(table):
            raise InputError(
                f"delta={self.delta:g} would allow one of {len(table)} rows to be told in full.",
                f"Give less than {1 / len(table):.3g}.",
            )
        check_private(source.module(source.fresh(self.seed)))
        rate = rate_of(len(table), self.base_batch)
        steps = max(1, round(self.base_passes / rate))
        noise = noise_for(self.epsilon, self.delta, rate=rate, steps=steps)
        held = Mechanism(steps, rate, self.clip, noise, self.base_lr or training.lr)
        return {
            "rows": [[name] for name in table.ids],
            "mechanism": {"steps": steps, "rate": rate, "clip": self.clip, "noise": noise, "lr": held.lr},
            "spent": epsilon_of(held, self.delta),
        }

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
            record.save(_BASE, self._base_key(job), self._base(job))
        made = record.stamp(_FILE)
        if made is None or made[0] != self._key(job):
            record.save(_FILE, self._key(job), self._tuned(job))

    def work(self, job: Job) -> Work:
        """The base once, the fine-tuning each time."""
        record = job.record
        mechanism = record.plan["mechanism"]
        tuned = job.source.visits(self._part(job), len(record.remaining))
        if record.pending is None and len(record.requests) == 1:
            base = round(mechanism["steps"] * mechanism["rate"] * len(record.remaining))
            return Work(base + tuned, (), (self._budget(job),))
        return Work(tuned, ("fine-tuning of the private base on the rows that are left",), (self._budget(job),))

    def module(self, job: Job) -> nn.Module:
        """The model in use."""
        return job.source.module(job.record.load(_FILE, self._key(job)))

    def promise(self, job: Job) -> str:
        """The bound for the rows deleted so far, its unit, and what it does not cover."""
        record = job.record
        rows = max(1, len(record.deleted) - len(record.without))
        spent = record.plan["spent"]
        epsilon, delta = of_group(spent, self.delta, rows)
        together = f" For the {rows} rows deleted so far together: epsilon {epsilon:.4g}, delta {delta:.3g}." if rows > 1 else ""
        return (
            f"Certified: (epsilon {spent:.4g}, delta {self.delta:.3g})-differential privacy of each deleted row, by the private "
            f"base alone; unit of protection: one row.{together} Not covered: what rows that are left say about it, the model "
            "in use before the deletion, and weights or settings that were chosen by looking at it."
        )

    def full_visits(self, job: Job) -> int:
        """A training anew, without any base."""
        return job.source.visits(job.source.plan, len(job.record.remaining))

    # ---- the two trainings -----------------------------------------------------------------------------------------------

    def _base(self, job: Job) -> Tensors:
        source, mechanism = job.source, Mechanism(**job.record.plan["mechanism"])
        inputs, targets = source.rows(job.record.remaining)
        model = source.module(source.fresh(self.seed))
        with threads(self.threads):
            return train_privately(
                model, inputs, targets, mechanism, forward=source.forward, loss=source.row_loss, seed=self.seed,
                observe=lambda step: job.tell(step, mechanism.steps, "training of the private base"),
            )  # fmt: skip

    def _tuned(self, job: Job) -> Tensors:
        start = job.record.load(_BASE, self._base_key(job))
        inputs, targets = job.source.rows(job.record.remaining)
        with threads(self.threads):
            return job.source.learn(inputs, targets, self._part(job), self.seed, start)

    def _part(self, job: Job) -> Training:
        whole = job.source.plan
        return whole.model_copy(update={"steps": max(1, round(self.share * whole.steps))})

    def _budget(self, job: Job) -> str:
        plan = job.record.plan
        held = Mechanism(**plan["mechanism"])
        return (
            f"The base holds epsilon {plan['spent']:.4g} at delta {self.delta:.3g} for each row: {held.steps} steps, each row "
            f"in a share of {held.rate:.3g} of them, noise {held.noise:.3g} times the clip of {held.clip:g}."
        )

    def _base_key(self, job: Job) -> str:
        return job.record.key("base", job.record.without)

    def _key(self, job: Job) -> str:
        return job.record.key("model", [list(r.ids) for r in job.record.requests])
