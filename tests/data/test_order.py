"""The plan of batches: permutations, and nothing but the seed and the step."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.data.order import BatchPlan, TurnPlan, share

sizes = st.integers(1, 60)
batches = st.integers(1, 17)


@settings(deadline=None)
@given(sizes, sizes, batches, batches, st.integers(0, 2**40))
def test_every_pass_is_a_permutation(forget: int, retain: int, b: int, r: int, seed: int) -> None:
    plan = BatchPlan({"forget": forget, "retain": retain}, {"forget": b, "retain": r}, seed=seed, steps=40)
    per_epoch = plan.steps_per_epoch
    drawn: list[int] = []
    seen: list[int] = []
    for step, batch in enumerate(plan):
        drawn += batch["retain"]
        seen += batch["forget"]
        assert len(batch["retain"]) == r
        last = step % per_epoch == per_epoch - 1
        assert len(batch["forget"]) == (forget - b * (per_epoch - 1) if last else b)
        assert plan.epoch(step) == step // per_epoch
    for stream, size in ((seen, forget), (drawn, retain)):
        for at in range(0, len(stream) - size + 1, size):
            assert sorted(stream[at : at + size]) == list(range(size))


@settings(deadline=None)
@given(sizes, batches, st.integers(0, 100), st.integers(0, 39))
def test_a_step_needs_no_history(size: int, batch: int, seed: int, step: int) -> None:
    def make() -> BatchPlan:
        return BatchPlan({"forget": 9, "retain": size}, {"forget": 2, "retain": batch}, seed=seed, steps=40)

    straight = list(make())
    assert make().plan(step) == straight[step]
    backwards = make()
    assert [backwards.plan(s) for s in reversed(range(40))] == straight[::-1]


@given(st.lists(st.integers(), max_size=40), st.integers(1, 9))
def test_shares_make_up_the_batch(indices: list[int], world: int) -> None:
    parts = [share(indices, rank, world) for rank in range(world)]
    assert [i for part in parts for i in part] == indices
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_streams_and_passes_are_independent() -> None:
    plan = BatchPlan({"forget": 50, "retain": 50}, {"forget": 50, "retain": 50}, seed=0, steps=3)
    first, second, _ = plan
    orders = [first["forget"], first["retain"], second["forget"], second["retain"]]
    assert len({tuple(o) for o in orders}) == 4
    assert orders[0] != sorted(orders[0])
    other = BatchPlan({"forget": 50, "retain": 50}, {"forget": 50, "retain": 50}, seed=1, steps=3)
    assert other.plan(0)["forget"] != first["forget"]
    # The forget order does not depend on what else there is, and the retain order not on the forget set.
    alone = BatchPlan({"forget": 50}, {"forget": 50}, seed=0, steps=3)
    assert alone.plan(0)["forget"] == first["forget"]
    fewer = BatchPlan({"forget": 7, "retain": 50}, {"forget": 3, "retain": 50}, seed=0, steps=3)
    assert fewer.plan(0)["retain"] == first["retain"]


def test_uniform() -> None:
    """Each example is as likely as any other to come first."""
    plan = BatchPlan({"forget": 6}, {"forget": 6}, seed=0, steps=3000)
    counts = Counter(batch["forget"][0] for batch in plan)
    assert all(abs(counts[i] - 500) < 5 * np.sqrt(3000 * 5 / 36) for i in range(6))


def test_golden() -> None:
    """The same on every platform and with every version of NumPy: runs can be resumed elsewhere."""
    plan = BatchPlan({"forget": 10, "retain": 13}, {"forget": 4, "retain": 5}, seed=7, steps=100)
    found = [plan.plan(0), plan.plan(2), plan.plan(99)]
    assert found == GOLDEN


GOLDEN: list[dict[str, list[int]]] = [
    {"forget": [5, 4, 1, 0], "retain": [12, 8, 9, 1, 11]},
    {"forget": [7, 6], "retain": [6, 5, 0, 1, 0]},
    {"forget": [4, 7, 0, 9], "retain": [11, 3, 2, 8, 7]},
]


def test_another_process_sees_the_same() -> None:
    code = (
        "from expunge.data.order import BatchPlan\n"
        "print(BatchPlan({'forget': 30, 'retain': 70}, {'forget': 4, 'retain': 5}, seed=7, steps=100).plan(61))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "3", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    plan = BatchPlan({"forget": 30, "retain": 70}, {"forget": 4, "retain": 5}, seed=7, steps=100)
    assert done.stdout.strip() == str(plan.plan(61))


def test_the_cache_stays_small() -> None:
    plan = BatchPlan({"forget": 100, "retain": 30}, {"forget": 10, "retain": 25}, seed=0, steps=1000)
    for _ in plan:
        assert all(len(held) <= 2 for held in plan._passes.values())
    assert len(plan) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"forget": 0}, {"forget": 1}), "stream 'forget' is empty"),
        (({"forget": 3}, {"forget": 0}), r"batch size of 'forget' must be an int in \[1, inf\); got 0"),
        (({"forget": 3}, {"retain": 1}), "streams .* but batch sizes for"),
        (({}, {}), "at least one stream"),
    ],
)
def test_bad_plans(arguments: tuple[dict[str, int], dict[str, int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BatchPlan(*arguments, seed=0, steps=1)


def test_bad_seeds_steps_and_ranks() -> None:
    with pytest.raises(InputError, match="Seed and steps"):
        BatchPlan({"forget": 3}, {"forget": 1}, seed=-1, steps=1)
    plan = BatchPlan({"forget": 3}, {"forget": 1}, seed=0, steps=1)
    for step in (-1, 1):
        with pytest.raises(IndexError):
            plan.plan(step)
    with pytest.raises(ValueError, match="rank 2"):
        share([1], 2, 2)


@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)), batches=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    passes=st.tuples(st.integers(0, 4), st.integers(1, 4)), seed=st.integers(0, 5),
)  # fmt: skip
def test_turns_pass_over_each_stream_as_often_as_they_say(sizes, batches, passes, seed) -> None:
    names = ("forget", "retain")
    given_sizes, given_batches, given_passes = (dict(zip(names, v, strict=True)) for v in (sizes, batches, passes))
    plan = TurnPlan(given_sizes, given_batches, seed=seed, passes=given_passes)
    steps = [plan.plan(s) for s in range(plan.steps)]
    assert all(len(step) == 1 for step in steps)
    early = min(passes)
    for name, times in (("forget", early), ("retain", passes[1])):
        seen = [i for step in steps for i in step.get(name, ())]
        assert sorted(seen) == sorted(list(range(given_sizes[name])) * times)
    turns = [next(iter(step)) for step in steps]
    per = {n: -(-given_sizes[n] // given_batches[n]) for n in names}
    assert turns == (["forget"] * per["forget"] + ["retain"] * per["retain"]) * early + ["retain"] * per["retain"] * (
        passes[1] - early
    )
    with pytest.raises(IndexError):
        plan.plan(plan.steps)
    with pytest.raises(InputError, match="at least one epoch"):
        TurnPlan(given_sizes, given_batches, seed=seed, passes={"forget": 1, "retain": 0})
