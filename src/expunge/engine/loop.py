"""The one training loop, on Hugging Face accelerate, for every modality and every recipe.

One optimiser step sees ``schedule.batch`` forget examples and as many retain examples, chosen by (seed, step) alone; they
are split over processes and, inside a process, over forward passes that fit ``max_tokens``. Every term is divided by its
count over the whole step, so the result is that of one large batch on one process, up to the order of floating-point sums.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.core.memory import freed_memory_kept
from expunge.data.order import share
from expunge.engine import checkpoint
from expunge.engine.adaptive import Reason, Watch, choose_rate
from expunge.engine.alternate import States, joined
from expunge.engine.control import Sight, Steering
from expunge.engine.devices import Devices
from expunge.engine.finish import Ending, Origin, behind, join_of
from expunge.engine.goal import Goal
from expunge.engine.gradient import begun
from expunge.engine.masks import holding, moving_entries, step_masks
from expunge.engine.objective import Micro, Objective, Sums
from expunge.engine.options import Engine
from expunge.engine.outcome import Outcome, Progress
from expunge.engine.parameters import SaliencyMask
from expunge.engine.parts import Recipe, Reweigh
from expunge.engine.portions import portions
from expunge.engine.preparation import run_preparation
from expunge.engine.reference import ModelReference, frozen_models
from expunge.engine.rewind import Rewind


def train(
    adapter: Adapter,
    recipe: Recipe,
    examples: Mapping[Stream, Sequence[Example]],
    engine: Engine,
    *,
    goal: Goal | None = None,
    models: Mapping[Of, Adapter] | None = None,
    origin: Origin | None = None,
    folder: Path | None = None,
    cache: Path | None = None,
    resume: bool = False,
    observe: Callable[[int, nn.Module], None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train ``adapter.model`` by ``recipe``; the adapter's model is changed in place (or wrapped, with LoRA; or stays as it is,
    with parameters beside it).

    Args:
        adapter: holds the target model.
        recipe: what to do.
        examples: by stream; alternatives aligned with the forget examples.
        engine: how to use the machine.
        goal: where the adaptive schedule may stop; without one it runs its budget.
        models: hold further models that the terms read (an oracle); they are left as they are.
        origin: where earlier requests began, for a finish that turns all of them around together.
        folder: for ``checkpoint/`` and ``log.jsonl``; none keeps nothing.
        cache: for reference log-probabilities.
        resume: go on from ``folder``'s checkpoint if there is one.
        observe: called with the step and the model before the first and after every optimiser step.
        progress: called after every step and during the range test.

    Raises:
        InputError: the recipe does not fit the data or the model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        loop = _Loop(
            adapter, recipe, examples, engine, goal=goal, models=models, origin=origin, folder=folder, cache=cache,
            observe=observe, progress=progress, scratch=folder / "checkpoint" if folder else Path(scratch),
        )  # fmt: skip
        try:
            return loop.run(resume)
        finally:
            loop.prepared.drop(loop.devices.unwrap(loop.model))


class _Loop:
    def __init__(
        self,
        adapter: Adapter,
        recipe: Recipe,
        examples: Mapping[Stream, Sequence[Example]],
        engine: Engine,
        *,
        goal: Goal | None,
        models: Mapping[Of, Adapter] | None,
        origin: Origin | None,
        folder: Path | None,
        cache: Path | None,
        observe: Callable[[int, nn.Module], None] | None,
        progress: Progress | None,
        scratch: Path,
    ) -> None:
        self.started = time.perf_counter()
        self.adapter, self.recipe, self.engine = adapter, recipe, engine
        self.goal, self.folder, self.observe, self.progress = goal, folder, observe, progress
        self.scratch = scratch
        self.schedule = recipe.schedule
        self.devices = Devices(engine)
        if recipe.gradient.by_term and self.devices.sharded:
            raise InputError(
                f"gradient={recipe.gradient.name} needs forget and retain gradients apart, which a sharded (FSDP) model lacks.",
                "Use gradient=plain, or run on one process or with data parallelism.",
            )
        if any(t.joint() for t in recipe.terms()) and self.devices.world > 1:
            raise InputError(f"The method {recipe.name!r} needs all examples of a step in one process.", "Run it on one.")
        torch.manual_seed(engine.seed)
        adapter.model.eval().to(self.devices.device)
        self.prepared = run_preparation(
            recipe.preparation, adapter, examples, engine, scratch=scratch / "preparation", tell=progress
        )
        recipe = self.recipe = self.prepared.settled(recipe)
        self.examples = self.prepared.examples
        self.notes = list(self.prepared.notes)
        others = {of: ModelReference(held, self.devices.device) for of, held in (models or {}).items()}
        frozen = frozen_models(adapter, recipe, self.examples, engine, device=self.devices.device, store=cache)
        sources = {**frozen, **others, **self.prepared.sources}
        self.objective = Objective(adapter, recipe, self.examples, sources, self.prepared.made)
        self.notes += [note for t in recipe.terms() for note in t.remarks(adapter, self.examples, engine)]
        if recipe.parameters.reads and self.devices.sharded:
            raise InputError(
                f"parameters={recipe.parameters.name} does not work on a sharded (FSDP) model.", "Use parameters=all or lora."
            )
        self.ending = Ending(recipe, adapter.model, origin, sharded=self.devices.sharded)
        model = recipe.parameters.begin(adapter, self.examples, engine, scratch / "parameters", progress)
        if self.prepared.grown and self.devices.world > 1:
            raise InputError(f"The method {recipe.name!r} trains a network beside the model.", "Run it on one process.")
        self.prepared.attach(model)
        self._mode(model)
        self.model, self.optimizer = self.devices.prepare(model, self._optimizer, adapter.layers())
        self.turns = self.schedule.turns([t.name for t in recipe.terms()])
        self.states = States(self.optimizer, len(self.turns))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.start_weights = self.ending.before(self.model) if isinstance(recipe.finish, Reweigh) else {}
        made = recipe.penalty.begin(adapter, self.devices.unwrap(self.model)) if recipe.penalty is not None else {}
        moving = self.devices.unwrap(self.model).named_parameters()
        self.penalised = [made.get(n) for n, p in moving if p.requires_grad]
        self.joined = join_of(
            recipe, adapter.model, self.devices.unwrap(self.model), self.prepared.made, sharded=self.devices.sharded
        )
        sizes = {s: len(self.examples.get(s, ())) for s in (Stream.FORGET, Stream.RETAIN)}
        self.plan, self.erase_steps = portions(recipe, sizes, engine.seed)
        self.total = self.plan.steps
        self.rewind = self._rewind()
        self.steering = Steering(
            recipe.control,
            Sight(
                adapter, self.devices.unwrap(self.model), self.examples, recipe.watched, engine.max_tokens,
                self.prepared.made, engine.seed,
            ),
            pairs=recipe.preparation is not None and recipe.preparation.pairs, per_epoch=self.plan.steps_per_epoch,
            sharded=self.devices.sharded, world=self.devices.world,
        )  # fmt: skip
        self.masks = moving_entries(
            self.objective, self.devices.unwrap(self.model), self.parameters, engine.max_tokens, sharded=self.devices.sharded
        )
        self.gradient_state: dict[str, Any] = {}
        self.moving = begun(
            recipe, adapter, self.devices.unwrap(self.model), self.optimizer, examples=self.examples, engine=engine
        )
        self.notes += recipe.gradient.notes(self.moving)
        self.balance_state: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.tokens = 0

    # ---- setting up

    def _rewind(self) -> Rewind | None:
        if Stream.VALIDATION not in self.schedule.reads:
            return None
        return Rewind(
            self.adapter, self.examples.get(Stream.FORGET, ()), self.examples.get(Stream.VALIDATION, ()),
            max_units=self.engine.max_tokens, folder=self.scratch / "epochs", ends=self.plan.ends(), rank=self.devices.rank,
        )  # fmt: skip

    def _mode(self, model: nn.Module) -> None:
        if self.engine.gradient_checkpointing:
            enable = getattr(model, "gradient_checkpointing_enable", None)
            if enable is None:
                raise InputError("This model does not support gradient checkpointing.", "Leave gradient_checkpointing off.")
            enable({"use_reentrant": False})
        model.train(self.engine.dropout or self.engine.gradient_checkpointing)
        if not self.engine.dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                for name in ("attention_dropout", "dropout"):
                    if isinstance(vars(module).get(name), float):
                        setattr(module, name, 0.0)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(self.engine.batch_norm == "batch")

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        moving = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in moving if p.ndim > 1]
        vectors = [p for p in moving if p.ndim <= 1]
        decay = 0.0 if isinstance(self.recipe.parameters, SaliencyMask) else self.schedule.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        if self.schedule.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=1e-6, momentum=self.schedule.momentum, fused=True)
        betas = (self.schedule.momentum, self.schedule.second_moment)
        return torch.optim.AdamW(groups, lr=1e-6, betas=betas, fused=True)

    # ---- one step

    def step(self, step: int, lr: float, forget: bool = True) -> dict[str, float]:
        """One optimiser step on the examples of ``step``; returns what it saw (not finite means the weights were left alone).

        Without ``forget`` the forget terms pause: only the retain examples of the step are read. A schedule with turns takes one
        step for each of them, on the same examples.
        """
        row: dict[str, float] = {}
        for turn, (only, rate) in enumerate(self.turns):
            self.states.take(turn)
            seen = self._turn(step, lr * rate, forget, only)
            row = seen if not turn else joined(row, seen)
        self.states.take(0)
        return row

    def _turn(self, step: int, lr: float, forget: bool, only: frozenset[int]) -> dict[str, float]:
        plan = {s: ix for s, ix in self.steering.thin(self.plan.plan(step)).items() if forget or s != Stream.FORGET}
        if not plan:
            return {"step": step, "epoch": (step + 1) / self.plan.steps_per_epoch, "lr": lr, "loss": 0.0, "gradient_norm": 0.0}
        counts = self.objective.counts(plan)
        share = len(plan.get(Stream.FORGET, ())) / max(1, sum(map(len, plan.values())))
        coefficients = self.recipe.balance.coefficients(self.balance_state, share)
        micros = self._micros(plan)
        sums = Sums()
        both = (not self.recipe.forget or Stream.FORGET in plan) and (not self.recipe.retain or Stream.RETAIN in plan)
        split = self.recipe.gradient.by_term and both and bool(self.recipe.forget) and bool(self.recipe.retain)
        sides: list[list[Tensor]] = [[], []]
        for at, micro in enumerate(micros):
            with self.devices.accumulate(self.model, last=at == len(micros) - 1, manual=split), self.devices.autocast():
                with self.adapter.drawing(self.engine.seed, step):
                    views = self.objective.views(self.model, micro, self.devices.device)
                losses = self.objective.losses(views, micro, counts, coefficients, sums, only=only)
            with self.devices.accumulate(self.model, last=at == len(micros) - 1, manual=split):
                if split:
                    self._backward_by_side(losses, sides)
                else:
                    present = [x for x in losses if x is not None]
                    self.devices.backward(sum(present[1:], present[0]))
            self.tokens += int(micro.weight) * sum(e.size for s in micro.examples.values() for e in s)
        if split:
            of_forget, of_retain = (self._masked(self.devices.reduce_all(s)) for s in sides)
            combined = self.recipe.gradient.combine(of_forget, of_retain, self.gradient_state, self.moving)
            for parameter, g in zip(self.parameters, combined, strict=True):
                parameter.grad = g
        return self._update(step, lr, sums, coefficients, only)

    def _micros(self, plan: Mapping[Stream, Sequence[int]]) -> list[Micro]:
        """This process's forward passes, padded with fillers to the largest number that any process has."""
        per_process = [
            self.objective.micro_batches(
                {s: share(ix, rank, self.devices.world) for s, ix in plan.items()}, self.engine.max_tokens
            )
            for rank in range(self.devices.world)
        ]
        mine = per_process[self.devices.rank]
        return mine + [self.objective.filler()] * (max(map(len, per_process)) - len(mine))

    def _backward_by_side(self, losses: tuple[Tensor | None, Tensor | None], sides: list[list[Tensor]]) -> None:
        for index, loss in enumerate(losses):
            if not sides[index]:
                sides[index] = [torch.zeros_like(p) for p in self.parameters]
            if loss is None:
                continue
            keep = index == 0 and losses[1] is not None
            gradients = torch.autograd.grad(loss, self.parameters, retain_graph=keep, allow_unused=True)
            for total, g in zip(sides[index], gradients, strict=True):
                if g is not None:
                    total.add_(g)

    def _update(
        self, step: int, lr: float, sums: Sums, coefficients: tuple[float, float], only: frozenset[int]
    ) -> dict[str, float]:
        terms = self.recipe.terms()
        values = self.devices.sum_floats([sums.values.get(i, 0.0) for i in range(len(terms))])
        row: dict[str, float] = {"step": step, "epoch": (step + 1) / self.plan.steps_per_epoch, "lr": lr}
        row |= {
            f"{'forget' if i < len(self.recipe.forget) else 'retain'}.{t.name}": v
            for i, (t, v) in enumerate(zip(terms, values, strict=True))
            if i in only
        }
        self._penalise(step / self.total)
        for parameter, mask in zip(self.parameters, self.masks, strict=bool(self.masks)):
            if parameter.grad is not None:
                parameter.grad *= mask
        masks = step_masks(self.recipe.gradient, self.parameters, row)
        norm = self.devices.clip(self.parameters, self.schedule.clip)
        row["gradient_norm"] = norm
        row["loss"] = sum(
            t.weight * coefficients[0 if i < len(self.recipe.forget) else 1] * v
            for i, (t, v) in enumerate(zip(terms, values, strict=True))
        )
        if math.isfinite(norm) and math.isfinite(row["loss"]):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with holding(self.parameters, masks):
                self.optimizer.step()
            n = len(self.recipe.forget)
            forget = sum(t.weight * v for t, v in zip(terms[:n], values[:n], strict=True))
            retain = sum(t.weight * v for t, v in zip(terms[n:], values[n:], strict=True))
            self.recipe.balance.update(self.balance_state, row["epoch"], forget, retain)
            row |= {f"balance.{k}": v for k, v in self.balance_state.items()}
        else:
            row["finite"] = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        return row

    def _masked(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of what may move: a rule that compares directions must not count what will not be taken."""
        return [g * m for g, m in zip(gradients, self.masks, strict=True)] if self.masks else gradients

    def _penalise(self, done: float) -> None:
        if self.recipe.penalty is None:
            return
        for parameter, made in zip(self.parameters, self.penalised, strict=True):
            added = self.recipe.penalty.gradient(parameter.detach(), done, made)
            parameter.grad = added if parameter.grad is None else parameter.grad.add_(added)

    # ---- the whole run

    def run(self, resume: bool) -> Outcome:
        """Range test (adaptive schedule without a rate), then steps until something ends them."""
        watch = Watch(self, self.goal)
        done = 0
        rates: list[dict[str, float]] = []
        held = self._held() if resume else None
        if held is not None:
            done, rates = self._restore(held, watch)
        elif self.schedule.lr is None and not self.prepared.idle:
            watch.lr, rates = choose_rate(self, watch)
        if self.observe and done == 0:
            self.observe(0, self.devices.unwrap(self.model))
        reason: Reason | None = watch.first(done)
        if done == 0:
            self.steering.begin()
        if self.prepared.idle:
            reason, self.steering.said = "control", self.prepared.idle
        with freed_memory_kept():
            while reason is None and done < self.total:
                row = self.step(done, watch.rate(done), watch.erasing)
                done += 1
                reason = watch.after(row, done)
                if reason is None and self.steering.after(done, row):
                    reason = "control"
                    watch.look()
                self._renew()
                self.history.append(row)
                if self.rewind:
                    self.rewind.keep(self.model, done)
                self._report(row, done)
                if self.observe:
                    self.observe(done, self.devices.unwrap(self.model))
                if self.folder and self.engine.checkpoint_every and done % self.engine.checkpoint_every == 0 and reason is None:
                    self._save(done, watch, rates)
        reason = reason or watch.ended()
        if self.rewind and reason != "diverged":
            self.notes.append(self.rewind.choose(self.model, done))
            watch.look()
        self._finish(watch)
        self.recipe.parameters.end(self.devices.unwrap(self.model))
        if reason == "goal" and behind(self.recipe, self.goal.loss if self.goal else None, watch.forget_loss):
            reason = "joined"
        return self._outcome(reason, done, watch, rates)

    def _renew(self) -> None:
        """Put the forget examples in that the control made, if it made some."""
        examples = self.steering.renewed()
        if examples is not None:
            self.examples = self.objective.examples = examples

    def _finish(self, watch: Watch) -> None:
        if self.recipe.finish is not None:
            self.model = self.ending.joined(self.devices.unwrap(self.model)) if self.ending.whole else self.model
            said = watch.apply_finish(self.recipe.finish)
            self.notes += [said] if said else []

    def _outcome(self, reason: Reason, done: int, watch: Watch, rates: list[dict[str, float]]) -> Outcome:
        if self.folder and self.devices.main:
            lines = "".join(json.dumps(row) + "\n" for row in self.history)
            (self.folder / "log.jsonl").write_text(lines)
        self.devices.end()
        return Outcome(
            self.joined or self.devices.unwrap(self.model), reason, watch.sentence(reason, done, self.steering.said), done,
            watch.lr, rates,
            watch.forget_loss, watch.retain_loss, self.tokens, time.perf_counter() - self.started,
            self.devices.peak_bytes(), self.history, self.devices.gather(self.model), self.notes + self.steering.notes(),
            watch.finish_scale, self.steering.record(),
        )  # fmt: skip

    def _report(self, row: dict[str, float], done: int) -> None:
        self.devices.track(row, done)
        if self.progress:
            shown = [f"loss {row['loss']:.3f}"]
            shown += [f"{k.split('_')[0]} {row[k]:.2f}" for k in ("forget_loss", "retain_loss") if k in row]
            self.progress(done, self.total, "  ".join(shown))

    def _save(self, done: int, watch: Watch, rates: list[dict[str, float]]) -> None:
        if not (self.devices.main or self.devices.sharded) or self.folder is None:
            return
        state = {
            "step": done, "watch": watch.state(), "balance": self.balance_state, "rates": rates, "history": self.history,
            "tokens": self.tokens, "control": self.steering.saved(),
        }  # fmt: skip
        number = done // self.engine.checkpoint_every
        checkpoint.save(
            self.folder / "checkpoint",
            self._writers()[number % len(self._writers())],
            weights=checkpoint.snapshot(self.model),
            good=watch.good,
            optimizer=self.states.saved(),
            gradient=self.gradient_state,
            state=state,
        )

    def _writers(self) -> tuple[str, ...]:
        """Names of this process's checkpoints. Shards are written by all processes: two take turns, one is always whole."""
        rank = self.devices.rank
        return (f"process-{rank}-a", f"process-{rank}-b") if self.devices.sharded else ("process-0",)

    def _held(self) -> checkpoint.Held | None:
        """The last checkpoint that every process has."""
        if self.folder is None:
            return None
        where, world = self.folder / "checkpoint", self.devices.world
        steps = [checkpoint.step_of(where, name) for name in self._writers()]
        sums = self.devices.sum_floats([float(s) for s in steps] + [float(s * s) for s in steps])
        n = len(steps)
        # Equal on all processes if and only if the mean of the squares is the square of the mean.
        whole = [i for i in range(n) if steps[i] >= 0 and world * sums[n + i] == sums[i] ** 2]
        return checkpoint.load(where, self._writers()[max(whole, key=lambda i: steps[i])]) if whole else None

    def _restore(self, held: checkpoint.Held, watch: Watch) -> tuple[int, list[dict[str, float]]]:
        checkpoint.restore(self.model, held.weights)
        self.states.restore(held.optimizer)
        state = held.state
        self.balance_state = state["balance"]
        self.gradient_state = held.gradient_on(self.devices.device)
        self.history = state["history"]
        self.tokens = state["tokens"]
        self.steering.restore(state["control"])
        self._renew()
        watch.load_state(state["watch"], held.good)
        return int(state["step"]), state["rates"]
