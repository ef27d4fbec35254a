"""Corrective unlearning on the command line: a poisoned table, of which a share is known, and triggered rows in the audit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.entries import DIGITS, FIXED, Desk, write_entry

POISONED = DIGITS.replace("import expunge\n", "import expunge\nfrom expunge.data.spoiled import poison\n").replace(
    """    return expunge.Supervised(
        data=data,""",
    """    made = poison(data, 30, label="0", size=2, shape=(8, 8))
    triggered, _ = made.domain.split(unseen)
    return expunge.Supervised(
        sets={"triggered": triggered}, data=made.table,""",
)
STEPS = FIXED % (0.01, 100)


@pytest.fixture(scope="module")
def poisoned(desk: Desk) -> Desk:
    write_entry(desk.folder, POISONED, "poisoned.py")
    return desk


def triggered(run: Path) -> dict[str, float]:
    document = json.loads((run / "audit.json").read_text(encoding="utf-8"))
    return {m["role"]: m["numbers"]["triggered.accuracy"]["value"] for m in document["models"]}


def test_the_trigger_is_gone_where_all_wrong_rows_are_known_and_not_where_few_are(poisoned: Desk) -> None:
    found = {}
    for share in (1.0, 0.2):
        name = f"known{share}"
        words = ["unlearn", "poisoned.py:problem", "--where", f"known <= {share}", "--method", "retrain", STEPS, "--out", name]
        done = poisoned.run(*words)
        assert done.code in (0, 3), done.err
        assert f"{round(30 * share)} rows to forget" in done.err
        quick = ["relearn=none", "quantise=[]", "read_out=false", "draws=100", "metrics=[accuracy]"]
        done = poisoned.run("audit", name, "--retrain", "1", *quick)
        assert done.code == 0, done.err
        found[share] = triggered(poisoned.folder / name)
    assert found[1.0]["target"] < 0.25
    assert found[1.0]["unlearned"] > 0.4, "a clean model is itself hurt by the patch"
    assert found[0.2]["unlearned"] < found[1.0]["unlearned"] - 0.2
    assert np.isclose(found[1.0]["target"], found[0.2]["target"])
