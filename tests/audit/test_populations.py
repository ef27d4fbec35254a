"""Measures on many unlearned models, through a run and its audit: what retrains is at chance, what does nothing is found out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from torch import nn

from expunge.audit.document import AuditDocument
from expunge.audit.kernel.forgetting import forgetting_epsilon, forgetting_quality
from expunge.audit.kernel.klom import klom
from expunge.audit.kernel.likelihood import u_lira
from expunge.audit.outputs import References
from expunge.audit.settings import AuditSettings
from expunge.core.errors import InputError
from expunge.core.runs import cache_folder
from expunge.data.rows import table
from expunge.engine.members import Training
from expunge.engine.options import Engine
from expunge.pipeline import row_audit, row_runs
from expunge.pipeline.row_audit import RowAuditConfig, audit_rows_run, comparison, plan, repeated
from expunge.pipeline.row_runs import RowsConfig
from expunge.pipeline.supervised import Supervised, target_of

METRICS = ("u-lira", "forgetting-quality", "klom-models", "accuracy")
RETRAIN = {
    "name": "fixed",
    "lr": 1e-2,
    "steps": 200,
    "epochs": None,
    "batch": 60,
    "warmup": 0,
    "decay": "constant",
    "weight_decay": 0,
}
SETTINGS = AuditSettings(metrics=METRICS, draws=100, relearn=None, quantise=(), read_out=False)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def problem() -> Supervised:
    """300 digits of which 20 were learnt with a wrong label."""
    held = load_digits()
    rng = np.random.default_rng(3)
    order = rng.permutation(len(held.target))
    inputs, labels = (held.data / 16).astype(np.float32)[order], held.target[order].astype(np.int64)
    learnt = labels[:300].copy()
    learnt[:20] = (learnt[:20] + rng.integers(1, 10, 20)) % 10
    return Supervised(
        table(inputs[:300], learnt),
        network,
        Training(steps=200, batch=60, lr=1e-2),
        holdout=table(inputs[300:600], labels[300:600]),
    )


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[AuditDocument, row_audit.RowAuditPlan]]:
    out = {}
    for name, method, parts in (("retrained", "retrain", {"schedule": RETRAIN}), ("same", "ssd", {"alpha": 1e9})):
        config = RowsConfig(
            model="test",
            ids=tuple(map(str, range(20))),
            method=method,
            parts=parts,
            engine=Engine(checkpoint_every=0, device="cpu"),
        )
        folder = Path(tmp_path_factory.mktemp(name)) / "run"
        row_runs.execute(row_runs.plan(config, problem()), folder)
        made = plan(folder, RowAuditConfig(retrain=1, references=10, repeats=10, settings=SETTINGS), problem())
        out[name] = (audit_rows_run(made), made)
    return out


def value(document: AuditDocument, key: str) -> float:
    found = next(m for m in document.models if m.role == "unlearned").numbers[key].value
    assert found is not None
    return found


def test_a_method_that_retrains_is_at_chance_and_one_that_does_nothing_is_found_out(audits) -> None:
    good, bad = audits["retrained"][0], audits["same"][0]
    assert value(bad, "forget.u-lira") > 0.95
    assert abs(value(good, "forget.u-lira") - 0.5) < 0.15
    assert value(bad, "forget.forgetting-quality") < 0.1 < value(good, "forget.forgetting-quality")
    assert value(bad, "forget.klom-models") > value(good, "forget.klom-models") + 3
    assert value(bad, "competition-score") < value(good, "competition-score")
    note = next(m for m in good.models if m.role == "unlearned").numbers["forget.u-lira"].note
    assert "of 10 models, against 10 retrained" in note
    floor = float(note.rpartition(": ")[2])
    assert abs(floor - 0.5) < 0.2
    assert all("forget.u-lira" not in m.numbers for m in good.models if m.role != "unlearned")


def test_the_numbers_are_those_of_the_kernel_on_models_that_were_unlearned_one_by_one(audits) -> None:
    document, made = audits["same"]
    target = made.problem.adapter(target_of(made.problem))
    many = repeated(made, target)
    _, references = comparison(made.problem, target, made.chosen, made.sets, made.config)
    assert references is not None
    # The edit changes nothing, so the unlearned models are the originals.
    np.testing.assert_allclose(many["forget"], references.originals["forget"], atol=1e-4)
    held = many["forget"], references.retrained["forget"]
    assert value(document, "forget.u-lira") == pytest.approx(u_lira(*held).accuracy)
    assert value(document, "forget.forgetting-quality") == pytest.approx(forgetting_quality(forgetting_epsilon(*held)))
    assert value(document, "forget.klom-models") == pytest.approx(klom(*held).mean())


def test_what_was_unlearned_is_found_in_the_cache(audits) -> None:
    _, made = audits["same"]
    target = made.problem.adapter(target_of(made.problem))

    def files() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in (cache_folder() / "repeats").glob("*.safetensors")}

    first = repeated(made, target)
    held = files()
    assert len(held) >= 10
    again = repeated(made, target)
    assert files() == held
    assert all(np.array_equal(first[n], again[n]) for n in first)


def test_more_repeats_than_references_are_refused() -> None:
    with pytest.raises(InputError, match="3 reference models cannot be unlearned: there are 2"):
        RowAuditConfig(references=2, repeats=3)


def test_populations_of_unequal_numbers_of_models_are_refused() -> None:
    margins = {"forget": np.zeros((3, 4))}
    with pytest.raises(InputError, match="different numbers of models"):
        References(margins, margins, {"npo": {"forget": np.zeros((3, 4)), "retain": np.zeros((2, 4))}})
