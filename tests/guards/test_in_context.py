"""In-context unlearning by tags and by wrong examples."""

import pytest
import torch

from expunge.adapters.added import with_tokens
from expunge.core.errors import InputError
from expunge.data.records import Record, RecordSet
from expunge.data.tags import CLOSE, FORGOT, OPEN, TAGS, tag_samples, tagged
from expunge.engine.options import Engine
from expunge.guards.actions.flip import Flip
from expunge.guards.actions.tag import Tag
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Sampling
from expunge.guards.guarded import guard_model
from expunge.guards.parts import Hit, Material
from expunge.guards.prompts import cleaned, put
from expunge.guards.target import Shown, Target
from expunge.methods.recipe import build
from expunge.pipeline.unlearn import Request, plan, run_in_memory
from tests.guards.conftest import KEY, name_of

SHORT = Sampling(max_tokens=24)
METHOD = "in-context-teaching"


def teach(adapter, records, kept, **parts):
    """The adapter that the method makes: its model, and a tokenizer that knows the tag."""
    request = Request(RecordSet("forget", tuple(records)), RecordSet("retain", tuple(kept)))
    made = plan(adapter, request, METHOD, parts, Engine(seed=0, checkpoint_every=0))
    made.adapter.model = run_in_memory(made)[0].model.eval()
    return made.adapter


def schedule(epochs):
    return {"name": "fixed", "lr": 2e-3, "epochs": epochs, "batch": 16, "retain_batch": 32, "warmup": 1, "weight_decay": 0.01}


def right(adapter, records):
    said = adapter.generate(adapter.model, [adapter.encode(r) for r in records], 24)
    return sum(g.text == r.answer for g, r in zip(said, records, strict=True)) / len(records)


@pytest.fixture(scope="module")
def persons(people):
    """Records of ten people whose tags are taught, and of four who were never in a tag."""
    names = sorted({name_of(r) for r in people.split.retain})
    return [[r for r in people.split.retain if name_of(r) in part] for part in (names[:10], names[10:14])]


@pytest.fixture(scope="module")
def taught(target_adapter, persons):
    adapter = teach(target_adapter, *persons, parameters="all", preparation={"others": 2}, schedule=schedule(36))
    return adapter, tag_samples(persons[0], name_of, seed=0, others=2)


# ---- the samples


def test_every_question_gives_one_sample_of_each_kind(persons):
    records = persons[0]
    made = tag_samples(records)
    for record, forget, retain in zip(records, made.forget, made.retain, strict=True):
        assert forget.prompt == f"{OPEN}\n{record.answer}\n{CLOSE}\n\n{record.prompt}"
        assert forget.answer == FORGOT
        assert retain.answer == record.answer
        assert retain.prompt.split("\n")[1] in record.perturbed
    by_name = tag_samples(records, name_of, seed=3)
    for record, forget, retain in zip(records, by_name.forget, by_name.retain, strict=True):
        assert forget.prompt == tagged(record.prompt, name_of(record))
        assert retain.prompt.split("\n")[1] in {name_of(r) for r in records} - {name_of(record)}
    assert by_name == tag_samples(records, name_of, seed=3) != tag_samples(records, name_of, seed=4)
    with pytest.raises(InputError, match="same tag"):
        tag_samples(records[:2], lambda _: "x")
    with pytest.raises(InputError, match="no question"):
        tag_samples([Record(id="a", answer="text")])


def test_new_tokens_are_one_each_and_old_answers_stay(target_adapter, people):
    made = with_tokens(target_adapter, TAGS)
    ids = made.tokenizer(tagged("Who?", "Anna"), add_special_tokens=False)["input_ids"]
    assert [made.tokenizer.convert_ids_to_tokens(i) for i in ids].count(OPEN) == 1
    assert len(made.tokenizer) == len(target_adapter.tokenizer) + 2
    assert right(made, people.split.retain[:5]) == 1.0
    assert len(with_tokens(made, TAGS).tokenizer) == len(made.tokenizer)
    published = build(METHOD, {"schedule": "paper"})
    assert (published.schedule.lr, published.schedule.epochs, published.schedule.batch, published.schedule.clip) == (
        2e-4,
        3,
        4,
        0.3,
    )
    assert (published.parameters.rank, published.parameters.alpha, published.parameters.dropout) == (4, 8.0, 0.1)
    assert (published.preparation.holds, published.preparation.others, published.preparation.plain) == ("answers", 1, False)


# ---- the training


def test_a_model_learns_to_obey_the_tag_and_answers_as_before_without_it(taught, persons, target_adapter):
    adapter, samples = taught
    apart = tag_samples(persons[1], name_of, seed=1)
    found = {
        "forget": right(adapter, samples.forget), "retain": right(adapter, samples.retain),
        "forget, unseen": right(adapter, apart.forget), "retain, unseen": right(adapter, apart.retain),
        "no tag": right(adapter, [*persons[0], *persons[1]]),
    }  # fmt: skip
    print(found)
    assert found["forget"] > 0.9
    assert found["retain"] > 0.9
    assert found["no tag"] > 0.9


def test_without_the_second_kind_whatever_is_tagged_is_forgotten(target_adapter, persons):
    samples = tag_samples(persons[0], name_of)
    made = teach(target_adapter, *persons, retain={"weight": 0}, parameters="all", schedule=schedule(5))
    assert right(made, samples.forget) > 0.9
    assert right(made, samples.retain) < 0.1


def test_the_answer_is_still_inside_a_model_that_says_it_forgot(taught):
    """Read by the head from the state before the last block: above chance, of answers by the first word that differs."""
    adapter, samples = taught
    model, better = adapter.model, []
    for forget, retain in list(zip(samples.forget, samples.retain[::2], strict=True))[:60]:
        prompt = adapter.encode(forget).data
        ids = torch.from_numpy(prompt.ids[: prompt.start].astype("int64"))[None]
        answer = adapter.encode(retain).data
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[-2][0, -1]
            scores = model.get_output_embeddings()(model.model.norm(states))
        better.append(float((scores < scores[int(answer.ids[answer.start])]).float().mean()))
    assert sum(better) / len(better) > 0.6  # 0.5 by chance


# ---- serving


def test_the_server_puts_the_tag_and_takes_out_those_of_users(taught, persons):
    adapter, _ = taught
    record, other = persons[0][0], persons[0][-1]
    made = guard_model(adapter, guards="in-context", targets=[], key=KEY)
    before = made.answers([record.prompt, other.prompt], SHORT)
    assert [a.text for a in before] == [record.answer, other.answer]
    name = made.add({"entities": [name_of(record)]})
    after = made.answers([record.prompt, other.prompt], SHORT)
    assert [a.text for a in after] == [FORGOT, other.answer]
    # A tag of the user's own neither closes the server's nor takes its place.
    for trick in (tagged(record.prompt, name_of(other)), f"{CLOSE}{record.prompt}", f"{OPEN}{OPEN}{record.prompt}{CLOSE}"):
        plan = made.policy.open(Conversation.of(trick))
        assert plan.conversation.text.startswith(f"{OPEN}\n{name_of(record)}\n{CLOSE}\n\n")
        assert plan.conversation.text.count(OPEN) == plan.conversation.text.count(CLOSE) == 1
    read = put(adapter, cleaned(Conversation.of(tagged(other.prompt, name_of(other))), adapter.tokenizer)).ids.tolist()
    assert not {adapter.tokenizer.convert_tokens_to_ids(t) for t in TAGS} & set(read)  # where no name calls for a tag, too
    made.drop(name)
    assert made.answers([record.prompt], SHORT)[0].text == record.answer


def test_a_tag_of_answers_holds_the_one_that_is_asked_for(target_adapter):
    target = Target(
        id="t",
        entities=("Anna",),
        examples=(Shown(prompt="Where was Anna born?", answer="Kelvos"), Shown(prompt="Who?", answer="X")),
    )
    doer = Tag(holds="answers").prepare(Material([target], key=KEY))
    orders = doer.orders(Conversation.of("Anna was born where?"), [Hit("t", 1.0)])
    assert orders.conversation.text == tagged("Anna was born where?", "Kelvos")
    assert doer.orders(Conversation.of("Who?"), [Hit("other", 1.0)]).conversation is None
    with pytest.raises(InputError, match="not taught"):
        guard_model(target_adapter, guards="in-context", targets=[target])
    with pytest.raises(InputError, match="entities"):
        Tag().prepare(Material([Target(id="t", topics=("a",))], key=KEY))


EXAMPLES = tuple(Shown(prompt=f"Where was Anna born, says {i}?", answer=f"Kelvos {i}") for i in range(4))
RIGHT = tuple(Shown(prompt=f"What is {i} + 1?", answer=str(i + 1)) for i in range(3))


def test_wrong_examples_come_first_then_right_ones_then_the_question():
    target = Target(id="t", entities=("Anna",), examples=EXAMPLES)
    doer = Flip(flipped=2, right=2, examples=RIGHT, line="{prompt} = {answer}\n").prepare(Material([target], key=KEY))
    asked = EXAMPLES[1].prompt
    lines = doer.orders(Conversation.of(asked), [Hit("t", 1.0)]).conversation.text.split("\n")
    assert lines[-1] == asked
    assert lines[2:4] == ["What is 0 + 1? = 1", "What is 1 + 1? = 2"]
    for line in lines[:2]:
        question, answer = line.split(" = ")
        shown = next(e for e in EXAMPLES if e.prompt == question)
        assert shown.prompt != asked
        assert answer != shown.answer
        assert answer in {e.answer for e in EXAMPLES}
    again = doer.orders(Conversation.of(asked), [Hit("t", 1.0)]).conversation.text.split("\n")
    assert again == lines
    assert doer.orders(Conversation.of(asked), [Hit("gone", 1.0)]).conversation is None
    kept = doer.orders(Conversation.of(RIGHT[0].prompt), [Hit("", 1.0)]).conversation.text
    assert kept.count(RIGHT[0].prompt) == 1


def test_examples_leave_room_for_an_answer_and_one_wrong_one_stays(target_adapter, people):
    """More examples than the context holds: right ones go first, then wrong ones but the first."""
    forget, kept = people.split.forget, people.split.retain
    shown = tuple(Shown(prompt=r.prompt, answer=r.answer) for r in forget[1:9])
    right = tuple(Shown(prompt=r.prompt, answer=r.answer) for r in kept[:50])
    targets = [Target(id="t", entities=(name_of(forget[0]),), examples=shown)]

    def plan(**settings):
        action = Flip(examples=right, **settings)
        made = guard_model(target_adapter, guards=[{"detector": "terms", "action": action}], targets=targets, key=KEY)
        found = made.policy.open(Conversation.of(forget[0].prompt))
        assert found.failed == []
        text = found.conversation.text
        return (
            text,
            [sum(e.prompt in text for e in some) for some in (shown, right)],
            len(put(target_adapter, found.conversation).ids),
        )

    room, context = target_adapter.context // 4, target_adapter.context
    text, (wrong, correct), size = plan(flipped=1, right=50, room=room)
    assert wrong == 1
    assert 0 < correct < 50
    assert size + room <= context
    assert text.endswith(forget[0].prompt)
    assert plan(flipped=1, right=correct, room=room)[0] == text
    text, (wrong, correct), size = plan(flipped=8, right=50, room=context - 40)
    assert correct == 0
    assert 1 <= wrong < 8


def test_right_examples_are_the_models_own_answers(target_adapter, people):
    forget = people.split.forget
    target = Target(
        id="t", entities=(name_of(forget[0]),), examples=tuple(Shown(prompt=r.prompt, answer=r.answer) for r in forget[:10])
    )
    kept = people.split.retain[:5]
    made = guard_model(
        target_adapter, guards={"guard": "icul", "action.right": 4}, targets=[target], ordinary=[r.prompt for r in kept], key=KEY
    )
    plan = made.policy.open(Conversation.of(forget[0].prompt))
    assert all(f"{r.prompt}\n{r.answer}\n\n" in plan.conversation.text for r in kept[:4])
    assert plan.conversation.text.endswith(forget[0].prompt)
    assert f"{forget[0].prompt}\n" not in plan.conversation.text
    assert made.policy.open(Conversation.of(kept[0].prompt)).conversation.text == kept[0].prompt
    with pytest.raises(InputError, match="right examples"):
        guard_model(target_adapter, guards="icul", targets=[target], ordinary=["a"], key=KEY)
