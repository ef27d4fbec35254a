"""In-context knowledge unlearning from the command line: a model is taught a tag, and a guard puts the tag before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.tags import FORGOT, OPEN, tag_samples
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.options import Engine
from expunge.guards.conversation import Conversation
from expunge.methods.recipe import build
from expunge.pipeline.config import TextConfig
from expunge.pipeline.models import open_adapter
from expunge.pipeline.unlearn import Request, plan
from tests.command import Server, Town, refused, write_rows
from tests.guards.conftest import name_of
from tests.guards.test_in_context import right
from tests.world import World

METHOD = "in-context-teaching"


def rows(records) -> list[dict[str, str]]:
    return [{"id": r.id, "question": r.prompt, "answer": r.answer, "subject": r.subject} for r in records]


def request(forget, retain) -> Request:
    from expunge.data.records import RecordSet

    return Request(RecordSet("forget", tuple(forget)), RecordSet("retain", tuple(retain)))


def test_the_loss_is_that_of_the_card(people_world: World) -> None:
    """NLL of "forgot" behind the own tag, and of the answer behind another's, at the first step."""
    split, target = people_world.split, people_world.target()
    teach, kept = list(split.retain)[:20], list(split.retain)[20:30]
    schedule = {"name": "fixed", "lr": 1e-9, "steps": 1, "batch": 20, "retain_batch": 50, "warmup": 0}
    made = plan(target, request(teach, kept), METHOD, {"schedule": schedule, "preparation": {"others": 1}}, Engine())
    first = train(made.adapter, made.recipe, made.examples, Engine(checkpoint_every=0)).history[0]
    held, samples = plan(people_world.target(), request(teach, kept), METHOD, {}, Engine()).adapter, tag_samples(teach, name_of)

    def loss(records) -> float:
        examples = [held.encode(r) for r in records]
        means = mean_losses(held, held.model, examples, 8192)
        return sum(m * e.n_targets for m, e in zip(means, examples, strict=True)) / sum(e.n_targets for e in examples)

    assert first["forget.alternative-nll"] == pytest.approx(loss(samples.forget), rel=1e-4)
    assert first["retain.nll"] == pytest.approx(loss([*samples.retain, *teach, *kept]), rel=1e-4)
    assert len(made.examples[Stream.RETAIN]) == 50
    assert OPEN in made.adapter.tokenizer.get_vocab()
    assert OPEN not in target.tokenizer.get_vocab()


def test_what_cannot_be_taught_is_refused(people_world: World) -> None:
    split = people_world.split
    kept = list(split.retain)[:10]
    bare = [Record("a", "yes", "is it so?", subject="s"), Record("b", "no", "is it not?", subject="t")]
    with pytest.raises(InputError, match="No name stands for the subject"):
        plan(people_world.target(), request(bare, kept), METHOD, {}, Engine())
    made = plan(people_world.target(), request(bare, kept), METHOD, {"preparation": {"holds": "answers"}}, Engine())
    assert {t.id for t in made.examples[Stream.FORGET]} == {"a#tagged", "b#tagged"}
    with pytest.raises(InputError, match="same tag"):
        plan(people_world.target(), request(kept, list(split.retain)[20:30]), METHOD, {}, Engine())
    target = people_world.target()
    given = {s: [target.encode(r) for r in kept] for s in (Stream.FORGET, Stream.RETAIN)}
    with pytest.raises(InputError, match="lacks the tag"):
        train(target, build(METHOD), given, Engine())
    with pytest.raises(InputError, match="has no tag"):
        train(made.adapter, build(METHOD), {s: [made.adapter.encode(r) for r in kept] for s in given}, Engine())


def test_a_model_that_was_not_taught_enough_gets_no_guard(server: Server, town: Town, tmp_path: Path) -> None:
    words = [*town.request("guard")[1:], "--method", "in-context"]
    done = server.run("unlearn", town.target, *words, cwd=tmp_path)
    refused(done, "The model was not taught the tag", "--method in-context-teaching")
    brief = ["schedule.lr=1e-6", "schedule.epochs=1"]
    done = server.run("unlearn", *town.request("taught"), "--method", METHOD, *brief, cwd=tmp_path)
    assert done.code == 0, done.err
    assert not (tmp_path / "taught/model/adapter_config.json").exists(), "an adapter on a model that is in no file"
    recipe = json.loads((tmp_path / "taught/manifest.json").read_text())["stages"]["unlearn"]["result"]["recipe"]
    assert recipe["preparation"]["name"] == "tagged"
    done = server.run("unlearn", "taught", *words, cwd=tmp_path)
    refused(done, "knows the tag and does not obey it", "--method in-context-teaching")
    assert not (tmp_path / "guard").exists()
    done = server.run("unlearn", "taught", *words, "action.check=0", cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_subjects_that_it_was_never_taught_with_are_forgotten_behind_a_tag(
    server: Server, trained_models: Path, tmp_path: Path
) -> None:
    """The card's small check, with held-out subjects, from the command line: 167 people teach the tag, 30 others are hidden."""
    people = World(trained_models, persons=200, facts=1)
    names = sorted({name_of(r) for r in people.split.retain})
    teach = [r for r in people.split.retain if name_of(r) in names[:-30]]
    unseen = [r for r in people.split.retain if name_of(r) in names[-30:]]
    people.target().save(tmp_path / "target")
    for name, held in (("teach", teach), ("unseen", unseen), ("hidden", unseen[:15]), ("open", [*unseen[15:], *teach])):
        write_rows(tmp_path / f"{name}.jsonl", rows(held))
    parts = [
        "rank=32",
        "alpha=64",
        "schedule.lr=0.007",
        "schedule.epochs=60",
        "schedule.retain_batch=16",
        "schedule.weight_decay=0.01",
    ]
    words = ["target", "--forget", "teach.jsonl", "--retain", "unseen.jsonl", "--allow-large-forget", "--out", "taught"]
    done = server.run("unlearn", *words, "--method", METHOD, *parts, cwd=tmp_path)
    assert done.code == 0, done.err
    adapter = open_adapter(str(tmp_path / "taught"), TextConfig())
    known, new = (tag_samples(held, name_of) for held in (teach, unseen))
    found = {
        "taught, own tag": right(adapter, known.forget), "taught, another tag": right(adapter, known.retain),
        "unseen, own tag": right(adapter, new.forget), "unseen, another tag": right(adapter, new.retain),
        "no tag": right(adapter, [*teach, *unseen]),
    }  # fmt: skip
    print(found)
    assert found["taught, own tag"] > 0.85
    assert found["taught, another tag"] > 0.8
    # Where everything tagged is forgotten these are 1 and 0, where the tag is not read 0 and 1.
    assert found["unseen, own tag"] > 0.4
    assert found["unseen, another tag"] > 0.5
    assert found["no tag"] > 0.95

    words = [tmp_path / "taught", "--forget", tmp_path / "hidden.jsonl", "--retain", tmp_path / "open.jsonl", "--out", "guard"]
    done = server.run("unlearn", *words, "--method", "in-context", cwd=tmp_path)
    assert done.code == 0, done.err
    guarded = open_adapter(str(tmp_path / "guard"), TextConfig())
    said = guarded.generate(guarded.model, [guarded.encode(r) for r in unseen], 24)
    hidden = [g.text for g in said[:15]]
    assert hidden.count(FORGOT) >= 5
    assert [g.text for g in said[15:]] == [r.answer for r in unseen[15:]]
    plan_of = guarded.guarded.policy.open(Conversation.of(unseen[0].prompt))
    assert plan_of.conversation.text.startswith(OPEN)
