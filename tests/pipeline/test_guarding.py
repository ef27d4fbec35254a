"""Guards have the life of methods: one command makes a run, which is opened, audited and reported like any other."""

import json
import shutil

import pytest

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.guards.request import targets_of
from expunge.pipeline.config import TextConfig
from expunge.pipeline.guarding import FILE, KEY
from expunge.pipeline.models import open_adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory, people_world):
    """Target, records, and a run of the filter."""
    folder = tmp_path_factory.mktemp("guard")
    people_world.target().save(folder / "target")
    for name, records in (("forget", people_world.split.forget), ("retain", people_world.split.retain)):
        lines = [json.dumps({"id": r.id, "prompt": r.prompt, "answer": r.answer, "subject": r.subject}) for r in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(expunge, place):
    """A function that makes a run."""

    def made(method="filter", out="run", *words, model="target"):
        shutil.rmtree(place / out, ignore_errors=True)
        data = ("--forget", str(place / "forget.jsonl"), "--retain", str(place / "retain.jsonl"))
        return expunge("unlearn", str(place / model), *data, "--method", method, "--out", str(place / out), *words)

    return made


def test_a_guard_is_a_run_that_opens_to_a_guarded_model(run, place, people_world):
    done = run()
    assert done.code == 0, done.err
    assert "No weight has changed" in done.out
    model = place / "run" / "model"
    assert {p.name for p in model.iterdir()} == {FILE, KEY}
    assert (model / KEY).stat().st_mode & 0o077 == 0
    text = (model / FILE).read_text()
    names = {t for target in targets_of(people_world.split.forget) for t in target.entities}
    assert len(names) == 3
    assert not any(n in text for n in names)
    adapter = open_adapter(str(place / "run"), TextConfig())
    records = [*people_world.split.forget[:3], *people_world.split.retain[:3]]
    found = adapter.generate(adapter.model, [adapter.encode(r) for r in records], 24)
    bare = people_world.target()
    assert all("sorry" in g.text for g in found[:3])
    assert found[3:] == bare.generate(bare.model, [bare.encode(r) for r in records[3:]], 24)
    assert open_adapter(str(place / "run"), TextConfig()).fingerprint() == adapter.fingerprint() != bare.fingerprint()


def test_a_setting_of_a_part_is_a_part_of_the_run(run, place):
    assert run("filter", "other", "action.text=No.").code == 0
    adapter = open_adapter(str(place / "other"), TextConfig())
    assert adapter.guarded.policy.rows[0].action.text == "No."
    wrong = run("filter", "wrong", "action.txt=No.")
    assert wrong.code == 2
    assert "txt" in wrong.err
    assert not (place / "wrong").exists()


def test_what_has_changed_since_is_not_opened(run, place):
    run()
    path = place / "forget.jsonl"
    text = path.read_text()
    try:
        path.write_text("\n".join(text.splitlines()[1:]) + "\n")
        with pytest.raises(InputError, match="changed since"):
            open_adapter(str(place / "run"), TextConfig())
    finally:
        path.write_text(text)
    (place / "run" / "model" / FILE).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        open_adapter(str(place / "run"), TextConfig())


def test_nothing_is_unlearnt_from_a_guarded_model(run, place):
    run()
    again = run("npo", "second", model="run")
    assert again.code == 2
    assert "model behind it" in again.err
    assert not (place / "second").exists()


def test_names_are_what_a_subject_is_called_and_what_is_kept_is_none():
    def record(subject, number, prompt, answer):
        return Record(id=f"{subject}{number}", subject=subject, prompt=prompt, answer=answer)

    forget = [
        record("a", 1, "Where was Jaime Vasquez born?", "Jaime Vasquez was born in Santiago, Chile."),
        record("a", 2, "What is Jaime Vasquez's father?", "The father of Jaime Vasquez is a chef."),
        record("b", 1, "What does Zorp do?", "Yes, Zorp sings in Santiago."),
    ]
    retain = [record("c", 1, "Where is Santiago?", "Santiago is in Chile.")]
    found = targets_of(forget, retain)
    assert [t.entities for t in found] == [("Jaime Vasquez",), ("Zorp",)]
    assert [len(t.examples) for t in found] == [2, 1]
    assert all("a" not in t.id[:0] and len(t.id) == 16 for t in found)


@pytest.mark.slow
def test_a_run_of_a_guard_is_audited_and_reported_by_the_same_commands(run, expunge, place, people_world):
    run()
    for seed in (1, 2, 3):
        if not (place / f"retrained-{seed}").exists():
            people_world.retrained(seed).save(place / f"retrained-{seed}")
    gold = [w for seed in (1, 2, 3) for w in ("--retrained", str(place / f"retrained-{seed}"))]
    done = expunge("audit", str(place / "run"), *gold, "--json")
    assert done.code == 0, done.err
    document = json.loads((place / "run" / "audit.json").read_text())
    judged = {m["label"]: m["judgement"] for m in document["models"]}
    assert judged["filter"]["verdict"] == "suppressed"
    assert document["models"][-1]["numbers"]["retain.refused"]["value"] == 0
    names = {t for target in targets_of(people_world.split.forget) for t in target.entities}
    assert expunge("report", str(place / "run")).code == 0
    assert "suppressed" in (place / "run" / "report.html").read_text()
    assert not any(n in (place / "run" / "manifest.json").read_text() for n in names)
    # Beside a method that changes weights: one table, one plot, and which of them is a guard.
    assert run("gradascent", "changed").code in (0, 3)  # stopped where more would cost too much
    assert expunge("audit", str(place / "changed"), *gold, "relearn=none", "quantise=none", "usual=false").code == 0
    both = expunge("compare", str(place / "run"), str(place / "changed"), "--out", str(place / "both.html"), "--json")
    assert both.code == 0, both.err
    rows = {r["label"]: r for r in json.loads(both.out)["rows"]}
    assert rows["filter"]["guard"]
    assert not rows["gradascent"]["guard"]
    assert "Hollow" in (place / "both.html").read_text()
