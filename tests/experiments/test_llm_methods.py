"""The experiment on all methods for language models: distance, claims and page on made numbers, and all stages in miniature."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from experiments.lines import Line, spread
from experiments.llm_claims import broken, claims, over_steps, told, told_by_rank, when
from experiments.llm_curves import Course
from experiments.llm_measures import GOLD, TARGET, TELLING, area, detectable, distance, lines_of, measured, relearned, shares
from experiments.llm_methods import (
    FIRST,
    LEFT_OUT,
    Plan,
    audit_sets,
    chosen,
    experiment,
    language_methods,
    left_out,
    measured_on,
    parse,
    sweep_config,
)
from experiments.llm_page import gather, write_page, write_settings
from experiments.stages import Stages

from expunge.adapters.language import LanguageAdapter
from expunge.audit.attacks.relearn import RelearnSettings
from expunge.audit.document import AuditDocument, Curve, ModelEntry, Role, Series
from expunge.audit.settings import AuditSettings
from expunge.core.errors import InputError
from expunge.core.results import Direction, Number
from expunge.core.runs import Run
from expunge.data.sources import load
from expunge.methods.catalogue import known, serves
from expunge.methods.prepared.registry import PREPARED
from expunge.methods.recipe import build
from expunge.methods.tuned import Shipped
from expunge.pipeline.sweep_result import read
from expunge.pipeline.tuned import USED, key_of, read_used
from expunge.report.text import DASH, MINUS

SEEN = {"forget.probability": 0.9, "forget-quality.d": 0.5, "privleak.min-k": -100.0, "relearn.area": 0.8, "model-utility": 0.9}
UNSEEN = {"forget.probability": 0.0, "forget-quality.d": 0.1, "privleak.min-k": 0.0, "relearn.area": 0.0, "model-utility": 0.9}


# ---- distance


def test_the_distance_is_nothing_at_the_gold_standard_and_whole_at_the_target() -> None:
    assert distance(UNSEEN, [UNSEEN, UNSEEN], SEEN) == 0
    assert distance(SEEN, [UNSEEN], SEEN) == pytest.approx(math.sqrt(4 / 5)), "utility is no difference between the two"
    half = {k: (SEEN[k] + UNSEEN[k]) / 2 for k in SEEN}
    assert distance(half, [UNSEEN], SEEN) == pytest.approx(math.sqrt(4 * 0.25 / 5))
    assert distance({**UNSEEN, "model-utility": 0.45}, [UNSEEN], SEEN) == pytest.approx(math.sqrt(0.25 / 5))


def test_too_far_on_the_other_side_and_what_is_missing_count_as_whole() -> None:
    over = {**UNSEEN, "privleak.min-k": 250.0}
    assert distance(over, [UNSEEN], SEEN) == pytest.approx(math.sqrt(1 / 5))
    assert distance({**UNSEEN, "privleak.min-k": 50.0}, [UNSEEN], SEEN) == pytest.approx(math.sqrt(0.25 / 5)), "either side"
    missing = {k: v for k, v in UNSEEN.items() if k != "relearn.area"}
    assert distance(missing, [UNSEEN], SEEN) == pytest.approx(math.sqrt(1 / 5))
    assert distance({**UNSEEN, "relearn.area": math.nan}, [UNSEEN], SEEN) == pytest.approx(math.sqrt(1 / 5))
    assert len(TELLING) == 4


def line_of(label: str, *rates: Sequence[float]) -> Series:
    steps = [0.0, 5.0, 20.0]
    return Series(label=label, x=steps * len(rates), y=[v for rate in rates for v in rate])


def test_the_relearning_area_counts_from_retrained_models_under_the_same_attack() -> None:
    gold = [line_of("r1", (8, 7, 6), (8, 6, 4)), line_of("r2", (8, 7, 6), (8, 6, 4))]
    target = line_of("target", (0, 0, 0), (0, 0, 0))
    assert shares(gold[0], gold, target) == [[(0, 0), (5, 0), (20, 0)]] * 2
    hidden = line_of("hidden", (8, 3, 2), (8, 2, 0))
    found = shares(hidden, gold, target)
    assert found == [[(0, 0), (5, 0.5), (20, 0.5)], [(0, 0), (5, 0.5), (20, 0.5)]]
    by_hand = (5 * 0.25 + 15 * 0.5) / 20
    assert area(found) == pytest.approx(by_hand)
    slow = line_of("slow", (9, 8, 7), (9, 7, 5))
    assert area(shares(slow, gold, target)) == pytest.approx(-1 / 8), "slower than retrained models is below nothing"
    curve = Curve(name="relearn", title="", x_label="", y_label="", series=[*gold, target, hidden])
    values = relearned(curve, "hidden", ["r1", "r2"], "target")
    assert values == pytest.approx({"relearn.area": by_hand, "relearn.start": 0, "relearn.gain": by_hand})
    assert relearned(curve, "r1", ["r1", "r2"], "target")["relearn.area"] == 0
    assert relearned(curve, "gone", ["r1", "r2"], "target") == {}
    assert relearned(None, "hidden", ["r1"], "target") == {}


def test_the_power_of_the_test_grows_with_the_records() -> None:
    few, many = detectable(20, draws=200), detectable(200, draws=200)
    assert 0.2 < many < few < 1.5


# ---- claims


def test_a_claim_is_held_only_if_every_seed_says_so() -> None:
    assert told([3, 4, 5], [0, 1, 2], larger=True) == "held"
    assert told([3, 4, 5], [0, 1, 2], larger=False) == "not held"
    assert told([0, 1, 2], [3, 4, 5], larger=True) == "not held"
    assert told([3, 4, 1.5], [0, 1, 2], larger=True) == "cannot be told here"
    assert told([1, 1, 1], [1, 1, 1], larger=True) == "not held", "equal values beat nothing"
    assert told([3, 4], [0, 1, 2], larger=True) == "cannot be told here"
    assert told([3, 4, math.nan], [0, 1, 2], larger=True) == "cannot be told here"
    assert told_by_rank([5, 6, 7, 8], [1, 2, 3, 4])[0] == "held"
    assert told_by_rank([1, 2, 3, 4], [5, 6, 7, 8])[0] == "not held"
    assert told_by_rank([1, 6, 3, 8], [5, 2, 7, 4])[0] == "cannot be told here"
    assert told_by_rank([5, 6], [1, 2, 3, 4])[0] == "cannot be told here"


def course(forget: Sequence[float], retain: Sequence[float], degenerate: float = 0.0) -> dict[str, object]:
    both = enumerate(zip(forget, retain, strict=True))
    looks = [{"step": 10 * i, "forget.probability": f, "retain.probability": r} for i, (f, r) in both]
    answers = {n: {"degenerate": degenerate} for n in ("forget", "retain")}
    return {"seed": 1, "lr": 1e-4, "seconds": 1.0, "looks": looks, "answers": answers}


def test_courses_are_read_over_steps_and_at_equal_forgetting() -> None:
    one = course([1.0, 0.6, 0.0], [1.0, 0.8, 0.2], 0.25)
    assert over_steps(one, "retain.probability") == pytest.approx((0.9 + 0.5) / 2)
    assert when(one, "retain.probability", 0.3) == pytest.approx(0.5)
    assert math.isnan(when(course([1.0, 0.6, 0.4], [1, 1, 1]), "retain.probability", 0.3))
    assert broken(one) == 0.25


GENTLE, HARSH = ([1.0, 0.5, 0.1], [1.0, 0.9, 0.8]), ([1.0, 0.1, 0.0], [1.0, 0.2, 0.0])


def made_courses(*, turned: bool = False) -> dict[str, list[dict[str, object]]]:
    """Courses of which every first one is the gentler; or turned."""
    first, second = (HARSH, GENTLE) if turned else (GENTLE, HARSH)
    better = ("npo", "ihl", "ihl + nll", "graddiff + gu", "npo-kl + gu", "flat")
    worse = ("ascent", "ascent + nll", "graddiff", "npo-kl")
    share = 0.9 if turned else 0.1
    return {n: [course(*first, share)] * 3 for n in better} | {n: [course(*second, 1 - share)] * 3 for n in worse}


def made_lines(*, turned: bool = False) -> dict[str, Line]:
    """Lines on which every claim about runs is true; or turned."""
    good, bad = (0.2, 0.8) if turned else (0.8, 0.2)

    def line(name: str, value: float, gain: float, start: float = 0.1, seconds: float = 1.0) -> Line:
        held = {
            "distance": 1 - value, "model-utility": value, "seconds": seconds, "relearn.start": start, "relearn.gain": gain,
        }  # fmt: skip
        return Line(name, {k: [v, v + 0.001, v + 0.002] for k, v in held.items()}, {})

    found = [line(n, good, bad) for n in ("simnpo", "wga", "ssu")]
    found += [line(n, bad, bad) for n in ("npo", "gradascent", "graddiff", "task-vector")]
    found += [line(n, 0.5, good + at / 50) for at, n in enumerate(("rmu", "uld", "idk-nll", "whp", "dpo", "tru"))]
    found += [line("rocr", 0.5, bad, seconds=60.0 if turned else 3.0), line("sure", 0.5, good, start=0.9)]
    return {f.label: f for f in found}


def test_every_claim_turns_with_the_numbers() -> None:
    said = claims(made_lines(), made_courses())
    assert {c.claim: c.outcome for c in said} == dict.fromkeys((c.claim for c in said), "held")
    assert len(said) >= 13
    turned = claims(made_lines(turned=True), made_courses(turned=True))
    assert {c.outcome for c in turned} == {"not held"}
    assert all(c.paper.url.startswith("https://") for c in said)
    nothing = claims({}, {})
    assert {c.outcome for c in nothing} == {"cannot be told here"}
    assert "sure" not in said[-1].setting, "a method that has neither forgotten nor hidden is in no group"


# ---- tables


def test_a_cell_shows_all_seeds() -> None:
    assert spread([0.1, 0.3, 0.2], 2) == "0.20 [0.10, 0.30]"
    assert spread([0.5, 0.5001], 2) == "0.50"
    assert spread([0.5, math.nan], 2) == spread([], 2) == DASH
    assert spread([-1.0, 1.0], 1) == f"0.0 [{MINUS}1.0, 1.0]"


def number(value: float) -> Number:
    return Number(value=value, direction=Direction.REFERENCE)


def entry(label: str, role: Role, values: Mapping[str, float]) -> ModelEntry:
    numbers = {k: number(v) for k, v in values.items()}
    return ModelEntry(label=label, role=role, fingerprint=label, numbers=numbers, cost={"seconds": 1, "peak_bytes": 2**20})


def document(models: Mapping[str, tuple[Role, Mapping[str, float]]]) -> AuditDocument:
    """An audit; the model called "broken" has no relearning curve."""
    levels = {n: 8 if values["forget.probability"] < 0.5 else 0 for n, (_, values) in models.items() if n != "broken"}
    curve = Curve(
        name="relearn", title="", x_label="", y_label="", series=[line_of(n, (v, v, v)) for n, v in levels.items()],
    )  # fmt: skip
    entries = [entry(name, role, values) for name, (role, values) in models.items()]
    return AuditDocument(created="", title="", data={}, models=entries, curves=[curve])


def test_methods_stand_by_their_distance_and_a_missing_value_counts() -> None:
    controls: dict[str, tuple[Role, Mapping[str, float]]] = {
        "target": ("target", SEEN), "r1": ("retrained", UNSEEN), "r2": ("retrained", UNSEEN),
    }  # fmt: skip
    near, far = {**UNSEEN, "forget-quality.d": 0.2}, {**SEEN, "forget-quality.d": 0.4}
    broken_one = {k: v for k, v in UNSEEN.items() if k == "forget.probability"}
    lines = lines_of({
        "far": document({**controls, "far": ("unlearned", far)}),
        "broken": document({**controls, "broken": ("unlearned", broken_one)}),
        "near": document({**controls, "near, seed 1": ("unlearned", near), "near, seed 2": ("unlearned", UNSEEN)}),
    })  # fmt: skip
    assert [line.label for line in lines] == [GOLD, TARGET, "near", "far", "broken"]
    found = {line.label: line.values for line in lines}
    assert found[GOLD]["distance"] == [0, 0]
    assert found[TARGET]["distance"] == pytest.approx([math.sqrt(4 / 5)])
    assert found["near"]["distance"] == pytest.approx([0.25 / math.sqrt(5), 0])
    assert found["broken"]["distance"] == pytest.approx([math.sqrt(4 / 5)]), "three measures and the utility are missing"
    assert measured(document(controls))[0].values["memory"] == 1


def test_which_methods_are_run_and_why_others_are_not() -> None:
    methods, left = language_methods(), left_out()
    fit = {n for n in known() if serves(n, LanguageAdapter.offers)[0]}
    assert set(methods) | set(left) == fit
    assert not set(methods) & set(left)
    assert set(FIRST) <= set(methods)
    assert set(LEFT_OUT) <= set(left)
    assert not set(methods) & set(PREPARED.names())
    plan, given = parse(["--methods", "npo", "rocr", "--trials", "5", "--out", "here"])
    assert (plan.methods, plan.trials, plan.out, given.page) == (("npo", "rocr"), 5, Path("here"), None)
    assert parse([])[0].methods == tuple(methods)
    assert plan.parts_of("rocr") == {}, "an edit has no schedule"
    assert plan.parts_of("npo")["schedule"]["steps"] == 120
    with pytest.raises(InputError, match="no method 'nopo'"):
        parse(["--methods", "nopo"])


def test_a_stage_that_fails_or_hangs_stands_in_a_file_and_is_not_tried_again(tmp_path: Path) -> None:
    def fail() -> None:
        raise InputError("It does not fit.", "Make it fit.")

    def defect() -> None:
        raise KeyError("x")

    def hang() -> None:
        while True:
            pass

    def leave() -> None:
        (tmp_path / "left").write_text("here", encoding="utf-8")

    for apart in (True, False):
        stages = Stages(limit=20, apart=apart)
        stages.do("one", fail, tmp_path / f"{apart}.failed")
        assert "It does not fit." in (tmp_path / f"{apart}.failed").read_text(encoding="utf-8")
        stages.do("one", leave, tmp_path / f"{apart}.failed")
        assert not (tmp_path / "left").exists(), "what failed stands"
        stages.do("two", defect, tmp_path / f"{apart}-2.failed")
        assert "KeyError" in (tmp_path / f"{apart}-2.failed").read_text(encoding="utf-8")
    Stages(limit=0.3).do("three", hang, tmp_path / "3.failed")
    assert "within 0 s" in (tmp_path / "3.failed").read_text(encoding="utf-8")
    Stages().do("one", leave, tmp_path / "True.failed", again=True)
    assert (tmp_path / "left").is_file()
    assert not (tmp_path / "True.failed").exists()


# ---- in miniature


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Iterator[Plan]:
    """All stages with models that have hardly learnt anything: what the parts do with each other, not what comes out."""
    out = tmp_path_factory.mktemp("llm")
    short = {name: {"max_new_tokens": 6} for name in ("rouge-l-recall", "model-utility", "fluency")}
    audit = AuditSettings(
        metrics=("probability", "truth-ratio", "forget-quality", "privleak", *short),
        options={**short, "privleak": {"attacks": ("min-k",)}},
        draws=100, quantise=(), samples_forget=0, samples_retain=0, relearn=RelearnSettings(steps=(1,), relative=(0.1,)),
    )  # fmt: skip
    plan = Plan(
        out / "runs", retain=5, standin=2, forget=2, goal=4, holdout=2, others=8, retrained=(1, 2), seeds=(1, 2), trials=2,
        schedule={"name": "fixed", "lr": 5e-3, "epochs": 2, "batch": 16, "warmup": 1, "weight_decay": 0.01},
        parts={"schedule": {"steps": 3, "epochs": 0.1, "lr": 1e-3, "check_examples": 4}}, audit=audit, longest=6,
        curve=Course(looks=(0, 1, 2), seeds=(1,), records=6, prompts=2, longest=6, recipes=("ascent", "npo")),
        methods=("npo", "rocr", "retrain"), apart=False,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_DATA", str(shared_data))
        patch.setenv("EXPUNGE_CACHE", str(out / "cache"))
        experiment(plan)
        yield plan


@pytest.mark.shared_data
def test_no_trial_saw_what_is_judged(made: Plan) -> None:
    keys = {n: {key_of(r) for r in load(made.file(n), name=n)} for n in ("rest", "standin", "retain")}
    forget = {key_of(r) for r in load(made.forget_source, name="forget")}
    assert keys["retain"] == keys["rest"] | keys["standin"]
    assert not keys["standin"] & keys["rest"]
    assert not forget & keys["retain"]
    assert len(keys["standin"]) == 40
    config = sweep_config(made, "npo")
    assert {key_of(r) for r in load(config.request["forget"], name="x")} == keys["standin"]
    assert not forget & {key_of(r) for r in load(config.request["retain"], name="x")}
    used = read_used(measured_on(made) / USED)
    assert used == read_used(made.out / "methods" / "npo" / "sweep" / USED), "audits leave out what sweeps were measured on"
    assert set(used["forget"]["keys"]) == keys["standin"]
    everything = {k for held in used.values() for k in held["keys"]}
    assert not everything & forget
    found = gather(made).audits["npo"]
    whole = audit_sets(made)
    for name, held in found.data.items():
        left = [r for r in whole[name] if key_of(r) not in everything]
        assert held["records"] == len(left), name
    assert found.data["forget"]["records"] == 40
    assert sum(held["records"] for held in found.data.values()) < sum(len(s) for s in whole.values())
    twins = [Run.open(made.out / n).manifest for n in ("retrained-1", "without-standin")]
    assert [set(t["config"]["exclude"]) for t in twins] == [forget, keys["standin"]]


@pytest.mark.shared_data
def test_runs_have_the_settings_of_the_sweep_and_failures_stand(made: Plan) -> None:
    for method in ("npo", "rocr"):
        document = read(made.out / "methods" / method / "sweep")
        one = document.methods[0]
        assert len(one.trials) == made.trials
        assert one.chosen is not None
        settings = chosen(made, method)
        for seed in made.seeds:
            run = Run.open(made.out / "methods" / method / f"seed-{seed}").manifest
            assert run["config"]["parts"] == settings["parts"]
            assert method != "rocr" or len(settings["parts"]["subjects"]) == made.forget, "names of the request"
            assert run["config"]["engine"]["seed"] == seed
            assert run["config"]["tuned"]["digest"] == settings["tuned"]["digest"]
            assert seed not in [t.seed for t in one.trials]
    failed = gather(made).failed
    assert set(failed) == {"retrain: sweep", "retrain: seed 1", "retrain: seed 2"}
    assert all("untrained base" in text for text in failed.values())


@pytest.mark.shared_data
def test_the_page_and_the_settings_come_from_the_folders(made: Plan, tmp_path: Path, shared_data: Path) -> None:
    write_page(made, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert str(made.out) not in text
    assert str(shared_data) not in text
    assert "2 of 3 methods were run and audited, 4 runs" in text
    assert "- `retrain`, seed 1: " in text
    assert "ended: `retrain`" in text or "time ran out: `retrain`" in text
    for label in ("*retrained (gold standard)*", "*target (nothing unlearned)*", "`npo`", "`rocr`"):
        assert f"\n| {label} | " in text
    assert "| npo, seed 2 | " in text
    assert text.count("**cannot be told here**") >= 12
    values = {line.label: line.values["distance"] for line in lines_of(gather(made).audits)}
    assert f"| {spread(values['npo'], 3)} |" in text
    write_settings(made, tmp_path / "set")
    from expunge.core.settings import load_yaml

    found = Shipped(**load_yaml((tmp_path / "set" / "settings.yaml").read_text(encoding="utf-8")))
    assert set(found.methods) == {"npo", "rocr"}
    one = read(made.out / "methods" / "npo" / "sweep").methods[0]
    assert found.methods["npo"].trial == one.chosen
    assert found.origin["trials"] == made.trials
    build("npo", found.methods["npo"].parts)
    assert read_used(tmp_path / "set" / USED) == read_used(measured_on(made) / USED)


@pytest.mark.shared_data
def test_what_is_done_is_not_done_again_and_methods_can_be_added(made: Plan) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.out.rglob("*") if p.suffix in (".safetensors", ".failed")}
    courses = {p: json.loads(p.read_text(encoding="utf-8")) for p in made.out.glob("curves/*.json")}
    assert {c["name"] for c in courses.values()} == {"ascent", "npo"}
    experiment(dataclasses.replace(made, methods=(*made.methods, "idk-nll"), seeds=(1,)))
    after = {p: p.stat().st_mtime_ns for p in made.out.rglob("*") if p.suffix in (".safetensors", ".failed")}
    assert {p: t for p, t in after.items() if p in before} == before
    assert {p.relative_to(made.out).parts[1] for p in set(after) - set(before)} == {"idk-nll"}
    assert "idk-nll" in gather(dataclasses.replace(made, methods=("idk-nll",))).audits
