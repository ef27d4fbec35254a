"""Whatever is wrong with a request on rows is told in one sentence with the remedy, before anything is trained or written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import Done, Run, refused
from tests.entries import DIGITS, write_entry

GOOD = ["--class", 3, "--method", "ssd", "--out", "out"]


@pytest.fixture(autouse=True)
def nothing_written(tmp_path: Path) -> Iterator[None]:
    """No test here may leave a run or train a model."""
    yield
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def ask(expunge: Run, tmp_path: Path):
    """Run ``expunge unlearn digits.py:problem`` with the digits, or other text in their place."""

    def run(*words: object, change: tuple[str, str] = ("", ""), text: str | None = None) -> Done:
        if change[0]:
            assert change[0] in DIGITS
        write_entry(tmp_path, DIGITS.replace(*change) if text is None else text)
        return expunge("unlearn", "digits.py:problem", *words)

    return run


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (["--id", "row3000"], ["row id 'row3000'", "Nearest: row30"]),
        (["--id", "row1", "--id", "zebra", "--id", "quagga"], ["are no row id 'zebra', 'quagga'", "There are: row0, row1,"]),
        (["--class", "10"], ["no class '10'"]),
        (["--subject", "writer77"], ["no subject 'writer77'", "writer7"]),
        (["--where", "page == 77"], ["No row is chosen", "Widen"]),
        (["--where", "page >= 0"], ["Every row is chosen", "Narrow"]),
        (["--where", "page >"], ["'page >' cannot be read", "Write comparisons"]),
        (["--where", "pag == 3"], ["no column 'pag'", "'page'"]),
        (["--where", "page == 'three'"], ["text with numbers"]),
        (["--where", "__import__('os').system('true') == 0"], ["more than comparisons"]),
        (["--where", "page >= 1"], ["250 rows to forget and 50 to keep"]),
        ([], ["which rows to forget"]),
    ],
)
def test_choice(ask, choice: list[object], says: list[str]) -> None:
    refused(ask(*choice, "--method", "ssd", "--out", "out"), *says)


def test_subjects_of_data_without_any(ask) -> None:
    cut = 'subjects=[f"writer{i // 10}" for i in range(300)],'
    refused(ask("--subject", "writer7", "--out", "out", change=(cut, "")), "name no subjects", "column")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("digit.py:problem", ["no file 'digit.py'", "file.py:function"]),
        ("digits.py:problm", ["no function 'problm'", "problem"]),
        ("nowhere.digits:problem", ["no module 'nowhere.digits'", "file.py:function"]),
        ("digits.py:np", ["no function 'np'", "It has: ", "problem"]),
        ("digits.py:tables", ["returned tuple", "expunge.Supervised"]),
    ],
)
def test_entry(expunge: Run, tmp_path: Path, source: str, says: list[str]) -> None:
    write_entry(tmp_path)
    refused(expunge("unlearn", source, *GOOD), *says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("nn.Linear(32, 10)", "nn.Linear(32, 7)"), ["7", "10"]),
        (("labels[:300],", "labels[:300] - 1,"), ["label -1 is out of range"]),
        (("labels[:300],", "labels[:300], classes=list('abc'),"), ["label 9 is out of range", "3 classes"]),
        (("data = expunge", "inputs[17, 5] = float('nan'); data = expunge"), ["'5' holds nan in row 18"]),
        (("expunge.table(inputs[300:600],", "expunge.table(inputs[300:600, :60],"), ["shape [64]", "[60]", "alike"]),
        (("expunge.table(inputs[300:600],", "expunge.table(inputs[300:600], task='regression', targets="), ["another task"]),
        (("training=expunge.Training(steps=100, batch=50, lr=1e-2)", ""), ["neither a trained model", "training="]),
        (("data=data, holdout", "sets={'test': unseen}, data=data, holdout"), ["cannot be called 'test'", "Rename"]),
        (
            ("data=data, holdout", "sets={'odd': expunge.table([[1.0]], [0], classes=data.classes)}, data=data, holdout"),
            ["'odd'", "[1]"],
        ),
        (("data=data, holdout", "sets={'odd': expunge.table([[1.0]], [0])}, data=data, holdout"), ["set 'odd'", "other classes"]),
        (("steps=100", "steps=0"), ["'steps' of ensemble must be an int in [1, inf)"]),
        (("steps=100", "step=100"), ["'steps' of ensemble is missing"]),
        (("build=network", "build=lambda: network"), ["build made function", "torch.nn.Module"]),
        (('ids=[f"row{i}"', 'ids=[f"row{i // 2}"'), ["'row0' occurs twice"]),
        (("inputs[:300], labels[:300]", "inputs[:300], labels[:200]"), ["300 rows of inputs and 200 of targets"]),
    ],
)
def test_what_the_entry_returns(ask, change: tuple[str, str], says: list[str]) -> None:
    refused(ask(*GOOD, change=change), *says)


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (("data, unseen = tables()", 'raise RuntimeError("no disk")'), "raise RuntimeError", "RuntimeError: no disk"),
        (("from torch import nn", "from torch import nn, hammer"), "from torch import nn, hammer", "ImportError: cannot import"),
        (("import expunge\n", "import expunge\nimport no_such_library\n"), "no_such_library", "ModuleNotFoundError: No module"),
        (("import expunge\n", "import expunge\nx = = 3\n"), "x = = 3", "SyntaxError: invalid syntax"),
        (("nn.Linear(64, 32)", "nn.Linear(64, '32')"), "nn.Linear(64, '32')", "'build' raised TypeError"),
    ],
)  # fmt: skip
def test_errors_of_the_entry_itself_keep_their_traceback(ask, change: tuple[str, str], line: str, said: str) -> None:
    done = ask(*GOOD, change=change)
    assert done.code == 2, done.err
    trace, _, told = done.err.rpartition("Error: '")
    assert "digits.py" in trace
    assert line in trace
    assert "expunge/pipeline" not in trace, "only the user's own lines help"
    assert said in told.replace("\n", " ") or said in "'" + told
    assert "Correct it" in told
    assert "foresaw" not in done.err
    assert not done.out


def test_an_entry_may_import_what_lies_beside_it(expunge: Run, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    write_entry(tmp_path / "code", name="mine.py")
    write_entry(tmp_path / "code", "from mine import problem\n", "entry.py")
    done = expunge("unlearn", "code/entry.py:problem", *GOOD, "--dry-run")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--forget", "f.jsonl"], ["--forget is for language models", "--class"]),
        (["--retain", "r.jsonl"], ["--retain is for language models"]),
        (["--column", "prompt=x"], ["--column"]),
        (["--requests", "requests.jsonl"], ["--requests is for language models"]),
        (["--retrain", 2], ["--retrain", "expunge audit"]),
        (["--holdout", "h.csv"], ["brings its own data", "--holdout"]),
        (["--data", "d.csv"], ["brings its own data", "--data"]),
        (["--base", "b"], ["brings its own data", "--base"]),
        (["training.steps=3", "training.batch=2", "training.lr=0.1"], ["brings its own data", "training.*"]),
        (["reading.text=review"], ["brings its own data", "reading.*"]),
        (["--method", "npoo"], ["no method 'npoo'", "'npo'"]),
        (["--method", "dpo"], ["'dpo' needs", "--matrix"]),
        (["--method", "sisa"], ["'sisa'", "expunge train"]),
        (["--method", "npo", "beta=-1"], ["'beta' of npo must be a float in (0, inf)"]),
        (["--method", "npo", "betta=1"], ["betta", "beta"]),
        (["--alternatives", "template"], ["'alternatives'", "auto, other, any"]),
        (["engine.sed=1"], ["'sed'", "seed"]),
    ],
)
def test_options(ask, words: list[object], says: list[str]) -> None:
    refused(ask(*GOOD, *words), *says)


def test_out(ask, tmp_path: Path) -> None:
    refused(ask("--class", 3), "--out RUN")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    refused(ask("--class", 3, "--out", "taken"), "not empty", "--resume")
    (tmp_path / "file").touch()
    refused(ask("--class", 3, "--out", "file"), "is a file")
    assert sorted(p.name for p in (tmp_path / "taken").iterdir()) == ["x"]


def test_holdout_rows_that_were_trained_on(ask) -> None:
    """As unseen rows they would say when to stop, and every attack would take them for non-members."""
    change = (
        'inputs[300:600], labels[300:600], subjects=[f"other{i // 10}" for i in range(300)]',
        "inputs[200:500], labels[200:500]",
    )
    refused(ask(*GOOD, change=change), "100 of 300 holdout rows equal a row that was trained on", "--allow-overlap")
    done = ask(*GOOD, "--allow-overlap", "--dry-run", change=change)
    assert done.code == 0, done.err
    assert "100 of 300 holdout rows" in done.err.replace("\n", " ")


def test_nothing_says_when_to_stop(ask) -> None:
    cut = "holdout=unseen, "
    refused(ask("--class", 3, "--method", "npo", "--out", "out", change=(cut, "")), "never seen", "fixed schedule")


def test_equal_rows_on_both_sides(ask) -> None:
    change = ("    data = expunge", "    inputs[5], labels[5] = inputs[3], labels[3]\n    data = expunge")
    refused(ask("--id", "row3", "--method", "ssd", "--out", "out", change=change), "1 of the 1 rows", "--allow-overlap")
    done = ask("--id", "row3", "--method", "ssd", "--out", "out", "--allow-overlap", "--dry-run", change=change)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "out"], ["how its model is trained", "--method"]),
        (["--out", "out", "--method", "sisaa"], ["'sisaa'", "'sisa'"]),
        (["--out", "out", "--method", "npo"], ["'npo'"]),
        (["--method", "sisa"], ["--out RUN"]),
        (["--out", "out", "--method", "sisa", "shards=0"], ["'shards' of sisa must be an int in [1, inf)"]),
        (["--out", "out", "--method", "sisa", "shards=301"], ["301", "300"]),
        (["--out", "out", "--method", "sisa", "shard=3"], ["'shard'", "shards"]),
        (["--out", "out", "--method", "sisa", "--data", "d.csv"], ["'data'", "language models"]),
        (["--out", "out", "--method", "sisa", "--seed", "3"], ["--seed", "seed=VALUE"]),
        (["--out", "out", "--method", "sisa", "engine.seed=3"], ["'engine'"]),
    ],
)
def test_train(expunge: Run, tmp_path: Path, words: list[object], says: list[str]) -> None:
    write_entry(tmp_path)
    refused(expunge("train", "digits.py:problem", *words), *says)
