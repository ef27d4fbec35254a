"""Tables read from files and from what other libraries hold."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import datasets as bundled

from expunge.core.errors import InputError
from expunge.data.tables import Reading, read, read_table

CSV = """case,age,weight,ward,person,sick
a1,12,3.5,Graz,p,yes
a2,40,1e1,Linz,p,no
a3,17,-2,Graz,q,yes
a4,65,0.25,Wien,,no
"""
ROLES = {"target": "sick", "id": "case", "subject": "person", "columns": ["ward"]}


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    path = tmp_path / "patients.csv"
    path.write_text(CSV, encoding="utf-8")
    return path


def same_tables(one, other) -> bool:
    return (
        one.ids == other.ids and one.classes == other.classes and one.subjects == other.subjects and one.task == other.task
        and one.inputs.dtype == other.inputs.dtype and np.array_equal(one.inputs, other.inputs)
        and np.array_equal(one.targets, other.targets) and set(one.columns) == set(other.columns)
        and all(np.array_equal(one.columns[c], other.columns[c]) for c in one.columns)
    )  # fmt: skip


def test_a_csv_file_gives_each_column_its_part(csv_file: Path) -> None:
    made = read_table(csv_file, **ROLES)
    assert made.ids == ("a1", "a2", "a3", "a4")
    assert made.classes == ("no", "yes")
    assert made.targets.tolist() == [1, 0, 1, 0]
    assert made.inputs.dtype == np.float32
    assert made.inputs.tolist() == [[12, 3.5], [40, 10], [17, -2], [65, 0.25]]
    assert made.subjects == ("p", "p", "q", "")
    assert [r.cluster for r in made.rows()] == ["p", "p", "q", "a4"]
    assert made.source == "patients.csv"


@pytest.mark.parametrize(
    ("conditions", "chosen"),
    [
        ({"where": "age < 18 and ward == 'Graz'"}, [0, 2]),
        ({"where": "weight == 0.25 or person == 'q'"}, [2, 3]),
        ({"where": "target == 'yes'"}, [0, 2]),
        ({"where": "sick == 'yes' and age < 15"}, [0]),
        ({"classes": ["no"]}, [1, 3]),
        ({"subjects": ["p"]}, [0, 1]),
        ({"ids": ["a4"]}, [3]),
    ],
)
def test_rows_are_chosen_by_columns_of_the_file(csv_file: Path, conditions, chosen) -> None:
    assert read_table(csv_file, **ROLES).select(**conditions).tolist() == chosen


def test_features_are_views_for_conditions_and_not_copies(csv_file: Path) -> None:
    made = read_table(csv_file, **ROLES)
    assert np.shares_memory(made.columns["age"], made.inputs)


def test_every_format_gives_the_same_table(csv_file: Path, tmp_path: Path) -> None:
    wanted = read_table(csv_file, **ROLES)
    frame = pandas.read_csv(csv_file, keep_default_na=False)
    frame.to_parquet(tmp_path / "patients.parquet")
    frame.to_json(tmp_path / "patients.jsonl", orient="records", lines=True)
    (tmp_path / "patients.json").write_text(json.dumps(frame.to_dict("records")), encoding="utf-8")
    sources = [
        tmp_path / "patients.parquet", str(tmp_path / "patients.jsonl"), tmp_path / "patients.json", frame,
        frame.to_dict("records"), {c: frame[c].to_numpy() for c in frame}, datasets.Dataset.from_pandas(frame),
    ]  # fmt: skip
    for source in sources:
        assert same_tables(read_table(source, **ROLES), wanted), source
    assert same_tables(read(csv_file, Reading(**ROLES)), wanted)


def test_named_features_keep_all_other_columns_for_conditions(csv_file: Path) -> None:
    made = read_table(csv_file, target="sick", features=["weight", "age"])
    assert made.inputs[0].tolist() == [3.5, 12]
    assert made.ids == ("0", "1", "2", "3")
    assert made.select(where="ward == 'Wien' or case == 'a1'").tolist() == [0, 3]


def test_a_regression_reads_numbers(csv_file: Path) -> None:
    made = read_table(csv_file, target="weight", features="age", task="regression", precision="float64")
    assert made.targets.dtype == made.inputs.dtype == np.float64
    assert made.targets.tolist() == [3.5, 10, -2, 0.25]
    assert made.classes == ()


@pytest.mark.parametrize(
    ("labels", "classes", "targets", "names"),
    [
        (["0", "10", "2", *map(str, range(11))], None, [0, 10, 2, *range(11)], [str(i) for i in range(11)]),
        (["b", "a", "b"], None, [1, 0, 1], ["a", "b"]),
        (["b", "a", "b"], ["b", "a", "c"], [0, 1, 0], ["b", "a", "c"]),
        (["1", "0", "1"], ["0", "1", "2"], [1, 0, 1], ["0", "1", "2"]),
        (["8", "3", "8"], ["3", "5", "8"], [2, 0, 2], ["3", "5", "8"]),
        ([1, 0, 1], ["cat", "dog"], [1, 0, 1], ["cat", "dog"]),
        ([8, 3, 8], [3, 8], [1, 0, 1], ["3", "8"]),
        ([True, False, True], None, [1, 0, 1], ["0", "1"]),
        ([1.0, 0.0, 1.0], None, [1, 0, 1], ["0", "1"]),
    ],
)
def test_labels_are_numbers_or_names(labels, classes, targets, names) -> None:
    rows = [{"x": float(i), "y": label} for i, label in enumerate(labels)]
    made = read_table(rows, target="y", classes=classes)
    assert made.targets.tolist() == targets
    assert list(made.classes) == names


def test_class_labels_of_datasets_are_indices_even_where_names_are_numbers() -> None:
    features = datasets.Features({"x": datasets.Value("float32"), "y": datasets.ClassLabel(names=["1", "2", "3"])})
    made = read_table(datasets.Dataset.from_dict({"x": [1, 2, 3], "y": [1, 2, 1]}, features), target="y")
    assert made.classes == ("1", "2", "3")
    assert made.targets.tolist() == [1, 2, 1]


def test_arrays_of_an_archive_keep_their_shape(tmp_path: Path) -> None:
    pictures = np.arange(5000 * 6).reshape(5000, 2, 3)
    np.savez(tmp_path / "p.npz", pictures=pictures, labels=np.arange(5000)[:, None] % 3, other=np.zeros(4))
    made = read_table(tmp_path / "p.npz", target="labels", features="pictures")
    assert np.array_equal(made.inputs, pictures)
    assert made.targets[:4].tolist() == [0, 1, 2, 0]


def test_bunches_of_scikit_learn() -> None:
    iris = bundled.load_iris()
    made = read_table(iris)
    assert made.classes == ("setosa", "versicolor", "virginica")
    assert np.array_equal(made.targets, iris.target)
    assert made.select(where="`petal width (cm)` > 2.4").tolist() == np.flatnonzero(iris.data[:, 3] > 2.4).tolist()
    framed = read_table(bundled.load_iris(as_frame=True))
    assert np.array_equal(framed.inputs, made.inputs)
    assert framed.classes == made.classes
    sugar = read_table(bundled.load_diabetes(), task="regression", precision="float64")
    assert np.array_equal(sugar.targets, bundled.load_diabetes().target)
    assert read_table(bundled.load_digits()).classes == tuple(map(str, range(10)))


class Letters:
    """A tokenizer: the number of each letter."""

    model_max_length = 5

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[ord(c) for c in t][: max_length if truncation else None] for t in texts]}


def test_texts_become_token_ids_with_padding_behind() -> None:
    rows = [{"t": "ab", "y": "x", "n": 3}, {"t": "cdefghi", "y": "z", "n": 4}]
    made = read_table(rows, text="t", target="y", tokenizer=Letters())
    assert made.inputs.dtype == np.int32
    assert made.inputs.tolist() == [[97, 98, -1, -1, -1], [99, 100, 101, 102, 103]]
    assert made.select(where="n == 3").tolist() == [0]
    assert read_table(rows, text="t", target="y", tokenizer=Letters(), max_length=3).inputs.shape == (2, 3)


@given(
    st.lists(
        st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32), st.sampled_from("abc")), min_size=1, max_size=40
    )
)
def test_numbers_come_back_bit_by_bit(rows) -> None:
    made = read_table([{"a": repr(a), "b": b, "y": y} for a, b, y in rows], target="y")
    assert np.array_equal(made.inputs, np.array([[a, b] for a, b, _ in rows], dtype=np.float32))
    assert [made.classes[t] for t in made.targets] == [y for *_, y in rows]


def test_conditions_compare_numbers_texts_and_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,y,age,zip,word\n1,a,3,0810,u\n2,b,,8010,\n3,a,20,1010,v\n", encoding="utf-8")
    made = read_table(path, target="y", features="x")
    assert made.select(where="age < 10").tolist() == [0]
    assert made.select(where="zip == '0810' or word == 'v'").tolist() == [0, 2]
    assert made.select(where="age > 10").tolist() == [2]


# ---- bad input ---------------------------------------------------------------------------------------------------------------

BAD = {
    "a1,12,x,Graz,p,yes": ("weight", "'x'", "line 6"),
    "a9,,1,Graz,p,yes": ("age", "no value", "line 6"),
    "a9,nan,1,Graz,p,yes": ("age", "nan", "line 6"),
    "a9,inf,1,Graz,p,yes": ("age", "inf", "line 6"),
    "a9,1e39,1,Graz,p,yes": ("age", "1e39", "float32", "line 6"),
    "a2,1,1,Graz,p,yes": ("case", "'a2'", "line 6"),
    ",1,1,Graz,p,yes": ("case", "no id", "line 6"),
    "a9,1,1,Graz,p,": ("sick", "no target", "row 5"),
    "a9,1,1,Graz,p": ("line 6", "5 cells"),
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_cell_is_named(csv_file: Path, line: str) -> None:
    csv_file.write_text(CSV + line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_table(csv_file, **ROLES)
    assert all(part in caught.value.message for part in ("patients.csv", *BAD[line])), caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "sik"}, "no column 'sik'"),
        ({"target": None}, "which column"),
        ({"subject": "persn"}, "no column 'persn', which is named as the subject"),
        ({"columns": []}, "'Graz' in line 2, which is no number"),
        ({"columns": ["wrd"]}, "no column 'wrd'"),
        ({"features": ["age", "ward"]}, "'ward' of patients.csv holds 'Graz' in line 2"),
        ({"features": ["age", "age"]}, "twice"),
        ({"features": ["sick"]}, "given as target and as features"),
        ({"features": []}, "No column is named"),
        ({"task": "regression"}, "'yes' in row 1, which is no number"),
        ({"classes": ["no", "maybe"]}, "'yes' in row 1, which is none of the classes"),
        ({"target": "age", "features": "weight"}, "no row of the class 0"),
        (
            {"target": "age", "features": "weight", "classes": ["a", "b"]},
            "label 12 in row 1, which is out of range: there are 2 classes",
        ),
        ({"target": "weight", "features": "age"}, "no class"),
        ({"size": 8}, "size speaks of images"),
        ({"max_length": 8}, "max_length speaks of texts"),
        ({"text": "ward"}, "tokenizer"),
        ({"text": "ward", "features": ["age"]}, "Both features and text"),
        ({"precision": "half"}, "precision"),
    ],
)
def test_a_bad_request_is_refused(csv_file: Path, change, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_table(csv_file, **{**ROLES, **change})
    assert said in str(caught.value)


def test_sources_that_hold_no_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("a,b\n", encoding="utf-8")
    (tmp_path / "broken.npz").write_bytes(b"PK no")
    (tmp_path / "broken.parquet").write_bytes(b"PAR no")
    np.savez(tmp_path / "odd.npz", x=np.zeros((3, 2)), y=np.zeros(4))
    pandas.DataFrame({"a": [], "b": []}).to_parquet(tmp_path / "none.parquet")
    split = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1], "b": [0]})})
    rows = [{"a": 1, "b": 0}, {"a": 2}]
    bare = datasets.Dataset.from_dict({"a": [], "b": []})
    wanted = [
        (tmp_path / "empty.csv", "holds no rows"), (tmp_path / "missing.csv", "no file"), (tmp_path / "broken.npz", "no archive"),
        (tmp_path / "broken.parquet", "no valid Parquet"), (tmp_path / "none.parquet", "holds no rows"), (7, "int"),
        ({}, "no columns"), (split, "train"), (rows, "item 2 has no column 'b'"), (bare, "no rows"),
        ([{"a": [1, 2], "b": 0}, {"a": [1], "b": 1}], "shapes [2] and [1]"),
        ([{"a": 10**400, "b": 1}], "is no number"), ({"a": np.zeros((0, 2)), "b": []}, "no rows"), ("", "empty"),
        ([{"a": 1, "b": -1}], "-1 in row 1, which is out of range"),
    ]  # fmt: skip
    for source, said in wanted:
        with pytest.raises(InputError) as caught:
            read_table(source, target="b")
        assert said in str(caught.value), (said, str(caught.value))
    with pytest.raises(InputError, match="of one length"):
        read_table(tmp_path / "odd.npz", target="y", features="x")


def test_names_that_are_none_and_numbers_too_large_are_refused() -> None:
    rows = [{"x": 1, "y": 1e300, "i": [1]}, {"x": 2, "y": 1, "i": [2]}]
    with pytest.raises(InputError, match=r"\[1\], which is no id"):
        read_table(rows, target="y", id="i", task="regression")
    with pytest.raises(InputError, match="too large for float32"):
        read_table(rows, target="y", features="x", task="regression")
    assert read_table(rows, target="y", features="x", task="regression", precision="float64").targets[0] == 1e300


def test_memory_is_that_of_the_array(tmp_path: Path) -> None:
    size, width = 6000, 40
    made = np.random.default_rng(0).random((size, width)).astype(np.float32)
    frame = pandas.DataFrame(made, columns=[f"c{i}" for i in range(width)]).assign(y=np.arange(size) % 2)
    frame.to_parquet(tmp_path / "t.parquet")
    del frame
    tracemalloc.start()
    read = read_table(tmp_path / "t.parquet", target="y")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(read.inputs, made)
    assert peak < 2.5 * made.nbytes + 1e6
