"""Linear probes: can a fact be read from hidden states by a small classifier that was trained on other facts?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.audit.attacks.inside import Arrays, LayerAttack, kept
from expunge.audit.attacks.registry import attack
from expunge.audit.evidence import Evidence
from expunge.audit.kernel.depth import converging_point, jumping_point
from expunge.audit.metrics.papers import PROBES
from expunge.audit.metrics.registry import Range
from expunge.audit.statements import Fact, facts, false_answers, states_of, tokens_of
from expunge.core.errors import InputError
from expunge.core.intervals import Floats
from expunge.core.results import Direction, Number
from expunge.data.records import Record
from expunge.engine.parts import Paper

Codes = NDArray[np.int64]


@attack
class LinearProbe(LayerAttack):
    """A logistic regression per layer, trained on retain facts, reads the telling word of forget facts.

    Alain and Bengio (2016). For each model and layer one probe is trained on the states before the telling word of *retain*
    facts, of subjects that are not in the forget set, and asked for the word of each forget fact. What it gives the right
    word is the value, at the layer where that is largest on average. The probe is made anew for each model, so models of any
    start can be compared. Words with fewer than two retain facts, and forget facts about them, are left out. The control
    (Hewitt and Liang 2019) is the same probe with shuffled words. Where accuracy rises with depth (Jin et al. 2024, "concept
    depth") is given beside it.
    """

    name: ClassVar[str] = "linear-probe"
    title: ClassVar[str] = "Linear probes"
    formula: ClassVar[str] = "max_l mean of p_l(word), p_l = softmax(W_l h_l + b_l) fitted on retain facts of other subjects"
    paper: ClassVar[Paper] = PROBES
    range: ClassVar[Range] = (0.0, 1.0)
    passes: ClassVar[str] = "1 forward pass; 1 per retain record for each model"

    minimum: int = Field(200, ge=10, description="retain facts at least on which a probe is trained")
    most: int = Field(2000, ge=10, description="retain facts at most")
    strength: float = Field(1.0, gt=0, description="inverse strength C of the L2 penalty, on standardised states")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Enough retain facts with wrong answers, of subjects that are not forgotten."""
        if "retain" not in evidence.sets:
            return "it needs a retain set"
        found = sum(bool(false_answers(r, 1)) for r in self._others(evidence))
        if found < self.minimum:
            return f"it needs {self.minimum} retain facts with wrong answers on which a probe is trained, and there are {found}"
        return super().lacks(evidence, name)

    def _others(self, evidence: Evidence) -> list[Record]:
        """Retain records of subjects that are not in the forget set."""
        gone = set(evidence.clusters("forget"))
        return [r for r in evidence.records("retain") if isinstance(r, Record) and r.cluster not in gone][: self.most]

    def facts(self, evidence: Evidence, adapter: Adapter, name: str) -> list[Fact]:
        """The records with the place of their telling word."""
        return [_word(f) for f in super().facts(evidence, adapter, name)]

    def arrays(self, evidence: Evidence, label: str, name: str) -> Arrays:
        """``layers``, ``measured``, and ``right`` and ``control``: whether each probe, and each with shuffled words, is right."""

        def make() -> Arrays:
            adapter, at = evidence.adapter(label), evidence.protocol
            others = self._others(evidence)
            known = [_word(f).right for f in facts(adapter, others, range(len(others)), 1)]
            asked = self.facts(evidence, adapter, name)
            words, wanted = (tokens_of(s).numpy() for s in (known, [f.right for f in asked]))
            often = {w for w, n in Counter(words.tolist()).items() if n > 1}
            train, test = (np.array([w in often for w in ws], dtype=np.bool_) for ws in (words, wanted))
            size, layers = len(evidence.records(name)), adapter.layers()
            out = {k: np.full((len(layers), size), np.nan) for k in ("layers", "right", "control")}
            where = np.array([f.record for f in asked], dtype=np.int64)[test]
            measured = np.zeros(size, dtype=np.bool_)
            if train.sum() < self.minimum // 2 or not test.any() or len(often) < 2:
                evidence.miss(f"{self.title} were not measured: too few words occur in more than one retain fact.")
                return {"layers": np.zeros((0, size)), "measured": measured}
            measured[where] = True
            seen = states_of(adapter, known, layers, at.batch_tokens).values.float().numpy()
            new = states_of(adapter, [f.right for f in asked], layers, at.batch_tokens).values.float().numpy()
            shuffled = np.random.default_rng([at.seed, 17]).permutation(words[train])
            for layer in range(len(layers)):
                x, y = seen[layer][train], new[layer][test]
                said, right = probe(x, words[train], y, wanted[test], self.strength)
                out["layers"][layer, where], out["right"][layer, where] = said, right
                out["control"][layer, where] = probe(x, shuffled, y, wanted[test], self.strength)[1]
            return {**out, "measured": measured}

        return kept(self, evidence, label, name, part="layers", make=make)

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The value, accuracy with and without shuffled words, and the layers at which accuracy jumps and settles."""
        out = super().compute(evidence, label)
        for name in ("forget",):
            if f"{name}.{self.name}" not in out:
                continue
            held = self.arrays(evidence, label, name)
            accuracy = np.nanmean(held["right"], axis=1)
            best = int(np.argmax(np.nanmean(held["layers"], axis=1)))
            shares = {"accuracy": held["right"][best], "control": held["control"][best]}
            for key, values in shares.items():
                note = f"share of right words after layer {best + 1}" + (", with shuffled words" if key == "control" else "")
                out[f"{name}.{self.name}.{key}"] = self.plain(evidence, name, float(np.nanmean(values)), note)
            depth = {"jumps": jumping_point(accuracy), "settles": converging_point(accuracy)}
            for key, layer in depth.items():
                note = f"layer, counted from 1, at which accuracy {key}; of {len(accuracy)}"
                found = Number(value=None if layer is None else layer + 1, over="none", direction=Direction.REFERENCE, note=note)
                out[f"{name}.{self.name}.{key}"] = found
        return out


def _word(fact: Fact) -> Fact:
    """Only the first token that tells the true answer from a false one is looked at."""
    return replace(fact, right=replace(fact.right, stop=fact.right.start + 1))


def probe(x: Floats, y: Codes, asked: Floats, wanted: Codes, strength: float = 1.0) -> tuple[Floats, Floats]:
    """Logistic regression on standardised features.

    Args:
        x, y: features ``[n, D]`` and classes ``[n]`` to train on; two classes at least.
        asked, wanted: features ``[m, D]`` and right classes ``[m]``, which need not be among those of training.
        strength: inverse strength C of the L2 penalty.

    Returns:
        probability of the right class ``[m]`` (0 for one that was not trained), and 1 where it is the likeliest, else 0 ``[m]``.

    Raises:
        InputError: features are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    if not (np.isfinite(x).all() and np.isfinite(asked).all()):
        raise InputError("Hidden states are not finite.")
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    model = LogisticRegression(C=strength, max_iter=500).fit((x - mean) / scale, y)
    said = model.predict_proba((asked - mean) / scale)
    column = {int(c): i for i, c in enumerate(model.classes_)}
    at = np.array([column.get(int(w), -1) for w in wanted])
    values = np.where(at >= 0, said[np.arange(len(at)), at], 0.0)
    return values, (said.argmax(axis=1) == at).astype(np.float64)
