"""Measurements of models as they come out of training, drawn from a known law: item difficulty, subject, seed and noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from expunge.audit.arrays import Arrays, Sample
from expunge.audit.attacks.relearn import RelearnPoint

STEPS = (0, 1, 5, 20)


@dataclass
class World:
    """A forget set and the law by which models answer it.

    The numbers are those of small models trained from scratch on generated people: NLL of a retrained model 3.4 with a spread
    over answers of 0.7, over seeds of 0.15 as a whole and 0.3 per answer; of the target 0.2.
    """

    seed: int = 0
    subjects: int = 20
    facts: int = 8
    shift: float = 0.15
    noise: float = 0.3
    high: float = 3.4
    low: float = 0.2

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        n = self.subjects * self.facts
        self.ids = [f"r{i}" for i in range(n)]
        self.clusters = [f"person-{i // self.facts}" for i in range(n)]
        subject = np.repeat(self.rng.normal(0, 0.3, self.subjects), self.facts)
        self.items = np.maximum(0.3, self.high + subject + self.rng.normal(0, 0.6, n))
        self.outside = self.high + self.rng.normal(0, 0.67, n)
        self.heldout = [i for i in range(n) if (i // self.facts if self.subjects > 1 else i) % 2]

    def draw(self, label: str = "retrained") -> Arrays:
        """A further retrained model."""
        n = len(self.ids)
        moved = self.rng.normal(0, self.shift)
        nll = np.maximum(0.05, self.items + moved + self.rng.normal(0, self.noise, n))
        outside = np.maximum(0.05, self.outside + moved + self.rng.normal(0, self.noise, n))
        learns = {s: share * self.high for s, share in zip(STEPS, (0.0, 0.1, 0.25, 0.35), strict=True)}
        curve = {s: np.maximum(0.05, nll - learns[s] + self.rng.normal(0, 0.1, n)) for s in STEPS}
        return self.arrays(label, nll, outside, curve)

    def target(self) -> Arrays:
        n = len(self.ids)
        nll = np.maximum(0.01, self.low + self.rng.normal(0, 0.05, n))
        outside = np.maximum(0.05, self.outside + self.rng.normal(0, self.noise, n))
        return self.arrays("target", nll, outside, dict.fromkeys(STEPS, nll))

    def arrays(self, label: str, nll: np.ndarray, outside: np.ndarray, curve: dict[int, np.ndarray]) -> Arrays:
        n = len(nll)
        retain = np.clip(0.88 + self.rng.normal(0, 0.005) + self.rng.normal(0, 0.03, 100), 0, 1)
        names = tuple(f"kept-{i // 5}" for i in range(100))
        return Arrays(
            label=label,
            ids=self.ids,
            clusters=self.clusters,
            nll=nll,
            log_truth_ratio=nll - 3.0 + self.rng.normal(0, 0.4, n),
            extraction=np.clip(np.exp(-nll) + self.rng.normal(0, 0.05, n), 0, 1),
            membership={"loss": (nll, outside)},
            holdout_clusters=[f"stranger-{i // self.facts}" for i in range(n)],
            utility={"retain probability": Sample(retain, names)},
            model_utility=0.6 + self.rng.normal(0, 0.01),
            degenerate={"retain": Sample((self.rng.random(100) < 0.02).astype(float), names)},
            relearn=[self.point(s, curve[s]) for s in STEPS],
            quantised={8: nll + self.rng.normal(0, 0.02, n), 4: nll + self.rng.normal(0, 0.1, n)},
        )

    def point(self, step: int, losses: np.ndarray) -> RelearnPoint:
        other = [i for i in range(len(losses)) if i not in set(self.heldout)]
        return RelearnPoint(
            step=step,
            lr=1e-3,
            losses_trained=losses[other],
            losses_heldout=losses[self.heldout],
            ids_trained=tuple(self.ids[i] for i in other),
            ids_heldout=tuple(self.ids[i] for i in self.heldout),
            clusters_heldout=tuple(self.clusters[i] for i in self.heldout),
        )


def with_losses(model: Arrays, nll: np.ndarray, *, attacked: bool = True) -> Arrays:
    """The same model with other losses on the forget answers and all that follows from them; attacks move with it if asked."""
    change = nll - model.nll
    moved = replace(
        model,
        nll=nll,
        log_truth_ratio=model.log_truth_ratio + change,
        extraction=np.clip(np.exp(-nll), 0, 1),
        membership={k: (v[0] + change, v[1]) for k, v in model.membership.items()},
    )
    if not attacked:
        return moved
    place = {name: i for i, name in enumerate(model.ids)}
    curve = [
        replace(p, losses_heldout=np.maximum(0.01, p.losses_heldout + change[[place[i] for i in p.ids_heldout]]))
        for p in model.relearn
    ]
    return replace(moved, relearn=curve, quantised={b: np.maximum(0.01, v + change) for b, v in model.quantised.items()})


def mixed(model: Arrays, target: Arrays, share: float) -> Arrays:
    """A model whose losses lie ``share`` of the way to the target's."""
    return with_losses(model, (1 - share) * model.nll + share * target.nll)
