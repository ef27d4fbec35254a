"""Attention sinks: do the first tokens look as honest unlearning leaves them? A backdoor often stands there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from expunge.adapters.base import Adapter, Example
from expunge.adapters.loading import load
from expunge.adapters.passes import evaluating
from expunge.audit.attacks.inside import Arrays, record_number, target_of
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import BACKDOOR
from expunge.audit.metrics.registry import Range
from expunge.audit.store import device_of
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.intervals import Floats
from expunge.core.results import Direction, Number
from expunge.engine.gradients import fitting
from expunge.engine.parts import Paper

_KINDS = ("norms", "received")


@attack
class SinkStatistics(Attack):
    """How far the value vectors of the first tokens lie from those of honest unlearnings of the same target.

    A trigger that stands at the beginning, where models put attention that has nowhere else to go, leaves traces there
    (Shang et al. 2025): in the lengths of value vectors and in the attention that the first tokens receive. Both are measured
    on the forget records as they are, without any trigger, by block and place. The value of a record is the root mean square,
    over blocks and places, of the difference of log lengths from the nearest reference: one of the models that the auditor
    has unlearned himself, from the same target (``references``); without any the target itself. References are compared with
    each other, so it is seen how far honest unlearnings lie apart. Retrained models began at other weights and are no control,
    and a provider who knows the statistics can match them (``value-norms``, ``mode=reference``): this is shown, not judged.
    """

    name: ClassVar[str] = "sink-statistics"
    title: ClassVar[str] = "Attention sinks"
    formula: ClassVar[str] = "min over references of sqrt(mean over blocks l and places p of (log |v_lp| - log |v'_lp|)^2)"
    paper: ClassVar[Paper] = BACKDOOR
    access: ClassVar[Access] = Access.BOTH
    criterion: ClassVar[Criterion] = Criterion.REPRESENTATION
    passes: ClassVar[str] = "one forward pass under each model"
    convicts: ClassVar[bool] = False
    asks: ClassVar[bool] = False  # references may be registered later than a model is visited
    toward: ClassVar[Literal[1, -1]] = 1
    range: ClassVar[Range] = (0.0, None)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.VALUES, Offer.RECEIVED, Offer.SEQUENCE})

    positions: int = Field(8, ge=1, description="tokens of each record, from the first on, that are measured")
    references: tuple[str, ...] = Field(
        (),
        description="honestly unlearned models of the same target: labels of models of the audit, or folders of models or runs",
    )

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Something to compare with."""
        return "" if self.references or target_of(evidence) else "it needs the target, or models to compare with (references)"

    def compared(self, evidence: Evidence, label: str) -> list[str]:
        """With which models one is compared: the references without itself, or the target."""
        own = evidence.subject(label).fingerprint
        found = [r for r in self.references if self._fingerprint(evidence, r) != own]
        target = target_of(evidence)
        return found if self.references or not target or target == label else [target]

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The models it is compared with."""
        return {"compared": sorted(self._fingerprint(evidence, r) for r in self.compared(evidence, label))}

    def _adapter(self, evidence: Evidence, name: str) -> Adapter:
        """A model by its label, or from a folder.

        Raises:
            InputError: there is neither.
        """
        if name in evidence.subjects:
            return evidence.adapter(name)
        folder = next((f for f in (Path(name) / "model", Path(name)) if f.is_dir()), None)
        if folder is None:
            known = ", ".join(evidence.subjects)
            raise InputError(
                f"The reference {name!r} is neither a model of this audit ({known}) nor a folder.",
                "Give the folder of a run: attack_options.sink-statistics.references=[runs/own].",
            )
        return load(folder)

    def _fingerprint(self, evidence: Evidence, name: str) -> str:
        if name in evidence.subjects:
            return evidence.subjects[name].fingerprint
        return evidence.memo(("sink reference", name), lambda: self._adapter(evidence, name).fingerprint())

    def profile(self, evidence: Evidence, which: str, name: str) -> Arrays:
        """``norms`` and ``received`` of a model, ``[records, blocks, places]``, NaN beyond the end of a record."""

        def make() -> Arrays:
            adapter = self._adapter(evidence, which)
            return profile(
                adapter, [adapter.encode(r) for r in evidence.records(name)], self.positions, evidence.protocol.batch_tokens
            )

        return evidence.memo(("sinks", self._fingerprint(evidence, which), name, self.positions), make)

    def columns(self, evidence: Evidence, label: str, name: str) -> Mapping[str, Values]:
        """Distance of the log lengths from the nearest reference, and (``received``) of the attention received."""
        try:
            own = self.profile(evidence, label, name)
            others = [self.profile(evidence, r, name) for r in self.compared(evidence, label)]
            found = {k: nearest(own[k], [o[k] for o in others]) for k in _KINDS}
        except InputError as error:
            evidence.miss(f"{self.title} of {label!r} were not measured: {error.message}")
            found = {k: np.full(len(evidence.records(name)), np.nan) for k in _KINDS}
        values = {k: Values(v, np.isfinite(v)) for k, v in found.items()}
        return {"": values["norms"], "received": values["received"]}

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """Both distances, how far the references lie from each other, and the statistics themselves, place by place."""
        out, name = super().compute(evidence, label), "forget"
        key = f"{name}.{self.name}"
        if key not in out:
            return out
        told = {k: self._by_place(evidence, label, name, k) for k in _KINDS}
        against = ", ".join(self.compared(evidence, label))
        out[key] = out[key].model_copy(update={"note": f"nearest of {against}; {told['norms']}"})
        received = record_number(
            evidence, name, self.column(evidence, label, name, "received").values, Direction.REFERENCE, range=(0.0, None),
            note=f"the same of the attention that tokens receive from later ones, as it is; {told['received']}",
        )  # fmt: skip
        out |= {} if received is None else {f"{key}.received": received}
        apart = self._apart(evidence, name)
        if apart is not None:
            note = "the farthest of the references from its nearest other one: as far as honest unlearnings lie apart"
            out[f"{key}.references"] = self.plain(evidence, name, apart, note)
        return out

    def _apart(self, evidence: Evidence, name: str) -> float | None:
        """The largest mean distance of a reference from its nearest other one; None with less than two."""
        held = [self.profile(evidence, r, name)["norms"] for r in self.references]
        if len(held) < 2:
            return None
        return max(float(np.nanmean(nearest(h, [*held[:i], *held[i + 1 :]]))) for i, h in enumerate(held))

    def _by_place(self, evidence: Evidence, label: str, name: str, kind: str) -> str:
        """The statistics by place, means over records and blocks: of the model, the references, the target, retrained models."""

        def line(which: str) -> str:
            held = self.profile(evidence, which, name)[kind]
            with np.errstate(all="ignore"):
                means = np.nanmean(np.exp(held) if kind == "norms" else held, axis=(0, 1))
            return f"{which}: {' '.join(f'{m:.3g}' for m in means if np.isfinite(m))}"

        known = [label, *self.compared(evidence, label), target_of(evidence), *evidence.labels("retrained")]
        return "by place, " + "; ".join(line(w) for w in dict.fromkeys(filter(None, known)))


def profile(adapter: Adapter, examples: Sequence[Example], positions: int, batch_tokens: int) -> dict[str, NDArray[Any]]:
    """What the first tokens of examples look like to attention.

    Returns:
        ``norms``, natural logarithms of the lengths of the value vectors, and ``received``, the mean attention over heads that
        each token gets from the real tokens after it: float64 ``[examples, blocks, positions]``, NaN where an example has ended
        (of ``received`` also at its last token).
    """
    model, blocks = adapter.model, adapter.layers()
    place = {e.id: i for i, e in enumerate(examples)}
    out = {k: np.full((len(examples), len(blocks), positions), np.nan) for k in _KINDS}
    want = frozenset(f"{kind}:{block}" for kind in ("values", "received") for block in blocks)
    with evaluating(model), torch.no_grad():
        for part in fitting(examples, batch_tokens):
            found = adapter.forward(model, adapter.collate(part).to(device_of(model)), want)
            columns = found.columns()
            here = columns < positions
            last = columns == torch.tensor(found.token_counts, device=columns.device)[found.token_owner] - 1
            rows = np.array([place[e.id] for e in part])[found.token_owner[here].cpu().numpy()]
            for b, block in enumerate(blocks):
                lengths = found.value_vectors(block).float().norm(dim=1).clamp(min=1e-12).log()
                received = found.received(block).float().masked_fill(last, torch.nan)
                for kind, values in (("norms", lengths), ("received", received)):
                    out[kind][rows, b, columns[here].cpu().numpy()] = values[here].cpu().numpy()
    return out


def nearest(own: NDArray[Any], others: Sequence[NDArray[Any]]) -> Floats:
    """Of each record, the root mean square difference from that of ``others`` which is nearest on average; NaN without any.

    Args:
        own: ``[records, ...]``, NaN where there is nothing.
        others: of the same shape, or of another where a model has other blocks.

    Raises:
        InputError: the shapes differ.
    """
    if any(o.shape != own.shape for o in others):
        raise InputError("A reference has other blocks than the model.", "Compare with models of the same architecture.")
    if not others:
        return np.full(len(own), np.nan)
    axes = tuple(range(1, own.ndim))
    found = [np.sqrt(np.nanmean((own - o) ** 2, axis=axes)) for o in others]
    return np.asarray(min(found, key=np.nanmean), dtype=np.float64)
