"""Restoration of sparse features: do forgotten answers come back when the features that the model lost are given back to it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Adapter
from expunge.adapters.passes import evaluating
from expunge.audit.attacks.inside import Arrays, LayerAttack, kept, record_number, target_of
from expunge.audit.attacks.patching import patched
from expunge.audit.attacks.registry import Access, attack
from expunge.audit.evidence import Evidence
from expunge.audit.metrics.papers import RESTORED
from expunge.audit.probes import take_clusters
from expunge.audit.statements import Fact, Statement, States, batches, contrasts, facts, spans, statement_means, states_of
from expunge.audit.store import device_of
from expunge.core.errors import InputError
from expunge.core.intervals import Floats
from expunge.core.results import Direction, Number
from expunge.engine.autoencoder import SparseAutoencoder, explained_variance, fit_autoencoder
from expunge.engine.parts import Paper

Halves = NDArray[np.int64]

_ONE_SHAPE = "The restoration of features needs models of one shape."


@dataclass(frozen=True)
class Features:
    """What the target's states after one block are made of.

    Attributes:
        block: after which, counted from 0; models of one shape may name it differently.
        depth: blocks of the target.
        code: the autoencoder.
        explained: share of the variance of states of other records that it reconstructs.
        typical: mean of each feature on the forget texts of each half, ``[2, P]``.
    """

    block: int
    depth: int
    code: SparseAutoencoder
    explained: float
    typical: Tensor


@attack
class SparseRestoration(LayerAttack):
    """The features that the forget texts have lost are given back to the states of the model, which goes on from there.

    A sparse autoencoder is trained on the *target's* states after a block, on forget and retain texts. The features whose mean on
    forget texts differs most between target and model are what the model lost (and what took its place); the difference is added
    to the model's states, along their directions, at every token. Subjects are cut into halves: what is added to the texts of
    one is measured on the other. So nothing of the target's state at a text goes into the model at that text, and what comes back
    is what the model itself still makes of it. The value is the log-probability of the true answer minus that of false ones, at
    the block and strength where this is largest, no restoration among them; the gain over none is given beside it, and so is the
    same with as many random features.

    **Published, and ours.** Jang et al. (2026), for image classifiers, steer expert features of a class by
    ``z_j <- z_j^u + a (z_j^o - z_j^u)`` with the original model's own activations ``z^o`` on the very picture, and a in {1, 5,
    10}. On a text that is patching through a dictionary: it gives the target's state, and with it the answer, to whoever reads
    the same basis, a retrained model too. No source was found that restores sparse features of a language model, so this form
    is reconstructed: means over the other half of the forget set in place of ``z^o`` and ``z^u`` at the text itself; features
    chosen by the size of the difference (the paper's rule is not published); AbsTopK in place of TopK; the part of a state that
    the autoencoder does not explain is kept, so that a strength of 0 changes nothing. Adding one vector at all tokens is
    activation steering, as Seyitoglu et al. (2024, arXiv 2411.02631) use it to extract what was unlearned, with prompts made
    anonymous.

    **What it sees.** A suppression that moves the states of all forget texts in a like way (misdirection of states, features
    that were clamped). What was changed for each answer on its own comes back in part or not; what was changed after the last
    block is not seen at all. No gain is no proof of removal. Retrained models that began at other random weights read another
    basis, in which the directions mean nothing; those that began where the target began are the better control.
    """

    name: ClassVar[str] = "sae-restoration"
    title: ClassVar[str] = "Restoration of sparse features"
    formula: ClassVar[str] = (
        "h' = h + a sum_j D_j (mean_A z_j,target - mean_A z_j,model), j lost; max_(l, a) [log p(true) - mean log p(false)] on B"
    )
    paper: ClassVar[Paper] = RESTORED
    access: ClassVar[Access] = Access.BOTH
    passes: ClassVar[str] = "(1 + wrong) (1 + 2 blocks x strengths) forward passes and 1 for the means; of the target 1 per block"

    blocks: int = Field(4, ge=1, description="blocks after which states are restored, spread evenly over the depth")
    strengths: tuple[float, ...] = Field((1.0, 2.0), min_length=1, description="how often the difference is added; 1: once")
    features: int = Field(64, ge=1, description="features that are restored: those that differ most")
    expansion: int = Field(4, ge=1, description="features of the autoencoder, as a multiple of the states' width")
    active: int = Field(32, ge=1, description="features of a state that are not 0")
    steps: int = Field(600, ge=1, description="optimiser steps of each autoencoder")
    least: float = Field(0.5, ge=0, le=1, description="variance of held-out states that an autoencoder must explain to be used")
    retain_examples: int = Field(256, ge=8, description="retain records on which autoencoders are trained, at most")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A target, retain records, and forget records of two subjects."""
        if not target_of(evidence) or "retain" not in evidence.sets:
            return "it needs a target model and a retain set"
        if len(set(evidence.clusters(name))) < 2:
            return "it needs forget records of at least two subjects: it learns from one half what it tries on the other"
        return super().lacks(evidence, name)

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target."""
        return {"target": evidence.subject(target_of(evidence)).fingerprint}

    def halves(self, evidence: Evidence, name: str, found: Sequence[Fact]) -> Halves:
        """To which half each fact belongs, 0 or 1: whole subjects, drawn with the seed of the audit."""
        clusters = [evidence.clusters(name)[f.record] for f in found]
        names = sorted(set(clusters))
        order = np.random.default_rng([evidence.protocol.seed, 19]).permutation(len(names))
        half = {names[int(i)]: at % 2 for at, i in enumerate(order)}
        return np.array([half[c] for c in clusters], dtype=np.int64)

    def learn(self, evidence: Evidence, name: str) -> list[Features]:
        """The target's features after each of the blocks that its autoencoder explains, once for all models.

        Raises:
            InputError: no block is explained well enough.
        """
        subject = evidence.subject(target_of(evidence))

        def make() -> list[Features]:
            adapter = evidence.adapter(subject.label)
            found = self.facts(evidence, adapter, name)
            chosen = take_clusters(evidence.clusters("retain"), self.retain_examples, evidence.protocol.seed)
            others = facts(adapter, evidence.records("retain"), chosen.tolist(), 0)
            halves = self.halves(evidence, name, found)
            texts = [f.right for f in found], [f.right for f in others]
            depth = len(adapter.layers())
            out = [self._one(evidence, adapter, block, texts, halves) for block in _spread(depth, self.blocks)]
            good = [f for f in out if f.explained >= self.least]
            if not good:
                best = max(f.explained for f in out)
                raise InputError(
                    f"The autoencoders explain {best:.0%} of the variance of the target's states at best.",
                    "Train them longer (steps), on more records (retain_examples), or with more features (active).",
                )
            return good

        return evidence.memo(("sparse features", self.model_dump_json(), subject.fingerprint, name), make)

    def _one(
        self, evidence: Evidence, adapter: Adapter, block: int, texts: tuple[list[Statement], list[Statement]], halves: Halves
    ) -> Features:
        """Trained on nine tenths of the forget and retain texts, tried on the last."""
        at = evidence.protocol
        order = np.random.default_rng([at.seed, 20]).permutation(len(texts[0]) + len(texts[1]))
        every = [[*texts[0], *texts[1]][int(i)] for i in order]
        layers = adapter.layers()
        states = states_of(adapter, every, [layers[block]], at.batch_tokens, whole=True)
        rows = states.values[0].to(device_of(adapter.model)).float()
        cut = sum(states.counts[: len(every) * 9 // 10])
        latents = self.expansion * rows.shape[1]
        code = fit_autoencoder(
            rows[:cut], latents=latents, k=min(self.active, latents), steps=self.steps, signed=True, seed=at.seed
        )
        typical = mean_features(adapter, texts[0], halves, {layers[block]: code}, at.batch_tokens)[layers[block]]
        return Features(block, len(layers), code, explained_variance(code, rows[cut:]), typical)

    def arrays(self, evidence: Evidence, label: str, name: str) -> Arrays:
        """What a model says of each fact without restoration and with, at each block and strength.

        ``layers``, and ``random`` with random features, ``[1 + C, records]``, the first row without restoration; ``right``:
        whether the true answer is the likeliest; ``measured``; ``tried``: block, counted from 1, and strength ``[1 + C, 2]``.
        """

        def make() -> Arrays:
            size = len(evidence.records(name))
            measured = np.zeros(size, dtype=np.bool_)
            try:
                known = self.learn(evidence, name)
                adapter = evidence.adapter(label)
                found = self.facts(evidence, adapter, name)
                said = self._restored(evidence, adapter, found, known, self.halves(evidence, name, found))
            except InputError as error:
                evidence.miss(f"{self.title} of {label!r} was not measured: {error.message}")
                return {"layers": np.zeros((0, size)), "measured": measured}
            at = [f.record for f in found]
            measured[at] = True
            out = {k: np.full((len(v), size), np.nan) for k, v in said.items()}
            for key, values in said.items():
                out[key][:, at] = values
            explained = np.array([f.explained for f in known])
            tried = np.array([(0, 0), *((f.block + 1, a) for f in known for a in self.strengths)], dtype=np.float64)
            return {**out, "measured": measured, "tried": tried, "explained": explained}

        return kept(self, evidence, label, name, part="layers", make=make)

    def _restored(
        self, evidence: Evidence, adapter: Adapter, found: Sequence[Fact], known: Sequence[Features], halves: Halves
    ) -> dict[str, Floats]:
        """``layers``, ``random`` and ``right`` of the facts ``[1 + C, facts]``."""
        at, layers = evidence.protocol, adapter.layers()
        if len(layers) != known[0].depth:
            raise InputError(f"It has {len(layers)} blocks, the target {known[0].depth}.", _ONE_SHAPE)
        rights = [f.right for f in found]
        own = mean_features(adapter, rights, halves, {layers[f.block]: f.code for f in known}, at.batch_tokens)
        rng = torch.Generator().manual_seed(at.seed)
        real: list[tuple[str, Tensor]] = []
        random: list[tuple[str, Tensor]] = []
        for features in known:
            layer = layers[features.block]
            vectors = shifts(features, own[layer], self.features, rng)
            for steps, vector in zip((real, random), vectors, strict=True):
                steps += [(layer, a * vector) for a in self.strengths]
        statements = [s for f in found for s in f.statements]
        owner = np.repeat(halves, [len(f.statements) for f in found])
        said = said_with(adapter, statements, owner, [*real, *random], at.batch_tokens)
        count = 1 + len(real)
        told = contrasts(said, found)
        return {"layers": told[:count], "random": told[[0, *range(count, len(told))]], "right": _right(said[:count], found)}

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The value; what restoring gained; the same with random features; how many facts are then told right."""
        out = super().compute(evidence, label)
        for name in evidence.sets:
            key = f"{name}.{self.name}"
            if key not in out:
                continue
            held = self.arrays(evidence, label, name)
            here = held["measured"]
            best = int(np.argmax(held["layers"][:, here].mean(axis=1).round(6)))  # what rounding moves is no gain
            block, strength = held["tried"][best]
            where = f"after block {block:.0f}, strength {strength:g}" if best else "without any restoration, which is best"
            quality = f"autoencoders explain {held['explained'].min():.0%} of the variance of held-out states or more"
            numbers = {
                "gain": (held["layers"][best] - held["layers"][0], (None, None), f"over no restoration, {where}; {quality}"),
                "random": (held["random"][best] - held["random"][0], (None, None), f"gain with random features, {where}"),
                "right": (held["right"][best], (0.0, 1.0), f"share of facts whose true answer is the likeliest, {where}"),
                "before": (held["right"][0], (0.0, 1.0), "the same share without restoration"),
            }
            for part, (values, limits, note) in numbers.items():
                number = record_number(evidence, name, values, Direction.REFERENCE, range=limits, note=note)
                if number is not None:
                    out[f"{key}.{part}"] = number
        return out


def _spread(depth: int, count: int) -> list[int]:
    """``count`` of the blocks, in the middles of as many equal parts of the depth; all of them if there are no more."""
    return list(range(depth)) if count >= depth else [int((i + 0.5) * depth / count) for i in range(count)]


def _right(said: Floats, found: Sequence[Fact]) -> Floats:
    """1 where the true statement is likelier than all false ones, else 0; NaN without any. ``[C, S]`` to ``[C, facts]``."""
    out, at = np.full((len(said), len(found)), np.nan), 0
    for i, fact in enumerate(found):
        if fact.wrong:
            out[:, i] = said[:, at] > said[:, at + 1 : at + 1 + len(fact.wrong)].max(axis=1)
        at += 1 + len(fact.wrong)
    return out


@torch.no_grad()
def mean_features(
    adapter: Adapter, statements: Sequence[Statement], halves: Halves, codes: Mapping[str, SparseAutoencoder], batch_tokens: int
) -> dict[str, Tensor]:
    """Mean of each feature over all tokens of the statements of each half, ``[2, P]`` by block.

    Args:
        adapter: of the model whose states are read.
        statements: texts.
        halves: of each, 0 or 1.
        codes: the autoencoder of each block.
        batch_tokens: per forward pass.

    Raises:
        InputError: the states have another width than the autoencoder reads.
    """
    device = device_of(adapter.model)
    sums = {n: torch.zeros(2, len(c.bias), dtype=torch.float64, device=device) for n, c in codes.items()}
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(adapter.model):
        for chosen, batch in batches(adapter, statements, batch_tokens):
            found = adapter.forward(adapter.model, batch, frozenset(f"features:{n}" for n in codes))
            half = torch.from_numpy(halves[chosen]).to(device)[batch.token_owner]
            counts += torch.bincount(half, minlength=2)
            for layer, code in codes.items():
                states = found.features(layer)
                if states.shape[-1] != len(code.mean):
                    raise InputError(
                        f"Its hidden states are {states.shape[-1]} wide, the target's {len(code.mean)}.",
                        _ONE_SHAPE,
                    )
                sums[layer].index_add_(0, half, code.to(device).encode(states.float()).double())
    return {n: (s / counts[:, None]).float() for n, s in sums.items()}


def shifts(features: Features, own: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What is added to the states of each half: learnt on the other half.

    Args:
        features: of the target.
        own: means of the model's features on each half ``[2, P]``.
        count: features that are restored.
        generator: draws the random ones.

    Returns:
        for texts of half 0 and of half 1, along the features that differ most ``[2, D]``, and along as many random others, by as
        much, ``[2, D]``.
    """
    real, random = [], []
    for half in (0, 1):
        lost = features.typical[1 - half] - own[1 - half]
        order = lost.abs().argsort(descending=True)
        chosen, rest = order[:count], order[count:]
        real.append(features.code.shift(lost[chosen], chosen))
        drawn = rest[torch.randperm(len(rest), generator=generator).to(rest.device)][:count]
        random.append(features.code.shift(lost[chosen[: len(drawn)]], drawn))
    return torch.stack(real), torch.stack(random)


@torch.no_grad()
def said_with(
    adapter: Adapter, statements: Sequence[Statement], halves: Halves, steps: Sequence[tuple[str, Tensor]], batch_tokens: int
) -> Floats:
    """Mean log-probability per looked-at token, without and with a vector added to all states after a block.

    Args:
        adapter: of the model, which is left as it is.
        statements: what is looked at.
        halves: of each, 0 or 1.
        steps: blocks, and what is added after each to the statements of either half ``[2, D]``.
        batch_tokens: per forward pass.

    Returns:
        ``[1 + steps, statements]``, the first row with nothing added.
    """
    looked = States(torch.empty(0), tuple(s.length for s in statements), whole=False)
    said = torch.zeros(1 + len(steps), sum(looked.counts), dtype=torch.float64)
    want = frozenset({"losses", f"features:{adapter.layers()[-1]}"})  # with features of the last layer all tokens are run
    with evaluating(adapter.model):
        for chosen, batch in batches(adapter, statements, batch_tokens):
            at = spans(batch, [statements[i] for i in chosen])[1]
            rows = looked.rows(chosen)
            said[0, rows] = -adapter.forward(adapter.model, batch, want).losses[at].double().cpu()
            every = torch.arange(len(batch.token_owner), device=batch.owner.device)
            half = torch.from_numpy(halves[chosen]).to(every.device)[batch.token_owner]
            for index, (layer, vectors) in enumerate(steps):
                with patched(adapter, layer, batch, every, vectors.to(every.device)[half], added=True):
                    said[1 + index, rows] = -adapter.forward(adapter.model, batch, want).losses[at].double().cpu()
    return statement_means(said.numpy(), statements)
