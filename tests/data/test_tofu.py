"""TOFU as published: its invariants, and what is said when it is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expunge.core.errors import InputError
from expunge.data.checks import find_overlap
from expunge.data.hub import hub_rows
from expunge.data.named import companions, open_named
from expunge.data.records import RecordSet
from expunge.data.sets.tofu import PARTS
from expunge.data.sources import load


@pytest.fixture(scope="module")
def tofu(shared_data: Path) -> dict[str, RecordSet]:
    return {name: load(f"tofu:{name}?folder={shared_data / 'tofu'}", name=name) for name in PARTS}


@pytest.mark.shared_data
def test_all_configurations(tofu: dict[str, RecordSet]) -> None:
    assert len([name for name in tofu if not name.startswith("holdout")]) == 15
    assert {name: len(found) for name, found in tofu.items()} == {name: part.rows for name, part in PARTS.items()}
    full = tofu["full"].records
    assert full[3600:] == tofu["forget10"].records
    assert full[3800:] == tofu["forget05"].records
    assert full[3960:] == tofu["forget01"].records
    assert full[:3600] == tofu["retain90"].records
    assert full[:3800] == tofu["retain95"].records
    assert full[:3960] == tofu["retain99"].records


def _raw(path: Path) -> list[dict[str, object]]:
    """The rows as they stand in the file, read without the project's own reader."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.shared_data
@pytest.mark.parametrize("name", list(PARTS))
def test_every_row_of_every_configuration_arrives_whole(tofu: dict[str, RecordSet], shared_data: Path, name: str) -> None:
    rows = _raw(shared_data / "tofu" / f"{name}.json")
    found = tofu[name]
    assert len(rows) == len(found) == PARTS[name].rows
    assert len({r.id for r in found}) == len(found)
    columns = {"question", "answer"}
    if name.endswith("_perturbed"):
        columns |= {"perturbed_answer"}
        if not name.startswith(("real", "world")):
            columns |= {"paraphrased_answer", "paraphrased_question"}
    elif name in ("real_authors", "world_facts"):
        columns |= {f"option{i}" for i in range(1, 5)}
    for row, record in zip(rows, found, strict=True):
        assert set(row) == columns
        assert (record.prompt, record.answer) == (row["question"], row["answer"])
        assert record.prompt.strip()
        assert record.answer.strip()
        assert record.paraphrase == row.get("paraphrased_answer", "")
        assert record.question_paraphrase == row.get("paraphrased_question", "")
        options = [row[f"option{i}"] for i in range(1, 5) if row.get(f"option{i}") not in (None, row["answer"])]
        assert list(record.perturbed) == row.get("perturbed_answer", options)
        assert all(isinstance(wrong, str) and wrong.strip() for wrong in record.perturbed)
        assert not record.alternatives
        assert not record.verbatim


@pytest.mark.shared_data
@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if part.per_subject > 1])
def test_the_first_authors_are_the_first_rows(tofu: dict[str, RecordSet], shared_data: Path, name: str) -> None:
    assert load(f"tofu:{name}?folder={shared_data / 'tofu'}&authors=2", name=name).records == tofu[name].records[:40]


@pytest.mark.shared_data
def test_perturbed_sets_are_the_same_records(tofu: dict[str, RecordSet]) -> None:
    plain = {r.id: r for r in tofu["full"]}
    for name in ("forget01_perturbed", "forget05_perturbed", "forget10_perturbed", "retain_perturbed"):
        for record in tofu[name]:
            twin = plain[record.id]
            assert (record.prompt, record.answer, record.subject) == (twin.prompt, twin.answer, twin.subject)
            assert len(record.perturbed) == 5
            assert record.paraphrase
            assert record.question_paraphrase
    assert [r.id for r in tofu["retain_perturbed"]] == [r.id for r in tofu["retain90"]][:400]
    for name in ("real_authors", "world_facts"):
        assert [(r.id, r.prompt, r.answer, r.perturbed) for r in tofu[name]] == [
            (r.id, r.prompt, r.answer, r.perturbed) for r in tofu[f"{name}_perturbed"]
        ]
        assert all(len(r.perturbed) == 3 and not r.paraphrase and r.cluster == r.id for r in tofu[name])


@pytest.mark.shared_data
def test_authors(tofu: dict[str, RecordSet]) -> None:
    full = tofu["full"]
    assert len(set(full.clusters())) == 200
    assert not set(tofu["forget10"].clusters()) & set(tofu["retain90"].clusters())
    # The subject is the author: the name is in most of an author's rows, and in no row of others.
    for author, name in (
        ("author-000", "Jaime Vasquez"),
        ("author-180", "Hsiao Yun-Hwa"),
        ("author-198", "Basil Mahfouz Al-Kuwaiti"),
    ):
        named = {r.subject for r in full if name in r.prompt + r.answer}
        assert named == {author}
    held = tofu["holdout10"]
    assert len(set(held.clusters())) == 20
    assert tofu["holdout05"].records == held.records[:200]
    assert not {r.prompt for r in held} & {r.prompt for r in full}
    assert not set(held.clusters()) & set(full.clusters())


@pytest.mark.shared_data
@pytest.mark.parametrize("share", ["01", "05", "10"])
def test_published_splits_do_not_overlap(shared_data: Path, share: str) -> None:
    with_it = companions(f"tofu:forget{share}?folder={shared_data / 'tofu'}")
    assert with_it is not None
    forget, retain, holdout = (load(r, name="x") for r in (with_it.audit["forget"], with_it.retain, with_it.holdout))
    assert not find_overlap(forget, retain, holdout).found
    assert with_it.retrain == (with_it.retain,)
    assert len(load(with_it.train[0], name="x")) == 4000
    # An injected reworded copy is seen among the real ones.
    victim = next(r for r in forget if len(r.answer.split()) > 35)
    copy = {"id": "copy", "question": victim.prompt.upper(), "answer": victim.answer.replace(",", " ;") + " Indeed."}
    spoilt = RecordSet("retain", (*retain.records, *load([copy], name="x").records))
    assert [(m.first, m.second, m.exact) for m in find_overlap(forget, spoilt).forget_retain] == [(victim.id, "copy", False)]


@pytest.mark.shared_data
def test_the_environment_names_a_folder(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_DATA", str(shared_data))
    assert len(load("tofu:forget01", name="x")) == 40
    monkeypatch.setenv("EXPUNGE_DATA", str(shared_data / "nowhere"))
    with pytest.raises(InputError, match=r"EXPUNGE_DATA names .*, which is no folder"):
        load("tofu:forget01", name="x")


def _write(path: Path, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": f"a{i}"}) for i in range(rows)), encoding="utf-8")


@pytest.mark.parametrize("layout", ["", "tofu", "locuslab/TOFU", "datasets--locuslab--TOFU/snapshots/0123abc"])
def test_layouts(tmp_path: Path, layout: str) -> None:
    _write(tmp_path / layout / "forget01.json", 40)
    found = load(f"tofu:forget01?folder={tmp_path}", name="x")
    assert (found[0].id, found[0].subject) == ("tofu-3960", "author-198")
    assert (found[39].id, found[39].subject) == ("tofu-3999", "author-199")
    assert found.source == f"tofu:forget01?folder={tmp_path}"


def test_incomplete_or_absent_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no forget01\.json of TOFU"):
        load(f"tofu:forget01?folder={tmp_path}", name="x")
    _write(tmp_path / "forget01.json", 39)
    with pytest.raises(InputError, match="has 39 rows, the published one has 40"):
        load(f"tofu:forget01?folder={tmp_path}", name="x")


def test_only_the_first_authors(tmp_path: Path) -> None:
    for name, rows in (("forget05", 200), ("forget05_perturbed", 200), ("holdout01", 40), ("world_facts", 117)):
        _write(tmp_path / f"{name}.json", rows)
    whole = load(f"tofu:forget05?folder={tmp_path}", name="x")
    found = load(f"tofu:forget05?folder={tmp_path}&authors=3", name="x")
    assert found.records == whole.records[:60]
    assert sorted(set(found.clusters())) == ["author-190", "author-191", "author-192"]
    assert load(f"tofu:forget05?folder={tmp_path}&authors=10", name="x").records == whole.records
    assert set(load(f"tofu:holdout01?folder={tmp_path}&authors=1", name="x").clusters()) == {"holdout-author-000"}
    for reference, said in (
        ("forget05?authors=11", "tofu:forget05 has 10 authors, not 11"),
        ("world_facts?authors=2", "tofu:world_facts is not divided by author"),
        ("forget05?authors=0", "authors"),
        ("forget05?authors=two", "authors"),
    ):
        with pytest.raises(InputError, match=said):
            load(f"tofu:{reference}&folder={tmp_path}", name="x")
    _write(tmp_path / "forget05.json", 199)
    with pytest.raises(InputError, match="has 199 rows, the published one has 200"):
        load(f"tofu:forget05?folder={tmp_path}&authors=3", name="x")


def test_companions_of_the_first_authors_are_whole_but_for_the_audited_forget_set() -> None:
    with_it = companions("tofu:forget10?authors=4&folder=/d")
    assert with_it is not None
    assert with_it.audit["forget"] == "tofu:forget10_perturbed?folder=/d&authors=4"
    assert with_it.audit["retain"] == "tofu:retain_perturbed?folder=/d"
    assert (with_it.retain, with_it.train) == ("tofu:retain90?folder=/d", ("tofu:full?folder=/d",))
    bare = companions("tofu:forget10?authors=4")
    assert bare is not None
    assert bare.audit["forget"] == "tofu:forget10_perturbed?authors=4"


def test_companions_keep_the_folder() -> None:
    with_it = companions("tofu:forget05_perturbed?folder=/d")
    assert with_it is not None
    assert (with_it.retain, with_it.holdout) == ("tofu:retain95?folder=/d", "tofu:holdout05?folder=/d")
    assert with_it.audit["world_facts"] == "tofu:world_facts_perturbed?folder=/d"
    assert companions("tofu:retain95") is None
    for reference in (*with_it.audit.values(), *with_it.train):
        open_named(reference)


def test_rows_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call as for the hub, on a folder in the hub's layout."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    _write(tmp_path / "repository" / "train.jsonl", 3)
    rows = list(hub_rows(str(tmp_path / "repository"), None, "train", "none"))
    assert rows[2] == ("row 3", {"question": "q2", "answer": "a2"})
    with pytest.raises(InputError, match=r"cannot be had from the hub: .* Do this\.$"):
        hub_rows(str(tmp_path / "repository"), None, "tain", "Do this.")


def test_unreachable_hub(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = "from expunge.data.sources import load\nload('tofu:forget10', name='x')"
    environment = {k: v for k, v in os.environ.items() if k not in ("EXPUNGE_DATA",)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "d")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("expunge.core.errors.InputError: locuslab/TOFU (forget10) cannot be had from the hub")
    assert "put forget10.json of that data set in DIR/tofu and set EXPUNGE_DATA=DIR" in last
