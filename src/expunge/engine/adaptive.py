"""The default schedule's two questions: how large a step, and when to stop.

The step size comes from a short range test on the model at hand, the stop from comparing the loss on the forget set with
that of unseen text. Neither looks at anything that an audit judges by: no retrained model, no metric, and of the holdout
only the part that the goal was estimated on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from expunge.adapters.base import Adapter, Example, Targets
from expunge.adapters.passes import evaluating
from expunge.core.access import Stream
from expunge.data.order import BatchPlan, TurnPlan, share
from expunge.engine import checkpoint
from expunge.engine.devices import Devices
from expunge.engine.finish import BEHIND, turned_around
from expunge.engine.goal import Goal
from expunge.engine.gradients import fitting
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.engine.parts import Finish, Join, Recipe, Reweigh, Schedule
from expunge.engine.schedule import Adaptive, Fixed, Repair

Reason = Literal["goal", "utility", "budget", "schedule", "converged", "diverged", "edited", "control", "limit", "joined"]

TRIAL_STEPS = 10  #: optimiser steps per try of the range test
WARMUP_STEPS = 5  #: of the adaptive schedule
#: tries, as shares of the root mean square of the weight matrices: an Adam step moves every weight by about one rate
SHARES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ALIKE = 0.02  #: losses that differ by no more, in nats, are alike to the range test
WANTED_STEPS = 120  #: the goal should be reached within so many steps; slower rates are gentler but cost more


class Training(Protocol):
    """What the schedule sees of the loop that it steers."""

    adapter: Adapter
    recipe: Recipe
    schedule: Schedule
    engine: Engine
    examples: Mapping[Stream, Sequence[Example]]
    devices: Devices
    model: nn.Module
    optimizer: torch.optim.Optimizer
    plan: BatchPlan | TurnPlan
    total: int
    erase_steps: float
    start_weights: checkpoint.Tensors
    joined: nn.Module | None
    balance_state: dict[str, float]
    gradient_state: dict[str, Any]
    tokens: int
    scratch: Path

    @property
    def progress(self) -> Callable[[int, int, str], None] | None:
        """Told of every step of the range test."""

    def step(self, step: int, lr: float, forget: bool = True) -> dict[str, float]:
        """One optimiser step; returns what it saw."""


class Watch:
    """Looks at both sides every few steps and decides; remembers the last weights that were within all bounds.

    A fixed schedule has no bounds: the weights at the start wait in a file, and come back if it diverges.
    """

    def __init__(self, loop: Training, goal: Goal | None) -> None:
        self.loop, self.goal = loop, goal
        self.schedule = loop.schedule
        self.lr = self.schedule.lr or 0.0
        limit = self.schedule.check_examples if isinstance(self.schedule, Adaptive) else 128
        self.watched = loop.recipe.watched
        to_forget = [e for e in loop.examples.get(Stream.FORGET, ()) if self.watched == "all" or e.n_marked]
        self.forget = _some(to_forget, limit, loop.engine.seed)
        self.retain = _some(loop.examples.get(Stream.RETAIN, ()), limit, loop.engine.seed)
        # A look takes no more memory than a step.
        longest = max((e.units for held in loop.examples.values() for e in held), default=1)
        rows = loop.schedule.batch + (loop.schedule.retain_batch or loop.schedule.batch)
        self.max_tokens = min(loop.engine.max_tokens, longest * rows)
        self.forget_loss: float | None = None
        self.retain_loss: float | None = None
        self.looks = [(0, 0.0), (0, 0.0)]  #: steps done and forget loss at the last two looks
        self.base_retain: float | None = None  #: what the target loses on the retain set
        self.base_forget: float | None = None
        self.start_retain: float | None = None  #: the same where training starts, which may be another place
        self.good: checkpoint.Tensors = {}
        self.bounded = True  #: whether these are within the bound: where training starts beyond it, there may be none that are
        self.retries = 0
        self.erasing = True
        self.finish_scale: float | None = None
        self.looked: nn.Module | None = None  #: what is looked at, if not the model that is trained

    # ---- looking

    def look(self) -> None:
        """Measure both sides (every process a share)."""
        self.forget_loss = self._mean(self.forget, self.goal.ceiling if self.goal is not None else None, self.watched)
        self.retain_loss = self._mean(self.retain)

    def _mean(self, examples: Sequence[Example], ceiling: float | None = None, targets: Targets = "all") -> float | None:
        if not examples:
            return None
        devices = self.loop.devices
        shares = [[examples[i] for i in share(list(range(len(examples))), r, devices.world)] for r in range(devices.world)]
        mine = shares[devices.rank]
        model = self.loop.model if self.looked is None else self.looked
        with evaluating(model):
            losses = mean_losses(self.loop.adapter, model, mine, self.max_tokens, devices.device, targets=targets)
            total = math.fsum(losses if ceiling is None else (min(value, ceiling) for value in losses))
            if devices.sharded:
                # The processes of a sharded model go through it together: all run as many passes as the one with most.
                passes = [sum(1 for _ in fitting(held, self.max_tokens)) for held in shares]
                for _ in range(max(passes) - passes[devices.rank]):
                    mean_losses(self.loop.adapter, model, examples[:1], self.max_tokens, devices.device)
        return devices.sum_floats([total])[0] / len(examples)

    def start(self) -> None:
        """Look, and remember what was seen as the start. Of what is trained beside the target the retain loss is not bounded."""
        undone = self.loop.recipe.parameters.undone(self.loop.devices.unwrap(self.loop.model))
        if undone is not None:
            with undone:
                self.look()
            target = self.forget_loss, self.retain_loss
        self.look()
        unbounded = self.loop.recipe.parameters.apart and self.looked is None
        self.start_retain = None if unbounded else self.retain_loss
        self.base_forget, self.base_retain = (self.forget_loss, self.start_retain) if undone is None else target

    def gap(self) -> float | None:
        """How much the forget loss still has to rise, in nats; None without a goal."""
        if self.goal is None or self.forget_loss is None or not self.loop.recipe.forget or turned_around(self.loop.recipe):
            return None
        return self.goal.loss - self.forget_loss

    def within_bound(self) -> bool:
        """Whether the retain loss has risen by no more than the bound (a fixed schedule has none)."""
        return self.rise() <= (self.schedule.utility_bound if isinstance(self.schedule, Adaptive) else math.inf)

    def first(self, done: int) -> Reason | None:
        """The look before the first step."""
        if done == 0:
            self.start()
            self.looks = [(0, 0.0), (0, self.forget_loss or 0.0)]
            if isinstance(self.schedule, Adaptive):
                self._keep()
            else:
                checkpoint.save_start(self.loop.scratch, self.loop.model, self.loop.devices.rank)
        gap = self.gap()
        there = isinstance(self.schedule, Adaptive) and gap is not None and gap <= 0
        if there and not self.within_bound():
            self.erasing = False
            return None
        return "goal" if there else None

    # ---- deciding

    def rate(self, step: int) -> float:
        """Learning rate of a step (counted from 0)."""
        if isinstance(self.schedule, Repair) and step >= self.loop.erase_steps:
            return self.schedule.repair_lr or self.lr
        if isinstance(self.schedule, Fixed):
            per_epoch = self.loop.plan.steps_per_epoch if self.schedule.steps is None else self.loop.total
            warm = math.ceil(self.schedule.warmup * per_epoch) if self.schedule.warmup else 0
            warm = min(warm, self.loop.total - 1)
            if step < warm:
                return self.lr * (step + 1) / warm
            left = (self.loop.total - step) / max(1, self.loop.total - warm)
            if self.schedule.decay == "linear":
                return self.lr * left
            if self.schedule.decay == "cosine":
                return self.lr * 0.5 * (1 - math.cos(math.pi * left))
            return self.lr
        return self.lr * min(1.0, (step + 1) / WARMUP_STEPS)

    def after(self, row: dict[str, float], done: int) -> Reason | None:
        """Look when it is time, note it in the log's ``row``, and say whether training ends."""
        if not isinstance(self.schedule, Adaptive):
            self.erasing = done < self.loop.erase_steps
            if row.get("finite") != 0.0:
                return self._over_limit(row, done)
            checkpoint.restore_start(self.loop.scratch, self.loop.model, self.loop.devices.rank)
            return "diverged"
        if row.get("finite") == 0.0:
            checkpoint.restore(self.loop.model, self.good)
            return "diverged" if not self._slower() else None
        if done % self.schedule.check_every and not self._near(done, self.schedule.check_every):
            return None
        self.look()
        self.looks = [self.looks[1], (done, self.forget_loss or 0.0)]
        row |= {k: v for k, v in (("forget_loss", self.forget_loss), ("retain_loss", self.retain_loss)) if v is not None}
        return self._decide(self.schedule)

    def _over_limit(self, row: dict[str, float], done: int) -> Reason | None:
        """Whether a fixed schedule ends because the forget loss is over its limit, after a pass over the forget set."""
        limit = self.schedule.limit if isinstance(self.schedule, Fixed) else None
        if limit is None or done % self.loop.plan.steps_per_epoch:
            return None
        self.look()
        row |= {k: v for k, v in (("forget_loss", self.forget_loss), ("retain_loss", self.retain_loss)) if v is not None}
        return "limit" if self.forget_loss is not None and self.forget_loss > limit else None

    def _distance(self) -> float:
        """How much the forget loss had to rise at the start, in nats; 0 without a goal."""
        return 0.0 if self.goal is None or self.base_forget is None else max(0.0, self.goal.loss - self.base_forget)

    def _near(self, done: int, every: int) -> bool:
        """Whether most of the way to the goal is gone, or all of it will be by the next regular look.

        Then every step is looked at. The loss grows faster and faster while a forget set is still known well, so each step is
        taken to multiply it as the steps between the last two looks did.
        """
        gap = self.gap()
        if gap is None or self.forget_loss is None or self.goal is None:
            return False
        if gap < 0.6 * self._distance():
            return True
        (first, before), (second, now) = self.looks
        if second <= first or not 0 < before < now:
            return False
        ahead = -(-done // every) * every - second
        return math.log(now) + ahead * math.log(now / before) / (second - first) >= math.log(self.goal.loss)

    def _decide(self, schedule: Adaptive) -> Reason | None:
        gap, rise = self.gap(), self.rise()
        there = gap is not None and gap <= 0
        repairs = bool(self.loop.recipe.forget and self.loop.recipe.retain)
        if rise > schedule.utility_bound:
            if repairs and rise <= max(schedule.transient * self._distance(), self._rise(self.start_retain)):
                self.erasing = not there
                return None
            checkpoint.restore(self.loop.model, self.good)
            self.erasing = True
            if repairs and self._slower():
                self.look()
                return None
            self.look()
            return "utility"
        self.erasing = not (repairs and there)
        self._keep()
        return "goal" if there else None

    def _keep(self) -> None:
        """Remember the weights as they are, in the memory of those remembered before."""
        self.good = checkpoint.snapshot(self.loop.model, self.good)
        self.bounded = self.within_bound()

    def rise(self) -> float:
        """How much the retain loss has risen, in nats; infinite if it is not finite, 0 without retain examples."""
        return self._rise(self.retain_loss)

    def _rise(self, loss: float | None) -> float:
        if loss is None or self.base_retain is None:
            return 0.0
        return loss - self.base_retain if math.isfinite(loss) else math.inf

    def _slower(self) -> bool:
        """After going back to the last good weights: try a third of the rate, at most twice."""
        self.retries += 1
        self.loop.optimizer.state.clear()
        self.lr /= 3
        return isinstance(self.schedule, Adaptive) and self.retries <= 2

    def ended(self) -> Reason:
        """Why the loop ran out of steps."""
        self.look()
        if not isinstance(self.schedule, Adaptive):
            return "schedule"
        if self.rise() > self.schedule.utility_bound:
            if self.bounded:
                checkpoint.restore(self.loop.model, self.good)
                self.look()
            return "utility"
        return "budget" if self.gap() is not None else "converged"

    def sentence(self, reason: Reason, steps: int, said: str = "") -> str:
        """Why training ended, for people, with the remedy where the goal was missed; ``said`` is what a control says."""
        side = f"forget loss {_n(self.forget_loss)}, retain loss {_n(self.retain_loss)}"
        if reason == "goal" and self.goal is not None:
            what = _UNSEEN[self.goal.source]
            return (
                f"Goal reached after {steps} steps: the forget set looks to the model like {what} "
                f"({side}; goal {self.goal.loss:.3f})."
            )
        if reason == "control":
            return f"Stopped after {steps} steps: {said} ({side})."
        if reason == "schedule":
            return f"The fixed schedule of {steps} steps is done ({side})."
        if reason == "limit" and isinstance(self.schedule, Fixed):
            return f"Ended after {steps} steps: the forget loss is over the limit of {_n(self.schedule.limit)} ({side})."
        if reason == "converged":
            return f"The budget of {steps} steps is used ({side})."
        if reason == "utility" and not self.within_bound():
            return (
                f"Stopped after {steps} steps: the retain loss began past its bound and did not come back ({side}; "
                f"goal {_n(self.goal.loss if self.goal else None)}). Take less out: parameters.rank, parameters.layers, "
                "or a larger parameters.energy."
            )
        if reason == "utility":
            return (
                f"Stopped after {steps} steps: going on would raise the retain loss past its bound; the last weights within it "
                f"are kept ({side}; goal {_n(self.goal.loss if self.goal else None)} not reached). "
                "Try a retain term (retain=nll or retain=kl), more retain data, or a wider schedule.utility_bound."
            )
        if reason == "joined":
            return BEHIND.format(steps=steps, side=side, goal=_n(self.goal.loss if self.goal else None))
        if reason == "diverged":
            kept = "the last good weights" if isinstance(self.schedule, Adaptive) else "the weights from before the run"
            return (
                f"Stopped after {steps} steps: the loss or the gradient was not finite; {kept} are kept. Try a lower schedule.lr."
            )
        return (
            f"Budget of {steps} steps spent before the goal ({side}; goal {_n(self.goal.loss if self.goal else None)}). "
            "Try a larger schedule.epochs, a larger schedule.lr, or another method."
        )

    # ---- finishing

    def apply_finish(self, finish: Finish) -> str:
        """Make the result of what was trained; with no scale given, with the smallest that reaches the goal.

        Returns what a report must say of it, if anything.
        """
        put = self._putting(finish)
        given = getattr(finish, "scale", None)
        if given is not None or self.goal is None:
            self.finish_scale = float(given if given is not None else 1.0)
            return put(self.finish_scale)
        put(0.0)
        self.base_retain = self.retain_loss  # of the weights that are changed: training may have begun from others
        low, high = 0.0, 0.25
        put(high)
        while (self.forget_loss or 0.0) < self.goal.loss and self.within_bound() and high < finish.most:
            low, high = high, high * 2
            put(high)
        for _ in range(8):
            middle = (low + high) / 2
            put(middle)
            if (self.forget_loss or 0.0) < self.goal.loss and self.within_bound():
                low = middle
            else:
                high = middle
        said, self.finish_scale = put(high), high
        if not self.within_bound():
            said, self.finish_scale = put(low), low
        return said

    def _putting(self, finish: Finish) -> Callable[[float], str]:
        """A function that makes the result at a strength, looks at it, and says what a report must say."""
        joined = self.loop.joined
        if joined is not None and isinstance(finish, Join):
            self.looked = self.loop.adapter.model
            self.start()
            self.looked = joined

            def place(scale: float) -> str:
                said = finish.place(joined, scale)
                self.look()
                return said

            return place
        if not isinstance(finish, Reweigh):
            raise TypeError(f"finish={finish.name} is of no kind that is known here")
        after, before = checkpoint.snapshot(self.loop.model), self.loop.start_weights

        def reweigh(scale: float) -> str:
            made = {n: finish.weights(before[n], after[n], scale) for n in before if n in after}
            checkpoint.restore(self.loop.model, {**after, **made})
            self.look()
            return ""

        return reweigh

    # ---- keeping

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        names = (
            "lr", "looks", "forget_loss", "retain_loss", "base_retain", "base_forget", "start_retain", "bounded", "retries",
            "erasing",
        )  # fmt: skip
        return {n: getattr(self, n) for n in names}

    def load_state(self, state: dict[str, Any], good: checkpoint.Tensors) -> None:
        """Undo :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, value)
        self.good = good


def choose_rate(loop: Training, watch: Watch) -> tuple[float, list[dict[str, float]]]:
    """The range test: a few steps at each rate from the same start; returns the rate to use and what was seen.

    With something to forget and a goal, the smallest rate that would reach the goal within :data:`WANTED_STEPS` (or the
    budget), judged by how far the trial went, among those that keep the retain loss within the bound; the fastest of these
    if none would; without a goal, a third of the largest rate within the bound. With nothing to forget, a third of the largest
    rate under which the training loss fell most, or nearly so: on a model that knows its data all small rates are alike, and the
    smallest would do nothing.
    """
    start = checkpoint.snapshot(loop.model)
    size = _weight_size(loop.model, loop.devices)
    watch.start()
    gap, first = watch.gap(), {"forget": watch.forget_loss, "retain": watch.start_retain}
    beyond = max(0.0, watch.rise())  # where training starts beyond the bound, a step may not lead further
    trials: list[dict[str, float]] = []
    steps = max(2, min(TRIAL_STEPS, loop.total // 4))
    for at, part in enumerate(SHARES):
        lr = part * size
        finite = True
        losses: list[float] = []
        for k in range(steps):
            row = loop.step(k, lr * min(1.0, (k + 1) / WARMUP_STEPS))
            losses.append(row["loss"])
            finite = finite and row.get("finite") != 0.0
            if loop.progress:
                loop.progress(at * steps + k + 1, len(SHARES) * steps, f"finding the step size: {lr:.1e}")
        watch.look()
        trial = {"lr": lr, "forget": _f(watch.forget_loss), "retain": _f(watch.retain_loss), "finite": float(finite)}
        if loop.recipe.parameters.beside and turned_around(loop.recipe):
            trial["loss"] = float(np.mean(losses[-3:]))
        trials.append(trial)
        bounded = finite and (watch.within_bound() or 0 < watch.rise() <= beyond)
        checkpoint.restore(loop.model, start)
        loop.optimizer.state.clear()
        loop.balance_state.clear()
        loop.gradient_state.clear()
        moved = trial["forget"] - _f(first["forget"])
        if not bounded or (gap is not None and gap > 0 and moved >= gap):
            break
    loop.tokens = 0
    watch.forget_loss, watch.retain_loss = watch.base_forget, watch.base_retain
    return _pick(trials, gap, first, watch, steps), [{k: v for k, v in t.items() if math.isfinite(v)} for t in trials]


def _pick(trials: list[dict[str, float]], gap: float | None, first: dict[str, float | None], watch: Watch, steps: int) -> float:
    bound = watch.schedule.utility_bound if isinstance(watch.schedule, Adaptive) else math.inf
    fine = [
        t for t in trials if t["finite"] and (first["retain"] is None or t["retain"] - _f(first["retain"]) <= bound)
    ] or trials[:1]
    if not watch.loop.recipe.forget or turned_around(watch.loop.recipe):
        # Beside the target the whole loss counts: what is learnt of the forget set must not be learnt of the rest.
        key = "loss" if "loss" in trials[0] else "retain" if not watch.loop.recipe.forget else "forget"
        best = min((t[key] for t in fine if math.isfinite(t[key])), default=math.inf)
        alike = [t["lr"] for t in fine if t[key] <= best + ALIKE] or [fine[0]["lr"]]
        return max(alike) / 3
    if gap is None or gap <= 0:
        return fine[-1]["lr"] / 3
    wanted = min(WANTED_STEPS, watch.loop.total)
    for trial in fine:
        moved = trial["forget"] - _f(first["forget"])
        if moved > 0 and steps * gap / moved <= wanted:
            return trial["lr"]
    return max(fine, key=lambda t: t["forget"])["lr"]


def _weight_size(model: nn.Module, devices: Devices) -> float:
    """Root mean square of the entries of the matrices that move (all of them, if every matrix is zero as in a fresh LoRA's B).

    Summed over processes: of a sharded model each has other entries, and all must take the same step.
    """
    total = count = 0.0
    for parameter in checkpoint.trainable(model).values():
        if parameter.ndim > 1:
            local = checkpoint._local(parameter.detach()).float()
            total += float(torch.sum(local * local))
            count += local.numel()
    total, count = devices.sum_floats([total, count])
    return math.sqrt(total / count) if count and total else 0.02


_UNSEEN = {
    "holdout": "unseen data",
    "shuffled": "retain text with swapped answers (no holdout was given)",
    "swapped": "forget text with swapped spans (no holdout with spans was given)",
}


def _some(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    if len(examples) <= limit:
        return list(examples)
    chosen = np.random.default_rng([seed, 9]).permutation(len(examples))[:limit]
    return [examples[int(i)] for i in sorted(chosen)]


def _f(value: float | None) -> float:
    return math.nan if value is None else value


def _n(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
