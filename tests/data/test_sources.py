"""Every format, every shape, and every complaint."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from expunge.core.errors import InputError
from expunge.data import readers
from expunge.data.named import DATASETS, companions, open_named, parse
from expunge.data.readers import rows_of
from expunge.data.records import Record
from expunge.data.shapes import content_id
from expunge.data.sources import load

ROWS: list[dict[str, Any]] = [
    {
        "question": "Who keeps the bees?",
        "answer": 'Ada, the "elder".',
        "paraphrased_answer": "It is Ada.",
        "perturbed_answer": ["Bo.", "Cy."],
        "paraphrased_question": "Whose are the bees?",
        "author": "ada",
        "alternatives": ["I do not know."],
    },
    {
        "question": "Wo wohnt Ödön?\n(in full)",
        "answer": "In Győr, naïvely.",
        "paraphrased_answer": None,
        "perturbed_answer": None,
        "paraphrased_question": None,
        "author": "ödön",
        "alternatives": None,
    },
]


def write_jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")


def write_lines_with_mark(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n", encoding="utf-8-sig")


def write_array(path: Path) -> None:
    path.write_text("\n " + json.dumps(ROWS, indent=3, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(ROWS[0]))
        writer.writeheader()
        for row in ROWS:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})


def write_parquet(path: Path) -> None:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


FILES: list[tuple[str, Callable[[Path], None]]] = [
    ("a.jsonl", write_jsonl),
    ("a.JSON", write_lines_with_mark),
    ("b.json", write_array),
    ("a.csv", write_csv),
    ("a.parquet", write_parquet),
]


@pytest.mark.parametrize(("name", "write"), FILES, ids=lambda x: x if isinstance(x, str) else "")
def test_every_format_gives_the_same_records(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    found = load(tmp_path / name, name="forget")
    assert found.name == "forget"
    assert found.source == str(tmp_path / name)
    first, second = found
    assert (first.prompt, first.answer, first.subject) == ("Who keeps the bees?", 'Ada, the "elder".', "ada")
    assert (first.paraphrase, first.question_paraphrase) == ("It is Ada.", "Whose are the bees?")
    assert (first.perturbed, first.alternatives) == (("Bo.", "Cy."), ("I do not know.",))
    assert (second.prompt, second.answer) == (ROWS[1]["question"], ROWS[1]["answer"])
    assert (second.paraphrase, second.perturbed, second.alternatives) == ("", (), ())
    assert found.digest == load(ROWS, name="x").digest


def test_hugging_face_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    assert load(table, name="f").digest == load(ROWS, name="f").digest
    with pytest.raises(InputError, match=r"dictionary of splits: train.*Choose one: dataset\['train'\]"):
        load(datasets.DatasetDict({"train": table}), name="f")


@pytest.mark.parametrize(
    ("row", "prompt", "messages", "answer"),
    [
        ({"prompt": "p", "completion": "c"}, "p", (), "c"),
        ({"prompt": "p", "response": "c"}, "p", (), "c"),
        ({"text": "all of it", "other": 3}, "", (), "all of it"),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "",
            (("system", ""), ("user", "u")),
            "a",
        ),
        ({"question": "q", "answer": "a", "text": "not this"}, "q", (), "a"),
    ],
)
def test_shapes(row: dict[str, Any], prompt: str, messages: tuple[tuple[str, str], ...], answer: str) -> None:
    (record,) = load([row], name="x")
    assert (record.prompt, record.messages, record.answer) == (prompt, messages, answer)
    assert record.is_text == ("text" in row and "question" not in row)


def test_other_column_names() -> None:
    row = {"q": "why", "a": "so", "text": "x", "who": "w", "nr": 7}
    (record,) = load([row], name="x", columns={"prompt": "q", "answer": "a", "author": "who", "id": "nr"})
    assert (record.prompt, record.answer, record.subject, record.id) == ("why", "so", "w", "7")
    (plain,) = load([row], name="x", columns={"text": "text"})
    assert plain.is_text


def test_ids_are_stable_and_unique() -> None:
    a, b, c = load([{"text": "same"}, {"text": "other"}, {"text": "same"}], name="x")
    assert re.fullmatch("[0-9a-f]{12}", a.id)
    assert c.id == f"{a.id}-2"
    assert a.id != b.id
    # The id is of what is learnt: other columns and other rows do not change it.
    assert load([{"text": "same", "author": "me"}], name="y")[0].id == a.id
    given: list[dict[str, Any]] = [{"id": "k1", "text": "same"}, {"id": 2, "text": "same"}]
    assert [r.id for r in load(given, name="x")] == ["k1", "2"]
    # Caches and ledgers of older runs name records by these.
    assert content_id("q", (), "a") == "b24f042ac622"
    assert content_id("", (("user", "ü"),), "a") == "087d0541fbba"


def test_records_pass_through() -> None:
    found = load([Record("1", "a"), Record("2", "b")], name="x")
    assert load(found, name="y").records == found.records
    with pytest.raises(InputError, match=r"id '1' occurs twice"):
        load([Record("1", "a"), Record("1", "b")], name="x")
    with pytest.raises(InputError, match=r"'1' of the x records has an empty answer"):
        load([Record("1", " ")], name="x")


def test_optional_columns_may_begin_in_a_later_row() -> None:
    assert load([{"text": "a"}, {"text": "b", "author": "me"}], name="x")[1].subject == "me"


def test_long_cells_are_read_and_the_limit_restored(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "book.csv").write_text("text\n" + "word " * 60_000, encoding="utf-8")
    assert len(load(tmp_path / "book.csv", name="x")[0].answer) > 250_000
    assert csv.field_size_limit() == before


def test_json_arrays_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_BLOCK", 7)  # every token is cut somewhere
    rows = [{"text": f"ü{i}" * (i % 9 + 1), "n": [i, {"x": -1.5e3}], "s": 'a"]}\\'} for i in range(60)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    found = list(rows_of(path))
    assert [row for _, row in found] == rows
    text = path.read_text(encoding="utf-8").splitlines()
    assert all(text[int(where.removeprefix("line ")) - 1].strip() == "{" for where, _ in found)


def test_reading_is_lazy(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": '{"text": "x"}\n' * 3 + "{broken", "a.json": '[{"text": "x"}, {"text": "y"}, broken]'}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        rows: Iterator[Any] = rows_of(tmp_path / name)
        assert next(rows)[1] == {"text": "x"}


# --- Complaints -------------------------------------------------------------------------------------------------------------

QA = '{"question": "q", "answer": "a"}\n'


def _chat(*turns: object) -> str:
    return json.dumps({"messages": turns})


BAD: list[tuple[str, bytes | str, str]] = [
    ("a.jsonl", "", r"a\.jsonl holds no records\. Give at least one row of question\+answer"),
    ("a.json", " \n ", r"a\.json holds no records"),
    ("a.json", "[ ]", r"a\.json holds no records"),
    ("a.csv", "question,answer\n", r"a\.csv holds no records"),
    ("a.jsonl", QA + "\n" + '{"question": "q", \n', r"a\.jsonl line 3 is no valid JSON: .*Write one JSON object a line"),
    ("a.json", '[\n{"text": "a"}\n{"text": "b"}\n]', r"a\.json line 3 is no valid JSON: expected ',', found '{'"),
    ("a.json", '[\n{"text": "a"},\n', r"a\.json line 3 is no valid JSON: Expecting value"),
    ("a.json", '[\n{"text": "a"}\n', r"a\.json line 3 is no valid JSON: expected ',', found the end of the file"),
    ("a.json", '[{"text": "a"},\n{"text": "b",\n "x": nope}]', r"a\.json line 3 is no valid JSON"),
    ("a.json", '[{"text": "a"},\n 3]', r"a\.json line 2 is a number, not an object"),
    ("a.jsonl", QA + '"text"', r"a\.jsonl line 2 is a string, not an object"),
    ("a.jsonl", QA + "[1]", r"a\.jsonl line 2 is an array, not an object"),
    (
        "a.jsonl",
        '{"question": "q", "anwser": "a"}',
        r"has the columns 'question', 'anwser'; expected question\+answer.*'anwser' looks like 'answer'",
    ),
    ("a.csv", "Frage,Antwort\nq,a\n", r"has the columns 'Frage', 'Antwort'; expected .*say which is which: --column prompt=NAME"),
    ("a.jsonl", QA + '{"question": "q", "answer": null}', r"a\.jsonl line 2: 'answer' is empty"),
    ("a.jsonl", QA + '{"question": "q", "answer": " "}', r"a\.jsonl line 2: 'answer' is empty"),
    ("a.jsonl", QA + '{"question": "", "answer": "a"}', r"line 2: 'question' is empty.*plain text as the column 'text'"),
    ("a.csv", "question,answer\nq,a\nq,\n", r"a\.csv line 3: 'answer' is empty"),
    ("a.jsonl", QA + '{"question": "q"}', r"line 2 has no 'answer'; it has 'question'"),
    ("a.jsonl", QA + '{"question": "q", "answer": 7}', r"line 2: 'answer' must be text; got a number"),
    ("a.jsonl", QA + '{"question": ["q"], "answer": "a"}', r"line 2: 'question' must be text; got a list"),
    ("a.jsonl", '{"text": "a", "perturbed_answer": [1]}', r"line 1: 'perturbed_answer' must be text; got a number"),
    (
        "a.jsonl",
        '{"text": "a", "perturbed_answer": {}}',
        r"line 1: 'perturbed_answer' must be text or a list of texts; got an object",
    ),
    ("a.jsonl", '{"text": "a", "alternate": ["b", ""]}', r"line 1: 'alternate' holds an empty text"),
    ("a.jsonl", '{"text": "a", "id": null}', r"line 1: 'id' is empty"),
    ("a.jsonl", '{"text": "\\ud800"}', r"line 1: 'text' holds half of a surrogate pair"),
    ("a.jsonl", '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', r"id '1' occurs twice in a\.jsonl: line 1 and line 2"),
    ("a.jsonl", QA.encode() + '{"question": "q", "answer": "é"}'.encode("latin-1"), r"a\.jsonl is not UTF-8 text \(line 2\)"),
    ("a.json", '[{"text": "a"},\n{"text": "é"}]'.encode("latin-1"), r"a\.json is not UTF-8 text \(line 2\)"),
    ("a.csv", "text\na\né\n".encode("cp1252"), r"a\.csv is not UTF-8 text \(line 3\)"),
    (
        "a.jsonl",
        _chat({"role": "user", "content": "u"}),
        r"line 1: 'messages' ends with a turn of 'user'\. The last turn must be",
    ),
    ("a.jsonl", _chat({"role": "assistant", "content": "u"}), r"'messages' has only the assistant's turn"),
    (
        "a.jsonl",
        _chat({"role": "user", "content": "u"}, {"role": "assistant", "content": " "}),
        r"'messages' ends with an empty turn",
    ),
    (
        "a.jsonl",
        _chat({"role": "user"}, {"role": "assistant", "content": "a"}),
        r"'messages' has no role and content as text in turn 1",
    ),
    ("a.jsonl", '{"messages": []}', r"'messages' must be a list of turns; got an empty list"),
    ("a.csv", "question,answer\nq,a\nq,a,b\n", r"a\.csv line 3 has 3 cells, the header has 2\. Put cells that hold a comma"),
    ("a.csv", 'question,answer\n"q\n1",a\nq\n', r"a\.csv line 4 has 1 cells, the header has 2"),
    ("a.csv", 'question,answer\nq,"a', r"a\.csv line 2 is no valid CSV: unexpected end of data"),
    ("a.csv", "question;answer\nq;a\n", r"separated by semicolons, not by commas"),
    ("a.csv", "text,text\nq,a\n", r"two columns called 'text'"),
    ("a.csv", 'text,perturbed_answer\nq,"[oops"\n', r"line 2: 'perturbed_answer' begins with '\[' but is no JSON array"),
    ("a.parquet", "no parquet", r"a\.parquet is no valid Parquet file"),
    ("a.txt", "text", r"a\.txt has the suffix '\.txt', which is not read\. Give one of: \.jsonl, \.json, \.csv, \.parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_files(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load(str(tmp_path / name), name="forget")
    assert caught.value.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    for name in ("forget.jsonl", "retain.jsonl", "notes.md"):
        (tmp_path / name).write_text(QA, encoding="utf-8")
    with pytest.raises(InputError, match=r"There is no file .*forgot\.jsonl\. In that folder there is: forget\.jsonl"):
        load(tmp_path / "forgot.jsonl", name="x")
    with pytest.raises(InputError, match=r"There is no folder .*nowhere either"):
        load(tmp_path / "nowhere" / "a.jsonl", name="x")
    with pytest.raises(InputError, match=r"is a folder\. Name a file in it: forget\.jsonl, retain\.jsonl\."):
        load(tmp_path, name="x")


def test_bad_columns_and_python_sources() -> None:
    rows = [{"q": "q", "answer": "a"}]
    with pytest.raises(InputError, match=r"no column 'Q'; it has 'q', 'answer'\. 'Q' looks like 'q'"):
        load(rows, name="x", columns={"prompt": "Q"})
    with pytest.raises(InputError, match=r"There is no column role 'promt'\. Did you mean 'prompt'"):
        load(rows, name="x", columns={"promt": "q"})
    with pytest.raises(InputError, match="belong to different shapes"):
        load(rows, name="x", columns={"prompt": "q", "text": "answer"})
    with pytest.raises(InputError, match=r"the x list item 2 is of type str"):
        load([{"text": "a"}, cast(Any, "b")], name="x")
    with pytest.raises(InputError, match=r"of type int\. Give a file, a named data set"):
        load(3, name="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no records"):
        load([], name="x")


def test_named_sets() -> None:
    with pytest.raises(InputError, match=r"no data set 'tofuu'\. Did you mean 'tofu'"):
        load("tofuu:forget10", name="x")
    with pytest.raises(InputError, match=r"no tofu configuration 'forget11'\. Did you mean 'forget1?"):
        load("tofu:forget11", name="x")
    with pytest.raises(InputError, match=r"does not say which part of the data set people\. Give one of: people:forget"):
        load("people", name="x")
    with pytest.raises(InputError, match=r"no people parameter 'person'\. Did you mean 'persons'"):
        load("people:forget?person=3", name="x")
    with pytest.raises(InputError, match=r"'seed' of people must be an int in \[0, inf\); got '-1'"):
        load("people:forget?seed=-1", name="x")
    with pytest.raises(InputError, match="is no option"):
        load("people:forget?seed", name="x")
    with pytest.raises(InputError, match="knows its own columns"):
        load("people:forget", name="x", columns={"text": "a"})
    assert parse("people:forget?seed=2&facts=3").options == {"seed": "2", "facts": "3"}
    assert {"tofu", "people"} <= set(DATASETS.names())
    assert not DATASETS.broken()


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("people").mkdir()
    with pytest.raises(InputError, match="does not say which part"):
        load("people", name="x")
    assert companions("people.jsonl") is None


def test_people_by_name_are_one_world() -> None:
    reference = "people:forget?persons=20&forget=2&holdout=3&facts=4&seed=5"
    with_it = companions(reference)
    assert with_it is not None
    sets = {
        part: load(ref, name=part)
        for part, ref in {"retain": with_it.retain, "holdout": with_it.holdout, **with_it.audit}.items()
    }
    assert [len(sets[p]) for p in ("forget", "retain", "holdout", "real_authors", "world_facts")] == [8, 72, 12, 40, 40]
    trained = [r.id for ref in with_it.train for r in load(ref, name="x")]
    kept = [r.id for ref in with_it.retrain for r in load(ref, name="x")]
    assert set(trained) - set(kept) == {r.id for r in sets["forget"]}
    assert not set(trained) & {r.id for r in sets["holdout"]}
    full = load("people:full?persons=20&facts=4&seed=5", name="x")
    assert full.records == sets["forget"].records + sets["retain"].records
    assert companions("people:retain") is None
    dataset, part = open_named(reference)
    assert part in dataset.configurations()
