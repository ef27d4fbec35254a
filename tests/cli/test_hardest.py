"""The rows that are hardest to forget, chosen on the command line and given back to it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.command import Run, refused
from tests.entries import DIGITS, Desk, write_entry

FLIPPED = DIGITS.replace(
    "    data = expunge.table(\n", "    labels = labels.copy(); labels[:30] = (labels[:30] + 1) % 10\n    data = expunge.table(\n"
)
SEARCH = ["outer=3", "epochs=10", "batch=null", "step=0.05"]


def test_wrong_rows_are_easy_to_forget_and_never_the_hardest(desk: Desk) -> None:
    write_entry(desk.folder, FLIPPED, "flipped.py")
    wrong = {f"row{i}" for i in range(30)}
    found = {}
    for goal in ("hardest", "easiest"):
        done = desk.run("hardest", "flipped.py:problem", 30, f"goal={goal}", *SEARCH, "--out", f"{goal}.txt", "--json")
        assert done.code == 0, done.err
        said = done.json()
        assert (said["rows"], said["of"], len(said["curve"])) == (30, 300, 3)
        found[goal] = set((desk.folder / f"{goal}.txt").read_text().split())
        assert found[goal] == set(said["ids"])
    assert not wrong & found["hardest"]
    assert len(wrong & found["easiest"]) > 20
    done = desk.run(
        "unlearn", "flipped.py:problem", "--id", "@hardest.txt", "--method", "ssd", "--out", "x", "--dry-run", "--json"
    )
    assert done.code == 0, done.err
    assert done.json()["rows"] == {"forget": 30, "retain": 270}


def test_a_person_is_chosen_as_a_whole(desk: Desk) -> None:
    said = desk.run("hardest", "digits.py:problem", 2, "--by", "subject", "--json").json()
    rows = np.array([int(name.removeprefix("row")) for name in said["ids"]])
    assert (len(rows), len(set(rows // 10))) == (20, 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([0], ["0 of 300 units", "[1, 299]"]),
        ([300], ["300 of 300 units"]),
        ([3, "--by", "page"], ["'page'", "row"]),
        ([3, "outre=2"], ["outre", "outer"]),
        ([3, "goal=worst"], ["'goal'", "hardest"]),
        ([3, "--out", "digits.py"], ["'digits.py' exists"]),
    ],
)
def test_bad_requests(expunge: Run, tmp_path, words: list[object], says: list[str]) -> None:
    write_entry(tmp_path)
    refused(expunge("hardest", "digits.py:problem", *words), *says)
    assert not (tmp_path / "cache").exists()
