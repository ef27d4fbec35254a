"""Marked spans: read from files, refused where they are wrong, and found by terms, patterns and a scanner of secrets."""

from __future__ import annotations

import json

import pytest

from expunge.core.errors import InputError
from expunge.data.records import Record, RecordSet
from expunge.data.sources import load
from expunge.data.spans import Spans, joined, moved, swapped

CODE = 'host = "8.8.8.8"\nlocal = "192.168.0.7"\nmail = "ada@lovelace.org"\nother = "a@example.com"\n'


def parts(text: str, spans) -> list[str]:
    return [text[a:b] for a, b in spans]


def found(text: str, **settings) -> list[str]:
    (record,) = Spans(**settings).mark(RecordSet("forget", (Record("r", text),)))
    return parts(text, record.spans)


# ---- read


@pytest.mark.parametrize("spans", [[[4, 8], [0, 3]], [{"start": 0, "end": 3}, {"start": 4, "end": 8}], "[[0, 3], [4, 8]]"])
def test_spans_are_read_from_every_format(tmp_path, spans):
    row = {"question": "q", "answer": "key abcd."}
    if isinstance(spans, str):
        path = tmp_path / "d.csv"
        path.write_text(f'question,answer,spans\nq,key abcd.,"{spans}"\n')
    else:
        path = tmp_path / "d.jsonl"
        path.write_text(json.dumps({**row, "spans": spans}) + "\n" + json.dumps(row) + "\n")
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist([{**row, "spans": spans}, {**row, "spans": None}]), tmp_path / "d.parquet")
        marked, bare = load(tmp_path / "d.parquet", name="forget")
        assert parts(marked.answer, marked.spans) == ["key", "abcd"]
        assert bare.spans == ()
    first = load(path, name="forget")[0]
    assert parts(first.answer, first.spans) == ["key", "abcd"]


def test_a_column_of_another_name_and_plain_text():
    (record,) = load([{"text": "pin 1234", "secret": [[4, 8]]}], name="forget", columns={"spans": "secret"})
    assert parts(record.answer, record.spans) == ["1234"]


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([[4, 99]], "has the span [4, 99], but the answer has 8 characters"),
        ([[-1, 2]], "has the span [-1, 2]"),
        ([[3, 3]], "has the span [3, 3]"),
        ([[5, 2]], "has the span [5, 2]"),
        ([[1]], "holds [1], which is no pair"),
        ([[1, 2.5]], "no pair of whole numbers"),
        ([[True, 2]], "no pair of whole numbers"),
        ([{"start": 1}], "no pair of whole numbers"),
        (7, "must be a list of spans; got a number"),
    ],
)
def test_bad_spans_are_refused_with_their_place(tmp_path, spans, says):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "key abcd", "spans": spans}))
    with pytest.raises(InputError) as error:
        load(path, name="forget")
    assert says in error.value.message
    assert "d.jsonl line 1: 'spans'" in error.value.message


def test_spans_are_part_of_what_a_set_holds_and_absence_changes_no_digest():
    plain, marked = Record("r", "key abcd"), Record("r", "key abcd", spans=((4, 8),))
    assert "spans" not in plain.content()
    assert RecordSet("x", (plain,)).digest != RecordSet("x", (marked,)).digest


# ---- found


def test_nothing_is_sought_unless_asked():
    records = RecordSet("forget", (Record("r", CODE),))
    assert Spans().mark(records) is records


def test_terms_are_whole_words_and_the_longest_wins(tmp_path):
    text = "Ada Lovelace, Adam and ADA; (Ada)"
    assert found(text, terms=("Ada", "Ada Lovelace")) == ["Ada Lovelace", "Ada"]
    assert found(text, terms=("ada",), ignore_case=True) == ["Ada", "ADA", "Ada"]
    path = tmp_path / "terms.txt"
    path.write_text("Adam\n\n  Ada Lovelace \n")
    assert found(text, file=str(path)) == ["Ada Lovelace", "Adam"]
    assert found("p*ss.", terms=("p*ss",)) == ["p*ss"]


def test_patterns_by_name_and_by_expression():
    assert found(CODE, patterns=("email",)) == ["ada@lovelace.org"]
    assert found(CODE, patterns=("ip",)) == ["8.8.8.8"]
    assert found(CODE, patterns=(r'local = "([^"]*)"', "email")) == ["192.168.0.7", "ada@lovelace.org"]
    assert found("aaa", patterns=("x*",)) == []


def test_what_is_found_is_added_to_what_was_given():
    (record,) = Spans(terms=("key",)).mark(RecordSet("forget", (Record("r", "key abcd", spans=((2, 6),)),)))
    assert record.spans == ((0, 6),)


def test_bad_patterns_files_and_a_missing_library_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no regular expression"):
        found("a", patterns=("(",))
    with pytest.raises(InputError, match="cannot be read"):
        found("a", file=str(tmp_path / "none"))
    monkeypatch.setitem(__import__("sys").modules, "detect_secrets.core.scan", None)
    with pytest.raises(InputError) as error:
        found("a", secrets=True)
    assert "expunge[secrets]" in str(error.value)


def test_secrets_are_found_by_the_library():
    pytest.importorskip("detect_secrets")
    key = "AKIA" + "QWERTYUIOPASDFGH"
    text = f"name = 'ada'\naws_key = '{key}'  # {key}\nnumber = 12\n"
    assert found(text, secrets=True) == [key, key]


# ---- helpers


def test_joined_and_moved():
    assert joined([(4, 8), (0, 3), (3, 4), (20, 22), (5, 6)]) == ((0, 8), (20, 22))
    assert moved([(1, 2)], "ab", "  ab.") == [(3, 4)]
    assert moved([(3, 4)], "  ab ", "ab.") == [(1, 2)]


def test_swapped_spans_hold_what_others_hold_and_the_rest_stays():
    records = [Record(f"r{i}", f"the key is k{i}{'x' * i} here", subject=f"s{i}", spans=((11, 13 + i),)) for i in range(5)]
    made = swapped([*records, Record("bare", "nothing")], seed=0)
    own = {r.id + "#swapped": r for r in records}
    assert {m.id for m in made} == set(own)
    for record in made:
        (secret,) = parts(record.answer, record.spans)
        assert secret not in own[record.id].answer
        assert secret in {parts(r.answer, r.spans)[0] for r in records}
        assert record.answer == f"the key is {secret} here"
    assert swapped(records[:1], 0) == []
