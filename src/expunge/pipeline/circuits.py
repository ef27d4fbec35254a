"""Circuit-guided difficulty of a request: anchors from runs that are done, or from two short gradient ascents made for it.

Anchors say which records were hard to erase *on this target*, so somebody must have unlearned something from it: runs of earlier
requests, or gradient ascent on copies of the target. In the second case the forget set is cut in two by subject, each half is
unlearned alone, and the records of one half are scored by what happened to the other: no record has a share in its own score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from expunge.adapters.head import bare
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.storage import joined
from expunge.audit.circuits import CircuitSettings, circuits
from expunge.audit.hardness import Floats, Foretold, Ints, Overlap, cud, folds, foretold
from expunge.audit.scores import score
from expunge.audit.swaps import Swap, swaps
from expunge.audit.wiring import Wiring
from expunge.core.errors import InputError
from expunge.core.runs import Run
from expunge.data.records import Record, RecordSet, content_key
from expunge.engine.options import Engine
from expunge.engine.outcome import Progress
from expunge.pipeline.config import UnlearnConfig
from expunge.pipeline.models import open_adapter
from expunge.pipeline.unlearn import Request, load_request, run_in_memory
from expunge.pipeline.unlearn import plan as plan_run

HALVES = 2  #: of the forget set, each unlearned alone
FOLDS = 5  #: of records that other runs have unlearned
METHOD = "gradascent"  #: what makes anchors where none are given


@dataclass(frozen=True)
class RecordCircuit:
    """The circuit of one forget record.

    Attributes:
        id: of the record.
        cud: circuit-guided difficulty in [0, 1], higher is harder.
        depth: mean layer, from 0, at which the circuit's edges begin; -1 are the embeddings.
        swapped: what its counterpart is: the prompt about another ``subject``, or the nearest other ``prompt``.
    """

    id: str
    cud: float
    depth: float
    swapped: str


@dataclass(frozen=True)
class CircuitDifficulty:
    """How hard a request is by its circuits.

    Attributes:
        records: in the order of the forget set; records without a counterpart (plain text) are left out.
        left_out: how many are.
        source: names of the runs whose records are the anchors; empty where two gradient ascents were made for it.
        pool: records that anchors were drawn from.
        risen: mean rise of the loss of the pool by unlearning, in nats per token.
        edges: of a circuit, and of the model.
        foretold: how well anchors foretell, over the pool, each record by anchors of other folds.
    """

    records: tuple[RecordCircuit, ...]
    left_out: int
    source: tuple[str, ...]
    pool: int
    risen: float
    edges: tuple[int, int]
    foretold: Foretold

    @property
    def trusted(self) -> bool:
        """Whether anchors foretell better than 95 of 100 random ones."""
        return self.foretold.value > 0 and self.foretold.p <= 0.05

    def json(self) -> dict[str, Any]:
        """A plain mapping."""
        check = self.foretold
        return {
            "records": [asdict(r) for r in self.records], "left_out": self.left_out,
            "anchors": {"runs": list(self.source), "method": None if self.source else METHOD, "records": self.pool,
                        "loss_risen": self.risen},
            "edges": {"circuit": self.edges[0], "model": self.edges[1]},
            "foretold": {
                "spearman": check.value, "p": check.p, "spearman_given_loss": check.partial, "p_given_loss": check.p_partial,
                "random_anchors": float(check.random.mean()), "records": check.records,
            },
        }  # fmt: skip


@dataclass(frozen=True)
class _Outcomes:
    """Records that were unlearned, and how: ranks within what was unlearned together, in (0, 1], higher is better erased."""

    records: list[Record]
    erased: Floats
    risen: float


def circuit_difficulty(
    adapter: LanguageAdapter,
    request: Request,
    engine: Engine,
    *,
    runs: Sequence[str] = (),
    settings: CircuitSettings | None = None,
    progress: Progress | None = None,
) -> CircuitDifficulty:
    """Compare the circuits of forget records with those of records that were hard and easy to erase from this target.

    The model that the adapter holds is left as it is.

    Args:
        adapter: holds the target, a decoder whose heads can be told apart.
        request: checked data.
        engine: how the machine is used, and the seed.
        runs: folders of finished ``expunge unlearn`` runs that began from this target; none: gradient ascent on two copies of it.
        settings: how circuits are found.
        progress: called as it goes on.

    Raises:
        InputError: a model whose heads cannot be told apart, a run that does not fit, nothing that tells gradient ascent when to
            stop, or too few records.
    """
    search = _Search(adapter, engine, settings or CircuitSettings(), progress)
    plain = _plain(adapter)
    wiring = Wiring(plain)
    forget, others = list(request.forget), list(request.retain or ())
    own = search.counterparts(forget, others)
    if not own:
        raise InputError(
            "No record to forget has a prompt that could be asked of somebody else.",
            "Circuits are compared for records with prompts of at least two subjects.",
        )
    mine = [r for r, _ in own]
    if runs:
        outcomes = search.of_runs(runs)
        pool = search.counterparts(outcomes.records, [*forget, *others])
        named = {r.id: r.cluster for r, _ in pool}  # a record that was unlearned before is set aside with itself
        deal = folds([*named.values(), *(named.get(content_key(r), r.cluster) for r in mine)], FOLDS, engine.seed)
        pool_deal, deal = deal[: len(pool)], deal[len(pool) :]
    else:
        deal = pool_deal = folds([r.cluster for r in mine], HALVES, engine.seed)
        outcomes, pool = search.made_here(request, mine, deal), own
    found = search.circuits(plain, wiring, own)
    held = found if pool is own else search.circuits(plain, wiring, pool)
    place = {r.id: i for i, r in enumerate(outcomes.records)}
    erased = outcomes.erased[[place[r.id] for r, _ in pool]]
    measure = cud(Overlap.of(found, held, deal, pool_deal), erased)
    losses = score(adapter, [adapter.encode(r) for r, _ in pool], batch_tokens=engine.max_tokens).nll()
    clusters = [r.cluster for r, _ in pool]
    check = foretold(Overlap.own(held, pool_deal), erased, erased, losses, clusters=clusters, seed=engine.seed)
    depth = found @ wiring.graph.depth.numpy() / found.sum(1)
    rows = zip(own, measure.tolist(), depth.tolist(), strict=True)
    size = search.settings.size(wiring.graph.n_edges), wiring.graph.n_edges
    return CircuitDifficulty(
        tuple(RecordCircuit(r.id, value, deep, others[0].how) for (r, others), value, deep in rows),
        len(forget) - len(own), tuple(runs), len(pool), outcomes.risen, size, check,
    )  # fmt: skip


_Held = list[tuple[Record, list[Swap]]]


@dataclass(frozen=True)
class _Search:
    """What is looked at, and how."""

    adapter: LanguageAdapter
    engine: Engine
    settings: CircuitSettings
    progress: Progress | None

    def counterparts(self, records: Sequence[Record], others: Sequence[Record]) -> _Held:
        """The records that have counterparts, with them."""
        made = swaps(self.adapter, records, others, self.engine.seed, self.settings.counterparts)
        return [(r, held) for r, held in zip(records, made, strict=True) if held]

    def circuits(self, plain: LanguageAdapter, wiring: Wiring, held: _Held) -> NDArray[np.bool_]:
        """Circuits of records, bool ``[records, E]``."""

        def tell(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(done, total, "circuits of records")

        tokens = self.engine.max_tokens
        return circuits(plain, wiring, [s for _, s in held], self.settings, batch_tokens=tokens, progress=tell)

    def made_here(self, request: Request, records: list[Record], deal: Ints) -> _Outcomes:
        """Gradient ascent on each half of the records alone, each time on a copy of the target."""
        if request.retain is None and request.holdout is None:
            raise InputError(
                "Nothing tells the gradient ascent that makes the anchors when to stop.",
                "Give --holdout or --retain, or runs that are done by --anchors.",
            )
        erased, rises = np.zeros(len(records)), np.zeros(len(records))
        for half in np.unique(deal):
            own = np.flatnonzero(deal == half)
            part = RecordSet("forget", tuple(records[i] for i in own), request.forget.source)
            made = plan_run(self.adapter.copy(), Request(part, request.retain, request.holdout), METHOD, {}, self.engine)
            outcome, _ = run_in_memory(made, progress=self._telling(int(half)))
            if outcome.reason == "diverged":
                raise InputError("The gradient ascent that makes the anchors diverged.", "Give runs that are done by --anchors.")
            after = made.adapter.sharing()
            after.model = outcome.model
            rises[own] = self._rise(after, part)
            erased[own] = _ranks(rises[own])
        return _Outcomes(records, erased, float(rises.mean()))

    def _telling(self, half: int) -> Progress | None:
        progress = self.progress
        if progress is None:
            return None

        def tell(done: int, total: int, text: str) -> None:
            progress(done, total, f"gradient ascent {half + 1} of {HALVES}, for anchors: {text}")

        return tell

    def of_runs(self, runs: Sequence[str]) -> _Outcomes:
        """What runs that are done have erased; a record of several runs gets the mean of its ranks."""
        target = self.adapter.fingerprint()
        checked = [_checked(Path(name), target) for name in runs]
        records: dict[str, Record] = {}
        ranks: dict[str, list[float]] = {}
        rises: list[float] = []
        for number, (name, (config, forget)) in enumerate(zip(runs, checked, strict=True)):
            if self.progress is not None:
                self.progress(number, len(runs), f"what {name} has erased")
            rise = self._rise(open_adapter(name, config.text), forget)
            rises += rise.tolist()
            for record, rank in zip(forget, _ranks(rise).tolist(), strict=True):
                key = content_key(record)  # ids of different files may be the same
                records.setdefault(key, replace(record, id=key, subject=record.cluster))
                ranks.setdefault(key, []).append(rank)
        return _Outcomes(list(records.values()), np.array([np.mean(ranks[k]) for k in records]), float(np.mean(rises)))

    def _rise(self, after: LanguageAdapter, records: Sequence[Record]) -> Floats:
        """By how much the loss of each record is higher than under the target, in nats per token."""
        examples = [self.adapter.encode(r) for r in records]
        held = [score(a, examples, batch_tokens=self.engine.max_tokens).nll() for a in (self.adapter, after)]
        return np.asarray(held[1] - held[0], dtype=np.float64)


def _plain(adapter: LanguageAdapter) -> LanguageAdapter:
    """The same model without peft: of a model that wears a LoRA, a copy with the LoRA in its weights."""
    if not hasattr(bare(adapter.model), "peft_config"):
        return adapter
    merged = adapter.copy()
    merged.model = joined(bare(merged.model))
    return merged


def _checked(folder: Path, target: str) -> tuple[UnlearnConfig, RecordSet]:
    """The configuration and the forget set of a run that is done and began from the target.

    Raises:
        InputError: it is none, it has not finished, it began from another model, or its data have changed.
    """
    run = Run.open(folder)
    entry = run.manifest["stages"].get("unlearn", {})
    if run.manifest["kind"] != "unlearn" or entry.get("state") != "done":
        raise InputError(f"{str(folder)!r} is no finished run of expunge unlearn.", "Anchors are what such runs have erased.")
    if run.manifest["inputs"]["target"]["digest"] != target:
        raise InputError(
            f"The run {str(folder)!r} began from another model than this target, and says nothing of its circuits.",
            "Give runs that began from it, or leave --anchors out: gradient ascent on copies of the target then makes them.",
        )
    config = UnlearnConfig(**run.manifest["config"])
    forget = load_request(config).forget
    if forget.digest != run.manifest["inputs"]["forget"]["digest"]:
        raise InputError(f"What the run {str(folder)!r} has forgotten has changed since.", "Put the file back, or leave it out.")
    return config, forget


def _ranks(values: Floats) -> Floats:
    return np.asarray(stats.rankdata(values) / len(values), dtype=np.float64)
