"""Rows, the choice of those to forget, and conditions on columns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.core.errors import InputError
from expunge.data.predicate import select
from expunge.data.rows import table

X = np.arange(12.0).reshape(6, 2)
AGES = np.array([12, 40, 17, 65, 18, 3])
CITIES = np.array(["Graz", "Linz", "Graz", "Wien", "Linz", "Linz"])
MADE = table(
    X, ["cat", "dog", "cat", "eel", "dog", "cat"], ids=list("abcdef"), subjects=["p", "p", "q", "r", "r", "r"],
    columns={"age": AGES, "city": CITIES, "home town": CITIES, "new": AGES < 18}, names=["width", "height"],
)  # fmt: skip


def test_rows_are_views_with_classes_as_numbers() -> None:
    assert MADE.classes == ("cat", "dog", "eel")
    rows = MADE.rows([3, 0], "some")
    assert [(r.id, r.target, r.cluster) for r in rows] == [("d", 2, "r"), ("a", 0, "p")]
    assert np.shares_memory(rows[0].inputs, MADE.inputs)
    assert table(X, np.arange(6) % 2).rows()[0].cluster == "0"


def test_a_set_of_rows_has_a_digest_of_its_content() -> None:
    whole = MADE.rows(name="x").digest
    assert whole == MADE.rows(name="y").digest
    changed = X.copy()
    changed[4, 1] += 1e-3
    others = [
        table(changed, ["cat", "dog", "cat", "eel", "dog", "cat"], ids=list("abcdef"), subjects=["p", "p", "q", "r", "r", "r"]),
        table(X, ["cat", "dog", "cat", "eel", "dog", "dog"], ids=list("abcdef"), subjects=["p", "p", "q", "r", "r", "r"]),
        table(X, ["cat", "dog", "cat", "eel", "dog", "cat"], ids=list("abcdeg"), subjects=["p", "p", "q", "r", "r", "r"]),
    ]
    assert len({whole, *(o.rows().digest for o in others)}) == 4


@pytest.mark.parametrize(
    ("conditions", "chosen"),
    [
        ({"ids": ["f", "b"]}, [1, 5]),
        ({"classes": ["dog", "eel"]}, [1, 3, 4]),
        ({"subjects": ["p"]}, [0, 1]),
        ({"where": "age < 18"}, [0, 2, 5]),
        ({"where": "age < 18 and city == 'Graz'"}, [0, 2]),
        ({"where": "not (age < 18 or `home town` in ('Wien', 'Graz'))"}, [1, 4]),
        ({"where": "12 <= age <= 18 and target != 'dog'"}, [0, 2]),
        ({"where": "new"}, [0, 2, 5]),
        ({"where": "age > -1 and city not in ['Linz']"}, [0, 2, 3]),
        ({"classes": ["cat"], "where": "age > 10"}, [0, 2]),
    ],
)
def test_rows_are_chosen(conditions, chosen) -> None:
    found = MADE.select(**conditions)
    assert found.tolist() == chosen
    assert sorted([*found, *MADE.others(found)]) == list(range(6))


def test_a_class_that_is_emptied_is_named() -> None:
    assert MADE.emptied(MADE.select(classes=["eel"])) == ["eel"]
    assert MADE.emptied(MADE.select(ids=["a", "b"])) == []


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({}, "Nothing says"),
        ({"ids": ["a", "g"]}, "no row id 'g'"),
        ({"classes": ["dgo"]}, "no class 'dgo'"),
        ({"subjects": ["z"]}, "no subject 'z'"),
        ({"where": "age > 100"}, "No row is chosen"),
        ({"where": "age > 0"}, "Every row is chosen"),
        ({"where": "agge > 0"}, "agge"),
        ({"where": "age > "}, "cannot be read"),
        ({"where": "age > 'x'"}, "compares text with numbers"),
        ({"where": "__import__('os').system('true')"}, "more than comparisons"),
        ({"where": "(lambda: 1)() == age"}, "more than comparisons"),
        ({"where": "age.size > 3"}, "more than comparisons"),
        ({"where": "age + 1 > 3"}, "more than comparisons"),
        ({"where": "age"}, "more than comparisons"),
        ({"where": "(" * 5000}, "cannot be read"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(conditions, message) -> None:
    with pytest.raises(InputError) as caught:
        MADE.select(**conditions)
    assert message in str(caught.value)


def test_nearest_names_are_told() -> None:
    with pytest.raises(InputError) as caught:
        MADE.select(classes=["dgo"])
    assert "dog" in caught.value.remedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": [0, 1, 2, 0, 1]}, "5 of targets"),
        ({"targets": [0, 1, 3, 0, 1, -1]}, "-1 is out of range"),
        ({"targets": [0, 1, 3, 0, 1, 2], "classes": ["a", "b", "c"]}, "3 is out of range"),
        ({"targets": [0, 1, 0.5, 0, 1, 2]}, "0.5 is no class"),
        ({"targets": ["a", "b", "x", "a", "a", "a"], "classes": ["a", "b"]}, "'x' is none of the classes"),
        ({"targets": [0.0, np.nan, 1, 1, 1, 1], "task": "regression"}, "row 2 is not finite"),
        ({"targets": ["a"] * 6, "task": "regression"}, "not numbers"),
        ({"targets": np.zeros((6, 2)), "task": "regression"}, "shape [6, 2]"),
        ({"targets": [0] * 6, "ids": list("aabcde")}, "'a' occurs twice"),
        ({"targets": [0] * 6, "inputs": np.array([["a"], ["b"]] * 3)}, "not numbers"),
        ({"targets": [0] * 6, "inputs": np.arange(6.0)}, "shape [6]"),
        ({"targets": [0] * 6, "columns": {"age": [1]}}, "1 of age"),
    ],
)
def test_a_bad_table_is_refused(arguments, message) -> None:
    with pytest.raises(InputError) as caught:
        table(**{"inputs": X, **arguments})
    assert message in str(caught.value)


def test_a_missing_value_names_its_column() -> None:
    broken = X.copy()
    broken[4, 1] = np.inf
    with pytest.raises(InputError, match="'height' holds inf in row 5"):
        table(broken, [0] * 6, names=["width", "height"])


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.integers(-5, 5), st.integers(-5, 5))
def test_conditions_agree_with_python(values, low, high) -> None:
    held = {"x": np.array(values)}
    for text in ("x < {a} or not x >= {b}", "{a} <= x < {b}", "x in ({a}, {b}) and x != {b}"):
        written = text.format(a=low, b=high)
        expected = [bool(eval(written, {"x": v})) for v in values]
        assert select(written, held).tolist() == expected
