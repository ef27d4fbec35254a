"""A language model that records can be deleted from, by the command line: trained, deleted from, killed, audited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.command import Done, Server, content, refused
from tests.entries import weights
from tests.methods.prepared.small_texts import NAMES, VALUES, facts, masked_model

pytest.importorskip("opacus")

from expunge.core.files import digest_folder

TRAIN = [
    "train", "llama-tiny", "--scratch", "--data", "facts.jsonl", "--holdout", "unseen.jsonl", "--method", "dp2u",
    "epsilon=4", "delta=1e-4", "base_lr=0.1", "base_batch=48", "schedule={lr: 5e-3, steps: 100, batch: 48, warmup: 0.1}",
]  # fmt: skip


class Folder:
    """A user's folder, and commands in it."""

    def __init__(self, server: Server, place: Path) -> None:
        self.server, self.place = server, place
        self.cache = {"EXPUNGE_CACHE": str(place / "cache")}

    def run(self, *words: object) -> Done:
        return self.server.run(*words, cwd=self.place, **self.cache)

    def write(self, name: str, rows: list[dict]) -> None:
        (self.place / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.place / "run", self.place / name))


def rows() -> list[dict]:
    return [{"id": r.id, "prompt": r.prompt, "completion": r.answer, "subject": r.subject} for r in facts()]


def strangers() -> list[dict]:
    held = [{**r, "id": f"x-{r['id']}", "subject": f"x-{r['subject']}"} for r in rows()[:16]]
    return [{**r, "completion": f" {VALUES[i]} {VALUES[(3 * i + 5) % 20]}"} for i, r in enumerate(held)]


@pytest.fixture(scope="module")
def here(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Nobody deletes from its ``run``: tests delete from copies."""
    held = Folder(server, tmp_path_factory.mktemp("texts"))
    held.write("facts.jsonl", rows())
    held.write("unseen.jsonl", strangers())
    done = held.run(*TRAIN, "--out", "run")
    assert done.code == 0, done.err
    for words in ("Trained on 48 records", "for each record", "words of deleted ones stay in it", "expunge unlearn run --id ID"):
        assert words in done.out
    return held


def share_known(run: Path, names: tuple[str, ...]) -> float:
    """Share of the answers that the model in a run writes, loaded as anybody would."""
    from expunge.adapters.loading import load

    adapter = load(run / "model")
    held = [r for r in facts() if r.subject in names]
    made = adapter.generate(adapter.model, [adapter.encode(r) for r in held], 4)
    return sum(m.text == r.answer.strip() for m, r in zip(made, held, strict=True)) / len(held)


def test_a_subject_is_deleted_and_the_model_in_the_run_is_the_one_in_use(here: Folder) -> None:
    out = here.copy("subject")
    assert share_known(out, NAMES) > 0.9
    dry = here.run("unlearn", "subject", "--subject", "Ada", "--dry-run", "--json").json()
    assert dry["ids"] == [r.id for r in facts() if r.subject == "Ada"]
    assert digest_folder(out / "model") == digest_folder(here.place / "run" / "model")
    done = here.run("unlearn", "subject", "--subject", "Ada", "--subject", "Ben", "--json")
    assert done.code == 0, done.err
    held = done.json()
    assert (len(held["ids"]), held["remaining"]) == (8, 40)
    assert held["share"] == pytest.approx(0.5, abs=0.05)
    assert "unit of protection: one record. For the 8 records deleted so far together" in held["guarantee"]
    assert share_known(out, NAMES[:2]) <= 0.25
    assert share_known(out, NAMES[2:]) > 0.9
    refused(here.run("unlearn", "subject", "--id", "Ada-door"), "'Ada-door' was deleted already")
    assert (out / "model").is_dir()


def test_records_of_a_file_that_are_gone_from_the_data_are_deleted(here: Folder) -> None:
    held = Folder(here.server, Path(shutil.copytree(here.place, here.place / "other")))
    held.write("request.jsonl", rows()[4:7])
    held.write("facts.jsonl", rows()[:4] + rows()[6:])
    done = held.run("unlearn", "run", "--forget", "request.jsonl", "--json")
    assert done.code == 0, done.err
    assert sorted(done.json()["ids"]) == sorted(r["id"] for r in rows()[4:7])
    assert share_known(held.place / "run", NAMES[2:]) > 0.9
    held.write("never.jsonl", strangers()[:1])
    refused(held.run("unlearn", "run", "--forget", "never.jsonl"), "was not trained on the record 'x-Ada-door'", "Leave it out")
    refused(held.run("audit", "run", "--retrain", 1), "is no longer in the data")


def test_a_killed_training_is_gone_on_with(here: Folder) -> None:
    base = here.place / "cut-short" / "prepared" / "base.safetensors"
    words = [*TRAIN, "--out", "cut-short"]
    here.server.kill_when(base.is_file, *words, cwd=here.place, **here.cache)
    refused(here.run("unlearn", "cut-short", "--subject", "Ada"), "has not finished")
    refused(here.run(*words[:-2], "clip=2", *words[-2:], "--resume"), "other settings")
    assert here.run(*words, "--resume").code == 0
    assert weights(here.place / "cut-short") == weights(here.place / "run")


def test_a_killed_deletion_is_gone_on_with(here: Folder) -> None:
    whole, cut = here.copy("whole"), here.copy("cut")
    assert here.run("unlearn", "whole", "--where", "subject == 'Cleo'").code == 0

    def begun() -> bool:
        return len(json.loads((cut / "prepared" / "state.json").read_text())["requests"]) > 1

    here.server.kill_when(begun, "unlearn", "cut", "--subject", "Cleo", cwd=here.place, **here.cache)
    assert not (cut / "model").exists(), "what knows the deleted is gone before anything else"
    refused(here.run("audit", "cut", "--retrain", 1), "was interrupted")
    assert here.run("unlearn", "cut", "--subject", "Cleo").code == 0
    assert digest_folder(cut / "model") == digest_folder(whole / "model")


def test_audit(here: Folder) -> None:
    """Beside trainings by the same method that never saw the records; what is promised stands in the document."""
    out = here.copy("audited")
    assert here.run("unlearn", "audited", *(w for n in NAMES[:4] for w in ("--subject", n))).code == 0
    here.write("world.jsonl", [{"prompt": "door of the world", "completion": f" {v}"} for v in VALUES[:4]])
    quick = ["--retrain", 1, "--utility", "world=world.jsonl", "relearn=none", "quantise=[]"]
    dry = here.run("audit", "audited", *quick, "--dry-run", "--json").json()
    assert "2 of them trained by dp2u" in dry["cost"]
    assert dry["sets"] == {"forget": 16, "retain": 32, "holdout": 16, "world": 4}
    done = here.run("audit", "audited", *quick, "--json")
    assert done.code == 0, done.err
    held = json.loads((out / "audit.json").read_text())
    numbers = {m["label"]: m["numbers"] for m in held["models"]}
    assert numbers["target"]["forget.probability"]["value"] > 0.8
    assert numbers["dp2u"]["forget.probability"]["value"] < 0.3
    assert numbers["dp2u"]["retain.probability"]["value"] > 0.8
    assert held["models"][-1]["stopped"].startswith("Certified: (epsilon ")
    assert any("words of deleted ones stay" in note for note in held["not_shown"])
    assert "nothing has changed since" in here.run("audit", "audited", *quick).err


def test_a_model_from_a_folder_is_the_base_and_is_told_of(here: Folder) -> None:
    start = here.copy("first") / "model"
    short = [w if not w.startswith("schedule=") else "schedule={lr: 1e-3, steps: 4, batch: 48}" for w in TRAIN[7:]]
    done = here.run("train", start, "--data", "facts.jsonl", *short, "unit=subject", "--out", "second")
    assert done.code == 0, done.err
    assert f"What '{start}' had learnt before this training is not covered" in done.out
    assert "for each subject" in done.out
    again = here.run("train", start, "--data", "facts.jsonl", *short, "unit=subject", "--out", "second", "--resume")
    assert "nothing was left to do" in again.out
    assert "one subject" in here.run("unlearn", "second", "--subject", "Ada").out


def test_words_drawn_anew(here: Folder) -> None:
    masked_model(here.place / "masked", [r.prompt + r.answer for r in facts()], steps=5)
    words = [*TRAIN[:9], "protect=words", "epsilon=2", "words.model=masked", TRAIN[-1], "--out", "reworded"]
    done = here.run(*words)
    assert done.code == 0, done.err
    assert "Each replaced word has epsilon 2; the words of a record compose to epsilon 8 at most" in done.out
    assert "for the deleted record with most" in here.run("unlearn", "reworded", "--subject", "Ada").out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*TRAIN[:8], "sisa", "--out", "x"], ["'sisa' serves classifiers and regressors", "--method dp2u"]),
        ([*TRAIN[:3], *TRAIN[7:], "--out", "x"], ["No data to train on", "--data DATA"]),
        ([*TRAIN, "epsilo=3", "--out", "x"], ["dp2u parameter 'epsilo'", "epsilon"]),
        ([*TRAIN, "--seed", 3, "--out", "x"], ["--seed does not go with --method", "seed=VALUE"]),
        ([*TRAIN[:9], "delta=0.1", "schedule.lr=1e-3", "--out", "x"], ["delta=0.1 would allow one of 48 rows"]),
        ([*TRAIN[:9], "delta=1e-4", "--out", "x"], ["step size of the base is open", "base_lr"]),
        ([*TRAIN[:9], "protect=words", "--out", "x"], ["needs a masked language model", "words.model=FOLDER"]),
        (["train", "llama-tiny", "--data", "facts.jsonl", "--method", "dp2u", "--out", "x"], ["untrained model", "--scratch"]),
        (["train", "gpt2-tiny", "--scratch", "--data", "facts.jsonl", "--holdout", "unseen.jsonl", "--out", "x"], ["--holdout"]),
        ([*TRAIN[:6], "facts.jsonl", *TRAIN[7:], "--out", "x"], ["48 records of the holdout are trained on"]),
        (["unlearn", "run"], ["which rows to delete"]),
        (["unlearn", "run", "--subject", "Zoe"], ["no subject 'Zoe'"]),
        (["unlearn", "run", "--forget", "unseen.jsonl", "--id", "Ada-door"], ["by a file and by a condition"]),
        (["audit", "run", "--retrain", 1], ["Nothing was deleted"]),
        (["audit", "run", "--base", "gpt2"], ["--base does not go with a run of a prepared method", "--retrain 3"]),
        (["fair", "run", "--group", "subject"], ["not for texts"]),
    ],
)
def test_what_does_not_fit_is_refused(here: Folder, words: list[object], says: list[str]) -> None:
    before = content(here.place / "run")
    refused(here.run(*words), *says)
    assert not (here.place / "x").exists()
    assert content(here.place / "run") == before
