"""The audit of a run from the command line: its price, its verdicts, its reuse, its document, its reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from expunge.core.files import digest_file
from tests.command import ROOT, Done, Run, Server, Town, cold, content, refused, rows, write_rows

QUICK = ["relearn=none", "quantise=[]", "metrics=[loss,probability]", "draws=200"]
BRIEF = ["schedule=fixed", "schedule.lr=0.002", "schedule.epochs=null", "schedule.steps=10", "schedule.warmup=0"]


class Audited:
    """A run with its audit against two retrained models; its cache is shared by the tests of this file."""

    def __init__(self, server: Server, town: Town, folder: Path) -> None:
        self.server, self.town, self.folder, self.cache = server, town, folder, folder / "cache"
        self.forget = write_rows(folder / "forget.jsonl", rows("forget"))
        made = self(
            "unlearn", town.target, "--forget", self.forget, "--retain", town.retain, "--holdout", town.holdout, "--out", "run"
        )
        assert made.code in (0, 3), made.err
        self.run = folder / "run"
        self.dry = self("audit", "run", "--retrain", 2, "--dry-run", "--json")
        self.untouched = not self.cache.joinpath("models").exists() and not (self.run / "audit.json").exists()
        self.first = self("audit", "run", "--retrain", 2)

    def __call__(self, *words: object) -> Done:
        return self.server.run(*words, cwd=self.folder, EXPUNGE_CACHE=str(self.cache))


@pytest.fixture(scope="module")
def audited(server: Server, town: Town, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    return Audited(server, town, tmp_path_factory.mktemp("audited"))


def test_price_is_told_before(audited: Audited) -> None:
    cost = audited.dry.json()["cost"]
    assert audited.untouched, "the dry run trained or scored something"
    assert (cost["models"], cost["retrain"], cost["retrain_steps"]) == (4, 2, 150)
    assert cost["texts"] > 16 + 64 + 12
    assert cost["tokens"] > 5 * cost["texts"]
    assert cost["answers"] == 16 + 64
    assert cost["relearn_steps"] > 0
    assert cost["roundings"] == 2
    assert cost["memory"] > 100_000
    for word in ("4 models, 2 of them to be trained first (150 steps each)", "texts scored", "tokens", "answers", "relearning"):
        assert word in audited.first.err
    assert audited.first.err.index("texts scored") < audited.first.err.index("retraining without the forget set")
    again = audited("audit", "run", "--retrain", 2, "--dry-run", "--json").json()["cost"]
    assert again["retrain"] == 0  # the cache holds them now


def test_verdicts(audited: Audited) -> None:
    assert audited.first.code == 0, audited.first.err
    found = {m["label"]: m for m in json.loads((audited.run / "audit.json").read_text())["models"]}
    verdicts = {label: m["judgement"]["verdict"] for label, m in found.items()}
    assert verdicts["target"] == "not forgotten"
    assert verdicts["retrained seed 1"] == "forgotten"
    assert verdicts["retrained seed 2"] == "forgotten"
    assert set(found) == {"target", "retrained seed 1", "retrained seed 2", "npo"}
    assert all(label in audited.first.out for label in verdicts)
    recorded = json.loads((audited.run / "manifest.json").read_text())["stages"]["audit"]["result"]["verdicts"]
    assert recorded == verdicts


def test_document_follows_the_schema(audited: Audited) -> None:
    schema = json.loads((ROOT / "docs" / "schema" / "audit.schema.json").read_text())
    jsonschema.validate(json.loads((audited.run / "audit.json").read_text()), schema)


def test_second_audit_is_skipped_and_says_so(audited: Audited) -> None:
    before = content(audited.run)
    again = audited("audit", "run", "--retrain", 2)
    assert again.code == 0
    assert "from an earlier run" in again.err
    assert "seed 1: from the cache" in again.err
    assert again.out == audited.first.out
    assert content(audited.run) == before
    assert len(audited("audit", "run", "--retrain", 2, "--json").json()["documents"]) == 1


def test_required_verdict_is_an_exit_code(audited: Audited) -> None:
    document = json.loads((audited.run / "audit.json").read_text())
    verdict = next(m["judgement"]["verdict"] for m in document["models"] if m["role"] == "unlearned")
    other = "suppressed" if verdict != "suppressed" else "damaged"
    assert audited("audit", "run", "--retrain", 2, "--require", verdict).code == 0
    assert audited("audit", "run", "--retrain", 2, "--require", other).code == 3


def test_report_and_comparison(audited: Audited) -> None:
    told = audited("report", "run", "--json").json()
    page = (audited.run / "report.html").read_text(encoding="utf-8")
    assert Path(told["report"]) == Path("run/report.html")
    assert "<svg" in page
    assert "not forgotten" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    rows_ = audited("compare", "run", "--json").json()["rows"]
    assert [r["label"] for r in rows_] == ["npo"]
    assert rows_[0]["distance"]["value"] is not None
    two = audited("compare", "run", "run", "--out", "two.html")
    assert two.code == 0, two.err
    assert "npo" in two.out
    before = digest_file(audited.folder / "two.html")
    refused(audited("compare", "run", "--out", "two.html"), "exists", "--force")
    refused(audited("report", "run", "--out", "two.html"), "exists", "--force")
    refused(audited("report", "run", "run"), "--out FILE.html")
    assert digest_file(audited.folder / "two.html") == before
    assert audited("report", "run", "run", "--out", "two.html", "--force", "--title", "Both").code == 0
    assert "Both" in (audited.folder / "two.html").read_text(encoding="utf-8")


def test_given_retrained_models_and_utility_sets(audited: Audited, town: Town) -> None:
    """A retrained model of one's own (a plain folder), further sets, settings; wrong ones are refused before any work."""
    run = audited.folder / "second"
    shutil.copytree(audited.run, run)
    (run / "audit.json").unlink()
    twin = next((audited.cache / "models").glob("*/model"))
    shutil.copytree(twin, audited.folder / "twin")
    write_rows(audited.folder / "facts.jsonl", rows("world"))
    utility = ["--utility", "facts=facts.jsonl"]
    before = content(run)
    refused(audited("audit", "second", "--retrained", "./twn", *utility), "'./twn'", "twin")
    refused(audited("audit", "second", "--retrained", "twin", "--utility", "facts=fact.jsonl"), "fact.jsonl", "facts.jsonl")
    refused(audited("audit", "second", "--retrained", "twin", *utility, "relearn.stps=3"), "'stps'", "'steps'")
    refused(audited("audit", "second", "--retrain", "51"), "[0, 50]")
    assert content(run) == before
    done = audited("audit", "second", "--retrained", "twin", *utility, *QUICK, "--json")
    assert done.code == 0, done.err
    models = {m["label"]: m for m in done.json()["documents"][0]["models"]}
    assert set(models) == {"target", "retrained 1", "npo"}
    document = json.loads((run / "audit.json").read_text())
    assert "facts" in document["data"]
    refused(audited("compare", "run", "second"), "facts")
    assert document["protocol"]["relearn"] is None
    none = audited("audit", "second", *QUICK, "--json").json()["documents"][0]["models"]
    assert {m["verdict"] for m in none if m["role"] == "unlearned"} == {"no gold standard"}


def test_changed_weights_are_audited_again(audited: Audited, expunge: Run, town: Town, tmp_path: Path) -> None:
    """The audit is skipped by content, not by name."""
    words = ["unlearn", *town.request("run"), *BRIEF]
    assert expunge(*words).code == 0
    assert expunge("audit", "run", *QUICK).code == 0
    old = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert "from an earlier run" in expunge("audit", "run", *QUICK).err
    assert "from an earlier run" not in expunge("audit", "run", *QUICK, "seed=1").err
    (tmp_path / "run" / "audit.json").unlink()
    assert "from an earlier run" not in expunge("audit", "run", *QUICK, "seed=1").err
    shutil.copy(audited.run / "model" / "model.safetensors", tmp_path / "run" / "model" / "model.safetensors")
    done = expunge("audit", "run", *QUICK, "seed=1")  # other weights than the manifest's
    assert done.code == 0, done.err
    assert "from an earlier run" not in done.err
    new = json.loads((tmp_path / "run" / "audit.json").read_text())
    prints = [next(m["fingerprint"] for m in d["models"] if m["role"] == "unlearned") for d in (old, new)]
    assert prints[0] != prints[1]


def test_changed_data_are_refused(audited: Audited) -> None:
    held = audited.forget.read_text()
    changed = rows("forget")
    changed[0]["answer"] = "Nobody knows."
    before = content(audited.run)
    try:
        write_rows(audited.forget, changed)
        refused(audited("audit", "run", "--retrain", 2), "forget data have changed", "unlearn again")
        audited.forget.unlink()
        refused(audited("audit", "run", "--retrain", 2), "forget.jsonl")
    finally:
        audited.forget.write_text(held)
    assert content(audited.run) == before


def test_model_that_nobody_knows_how_to_retrain(audited: Audited, expunge: Run, town: Town, tmp_path: Path) -> None:
    plain = shutil.copytree(town.target / "model", tmp_path / "plain")
    words = ["unlearn", plain, "--forget", town.forget, "--retain", town.retain, "--out", "run", *BRIEF]
    assert expunge(*words).code == 0
    before = content(tmp_path / "run")
    refused(expunge("audit", "run", "--retrain", 1), "was trained", "--base MODEL", "--retrained MODEL")
    assert content(tmp_path / "run") == before


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """The whole demo: what it must show, and that a second run does nothing again."""
    done = cold("demo", "--out", "demo", "--json", cwd=tmp_path, timeout=580)
    assert done.code == 0, done.err
    found = done.json()
    assert found["seconds"] < 560
    models = found["documents"][0]["models"]
    by_role = {role: [m["verdict"] for m in models if m["role"] == role] for role in ("target", "retrained", "unlearned")}
    assert by_role["target"] == ["not forgotten"]
    assert by_role["retrained"] == ["forgotten"] * 3
    assert len(set(by_role["unlearned"])) >= 2, by_role
    assert len(by_role["unlearned"]) >= 4
    assert (tmp_path / "demo" / "report.html").stat().st_size > 50_000
    before = digest_file(tmp_path / "demo" / "audit.json")
    again = cold("demo", "--out", "demo", cwd=tmp_path, timeout=120)
    assert again.code == 0, again.err
    for said in ("target: from an earlier run", "npo: from an earlier run", "audit: from an earlier run"):
        assert said in again.err
    assert digest_file(tmp_path / "demo" / "audit.json") == before
