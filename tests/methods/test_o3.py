"""O3: updates that are loaded where a detector says so, for one request and the next, through the engine and the audit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from sklearn.metrics import roc_auc_score
from topics import QUIET, Topics, exact

import expunge
from expunge.adapters.gated import Gated
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load
from expunge.adapters.lowrank import LowRank
from expunge.adapters.passes import _prompt_lengths
from expunge.adapters.presets import build as preset
from expunge.adapters.reading import TextEncoder, open_encoder
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.engine.finish import Gate
from expunge.engine.goal import Goal
from expunge.engine.loop import train
from expunge.engine.objective import mean_losses
from expunge.engine.parameters import LoraBeside
from expunge.engine.penalty import Orthogonal
from expunge.methods.preparations.encoder import EncoderTraining, contrastive_entropy, masked, train_encoder
from expunge.methods.recipe import build, from_spec

SCHEDULE = {"name": "fixed", "lr": 1e-2, "steps": 60, "batch": 24, "warmup": 0}


@pytest.fixture(scope="session")
def topics(trained_models) -> Topics:
    return Topics(trained_models)


def forgotten(topics: Topics, topic: str, model=None, **overrides) -> tuple[LanguageAdapter, Gated]:
    """The target (or what an earlier request left) after a request, as an adapter."""
    adapter = topics.target()
    adapter.model = model or adapter.model
    recipe = build("o3", {"schedule": SCHEDULE, "finish": {"scale": 1.0}} | overrides)
    made = adapter.sharing()
    made.model = train(adapter, recipe, topics.examples(topic), QUIET).model
    assert isinstance(made.model, Gated)
    return made, made.model


def of_prompts(adapter: LanguageAdapter, records, what: str = "weights") -> torch.Tensor:
    batch = adapter.collate([adapter.encode(r) for r in records])
    return getattr(adapter.model, what)(batch.tensors["input_ids"], batch.tensors["attention_mask"], _prompt_lengths(batch))


@pytest.fixture(scope="module")
def first(topics):
    return forgotten(topics, "ships")


@pytest.fixture(scope="module")
def second(topics, first):
    return forgotten(topics, "herbs", first[1])


def logits(adapter: LanguageAdapter, model, records) -> torch.Tensor:
    with torch.no_grad():
        return adapter.forward(model, adapter.collate([adapter.encode(r) for r in records]), frozenset({"logits"})).logits


def overlap(model: Gated) -> float:
    """``||A_1 A_2'||_F`` over all modules."""
    first, second = (r.update for r in model.requests)
    parts = [(a.detach() @ b.detach().T).square().sum() for a, b in zip(first.a, second.a, strict=True)]
    return float(torch.stack(parts).sum().sqrt())


# ---- the card's check


def test_the_forget_set_is_forgotten_and_the_target_untouched(topics, first):
    """The card's (i) and (iv), forget side."""
    adapter, model = first
    before = topics.target().model.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in model.target.state_dict().items())
    ships = topics.facts["ships"]
    assert exact(adapter, ships, model.target) == 1.0
    assert exact(adapter, ships) < 0.1
    said = [g.text for g in adapter.generate(model, [adapter.encode(r) for r in ships], 6)]
    assert sum(text == r.answer for text, r in zip(said, ships, strict=True)) <= 2
    update, strength = model.requests[0].update, model.requests[0].strength
    assert strength == 1.0
    assert all(bool(b.any()) for b in update.b)


def test_what_is_left_to_the_target_is_answered_by_it(topics, first):
    """The card's (iv), retain side: equal, score by score, wherever the weight is 0, and that is nearly everywhere."""
    adapter, model = first
    rest = [r for topic in ("herbs", "stars", "songs") for r in topics.facts[topic]]
    zero = of_prompts(adapter, rest)[0] == 0
    assert zero.float().mean() > 0.8
    kept = [r for r, z in zip(rest, zero.tolist(), strict=True) if z]
    torch.testing.assert_close(logits(adapter, model, kept), logits(adapter, model.target, kept), rtol=0, atol=1e-5)
    assert exact(adapter, kept) == 1.0


def test_the_detector_tells_forget_from_retain(topics, second):
    """The card's (iii), for both requests."""
    adapter, _ = second
    for number, topic in enumerate(("ships", "herbs")):
        rest = [r for other, held in topics.facts.items() if other != topic for r in held]
        near = [of_prompts(adapter, records, "closeness")[number] for records in (topics.facts[topic], rest)]
        labels = [1] * len(near[0]) + [0] * len(near[1])
        assert roc_auc_score(labels, torch.cat(near).numpy()) > 0.95


def test_the_first_request_stays_forgotten_after_the_second(topics, first, second):
    """The card's (v)."""
    adapter, model = second
    assert len(model.requests) == 2
    assert exact(adapter, topics.facts["herbs"], first[1]) > 0.9
    assert exact(adapter, topics.facts["herbs"]) < 0.1
    assert exact(adapter, topics.facts["ships"]) < 0.1
    rest = topics.kept
    untouched = (of_prompts(adapter, rest) == 0).all(0).float().mean()
    assert untouched > 0.7
    assert exact(adapter, rest) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(first[1].requests[0].update.a, model.requests[0].update.a, strict=True))


def test_the_penalty_keeps_updates_orthogonal(topics, first, second):
    """The card's (ii)."""
    free = forgotten(topics, "herbs", first[1], penalty="none")[1]
    assert 0 < overlap(second[1]) < 0.1 * overlap(free)


def test_one_update_that_goes_on_learning_loses_the_first_request(topics, first):
    """The published sequence: its weight is the largest over requests, its A is driven away from what it had read."""
    adapter, model = forgotten(topics, "herbs", first[1], begins="last")
    ships, herbs = topics.facts["ships"], topics.facts["herbs"]
    assert model.requests[1].continued
    assert bool((of_prompts(adapter, ships)[0] == 0).all())
    assert of_prompts(adapter, ships)[1].median() > 0.9
    assert exact(adapter, herbs) < 0.15
    assert exact(adapter, ships) > exact(first[0], ships), "what the separate update keeps"
    with pytest.raises(InputError, match="another rank"):
        forgotten(topics, "herbs", first[1], begins="last", rank=4)


def test_the_penaltys_gradient(topics, first, second):
    """Against automatic differentiation of the formula, summed over all earlier requests."""
    adapter = topics.target()
    adapter.model = second[1]
    wrapped = LoraBeside().prepare(second[1], adapter.layers())
    made = Orthogonal(weight=0.3).begin(adapter, wrapped)
    current = LowRank.of(wrapped)
    assert len(made) == len(current.a) == 14
    for name, parameter in wrapped.named_parameters():
        if ".lora_A." not in name:
            assert name not in made
            continue
        value = parameter.detach().clone().requires_grad_(True)
        place = next(i for i, n in enumerate(current.names) if f".{n}.lora_A" in name)
        loss = 0.3 / 2 * sum((r.update.a[place] @ value.T).square().sum() for r in second[1].requests)
        (want,) = torch.autograd.grad(loss, value)
        torch.testing.assert_close(Orthogonal(weight=0.3).gradient(parameter.detach(), 0.0, made[name]), want)
    assert not Orthogonal().gradient(torch.ones(2, 3), 0.0).any()
    adapter.model = second[1].target
    assert Orthogonal().begin(adapter, wrapped) == {}, "a first request has nothing to keep away from"


# ---- as a run


def test_the_schedule_stops_at_the_goal_and_finds_the_strength(topics):
    adapter = topics.target()
    goal = Goal(loss=1.5, source="holdout", examples=10)
    recipe = build("o3", {"schedule": {"lr": 1e-2, "utility_bound": 0.5}})
    outcome = train(adapter, recipe, topics.examples("ships", retain=True), QUIET, goal=goal)
    assert outcome.reason == "goal", outcome.sentence
    assert outcome.forget_loss >= 1.5
    assert 0 < outcome.finish_scale <= 2
    assert outcome.model.requests[0].strength == outcome.finish_scale
    assert outcome.retain_loss < 0.5
    told = " ".join(outcome.notes)
    assert "fitted on 18 forget prompts, its mixture on 6 more" in told
    assert "from 48 retain prompts with area" in told
    outcome.model.requests[0].strength *= 0.9
    some = [adapter.encode(r) for r in topics.facts["ships"]]
    assert sum(mean_losses(adapter, outcome.model, some, 8192)) / len(some) < 1.5


def test_a_model_behind_its_goal_says_so(topics):
    """What was learnt is enough; what the detector lets through is not, and no strength makes up for that."""
    adapter = topics.target()
    goal = Goal(loss=2.0, source="holdout", examples=10)
    outcome = train(adapter, build("o3", {"level": 0.99, "schedule": {"lr": 1e-2}}), topics.examples("ships"), QUIET, goal=goal)
    assert (outcome.reason, outcome.reached) == ("joined", False), outcome.sentence
    assert "the model that it makes with the target does not" in outcome.sentence
    assert outcome.finish_scale == 2.0


def test_it_is_saved_audited_and_generated_from(topics, second, tmp_path):
    adapter, model = second
    adapter.save(tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.fingerprint() == adapter.fingerprint()
    some = [adapter.encode(r) for r in (*topics.facts["ships"][:6], *topics.kept[:6])]
    assert back.generate(back.model, some, 6) == adapter.generate(model, some, 6)
    document = expunge.audit_model(
        topics.target().model, back.model, back.tokenizer, topics.facts["ships"][:12], topics.kept[:12],
        metrics=("probability", "loss"), relearn={"steps": (5,)},
    )  # fmt: skip
    numbers = {m.label: m.numbers for m in document.models}
    unlearned = next(v for k, v in numbers.items() if k != "target")
    assert unlearned["forget.loss"].value > numbers["target"]["forget.loss"].value + 1


def test_a_killed_run_goes_on_to_the_same_model(topics, tmp_path):
    class Killed(Exception):
        pass

    def observe(step: int, _: object) -> None:
        if step == 4:
            raise Killed

    recipe = build("o3", {"schedule": {**SCHEDULE, "steps": 6}, "finish": {"scale": 1.0}})
    engine = QUIET.model_copy(update={"checkpoint_every": 2})
    examples = topics.examples("ships")
    whole = train(topics.target(), recipe, examples, engine, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        train(topics.target(), recipe, examples, engine, folder=tmp_path / "cut", observe=observe)
    rest = train(topics.target(), recipe, examples, engine, folder=tmp_path / "cut", resume=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[key]), key


def test_other_methods_can_be_gated(topics):
    """The gate is a part: here NPO fills the update."""
    parts = {
        "preparation": "ood-detector",
        "parameters": "lora-beside",
        "finish": {"name": "gate", "scale": 1.0},
        "retain": "none",
    }
    adapter = topics.target()
    outcome = train(adapter, build("npo", {**parts, "schedule": {**SCHEDULE, "steps": 8}}), topics.examples("ships"), QUIET)
    ships = [adapter.encode(r) for r in topics.facts["ships"]]
    assert sum(mean_losses(adapter, outcome.model, ships, 8192)) > sum(mean_losses(adapter, adapter.model, ships, 8192)) + 5


def test_the_published_setting():
    recipe = build("o3", {"schedule": "paper"})
    assert (recipe.schedule.lr, recipe.schedule.epochs, recipe.schedule.batch) == (3e-4, 15, 128)
    assert (recipe.parameters.rank, recipe.parameters.alpha, recipe.parameters.dropout) == (8, 16.0, 0.05)
    assert (recipe.parameters.begins, recipe.preparation.encoder) == ("last", "roberta-large")
    assert isinstance(recipe.finish, Gate)
    assert (recipe.finish.scale, recipe.finish.level, recipe.penalty.weight) == (1.0, 0.0, 0.1)
    assert (recipe.preparation.lr, recipe.preparation.epochs, recipe.preparation.batch, recipe.preparation.nu) == (
        1e-5,
        2,
        8,
        0.1,
    )
    assert from_spec(recipe.spec()) == recipe
    official = build("o3", {"rule": "official", "signs": "official"})
    assert official.finish.weighing().rule == official.preparation.signs == "official"
    assert EncoderTraining().scale == 4.0


# ---- the detector's settings


def test_a_layer_is_chosen_by_retain_prompts_only_where_asked_for(topics):
    adapter = topics.target()
    part = build("o3", {"preparation": {"layers": "chosen"}}).preparation
    examples = topics.examples("ships", retain=True)
    made = part.prepare(adapter, examples, QUIET, None, None)
    (layer,) = made.made["detector"].detector.layers
    assert (
        f"The detector reads block {layer}: of 2 it tells 6 held-out forget prompts best from 48 retain prompts" in made.notes[1]
    )
    plain = build("o3").preparation
    with_retain, without = (
        plain.prepare(adapter, e, QUIET, None, None).made["detector"].detector for e in (examples, topics.examples("ships"))
    )
    assert all(torch.equal(v, without.tensors()[k]) for k, v in with_retain.tensors().items()), "retain prompts changed it"
    with pytest.raises(InputError, match="none were given"):
        part.prepare(adapter, topics.examples("ships"), QUIET, None, None)
    with pytest.raises(InputError, match="Layer 4 is out of range"):
        build("o3", {"preparation": {"layers": [4]}}).preparation.prepare(adapter, examples, QUIET, None, None)
    few = {**examples, Stream.FORGET: [*examples[Stream.FORGET][:5], *examples[Stream.FORGET][:5]]}
    with pytest.raises(InputError, match="needs 6 forget prompts that differ, and there are 5"):
        plain.prepare(adapter, few, QUIET, None, None)


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("o3", {"preparation": "none"}, "finish=gate reads 'detector', which no preparation makes"),
        ("o3", {"parameters": "lora"}, "joins the target with a model trained beside it, and parameters=lora trains none"),
        ("o3", {"parameters": "assistant"}, "finish=gate cannot join what parameters=assistant trains"),
        ("o3", {"finish": "none", "preparation": "none"}, "trains a model beside the target, and nothing joins the two"),
        ("o3", {"forget": "forget-nll"}, "'forget-nll' teaches the forget set"),
        ("uld", {"parameters": "lora-beside"}, "finish=subtract cannot join what parameters=lora-beside trains"),
        ("npo", {"preparation": "ood-detector"}, "makes detector, which no term of 'npo' reads"),
        ("o3", {"schedule": {"name": "fixed", "lr": 1e-3}}, "has no scale"),
        ("o3", {"level": 1.0}, "level"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name, overrides, said):
    with pytest.raises(InputError, match=said):
        build(name, overrides)


# ---- an encoder of its own


@pytest.fixture(scope="module")
def encoder_folder(topics, tmp_path_factory):
    """A small BERT with random weights that has seen nothing, and a word tokenizer."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = topics.target_model.copy().tokenizer
    folder = tmp_path_factory.mktemp("encoders") / "bert"
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_contrastive_entropy_by_hand():
    z, old = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    want = 0.0
    for layer in range(2):
        for i in range(3):
            p = torch.stack([z[layer, i] @ old[layer, j] for j in range(3)]).softmax(0)
            want += -sum(float(x) * float(x.log()) for x in p) / 3
    assert float(contrastive_entropy(list(z), list(old))) == pytest.approx(want, rel=1e-5)
    sharp = 50 * torch.eye(3)
    assert float(contrastive_entropy([sharp], [sharp])) == pytest.approx(0, abs=1e-4)
    assert float(contrastive_entropy([0 * sharp], [sharp])) == pytest.approx(float(torch.tensor(3.0).log()))


def test_the_encoder_is_tuned_and_itself_left_alone(topics, encoder_folder):
    encoder = open_encoder(encoder_folder)
    texts = [r.prompt for r in topics.facts["ships"]]
    before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    said: list[float] = []

    def tell(_done: int, _total: int, text: str) -> None:
        said.append(float(text.rpartition(" ")[2]))

    torch.manual_seed(0)
    made = train_encoder(encoder, texts, EncoderTraining(epochs=20, lr=1e-2, dropout=0.0), tell)
    assert len(said) == 60
    assert sum(said[-6:]) < sum(said[:6]) - 1
    assert all(torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items())
    assert {n.rpartition(".")[2] for n in made.names} == {"query", "key", "value"}
    assert len(made.names) == 9
    still = LowRank.fresh(encoder.model, encoder.adapted(), 8, 4.0)
    seen = [encoder.features(texts[:3], u, (0, 2), "mean") for u in (still, made)]
    assert not torch.allclose(*seen)
    alone = torch.cat([encoder.features([t], made, (0, 2), "mean") for t in texts[:3]])
    torch.testing.assert_close(seen[1], alone, rtol=1e-4, atol=1e-5)


def test_tokens_that_are_to_be_guessed(topics, encoder_folder):
    encoder = open_encoder(encoder_folder)
    given = encoder.tokens([r.prompt for r in topics.facts["ships"]] * 20 + ["Ships"])
    ids, real = given["input_ids"], given["attention_mask"].bool()
    changed, labels = masked(ids, real, encoder, torch.Generator().manual_seed(0))
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(changed[~chosen], ids[~chosen])
    special = torch.isin(ids, torch.tensor(encoder.tokenizer.all_special_ids))
    assert not (chosen & (special | ~real)).any()
    assert bool(chosen.any(1).all())
    share = chosen[:-1].float().sum() / (real & ~special)[:-1].float().sum()
    assert 0.13 < share < 0.22  # at least one of each short text
    assert 0.7 < (changed[chosen] == encoder.tokenizer.mask_token_id).float().mean() < 0.9


def test_a_request_with_an_encoder_and_another_one_after_it(topics, encoder_folder, tmp_path):
    settings = {"encoder": str(encoder_folder), "lr": 1e-3, "epochs": 2}
    adapter, model = forgotten(topics, "ships", preparation=settings, finish={"scale": 1.0, "rule": "hard"})
    assert model.encoder is not None
    assert model.requests[0].detector.encoder
    rest = topics.kept
    near = [of_prompts(adapter, records, "closeness")[0] for records in (topics.facts["ships"], rest)]
    assert roc_auc_score([1] * 24 + [0] * 48, torch.cat(near).numpy()) > 0.95
    assert exact(adapter, topics.facts["ships"]) < 0.15
    adapter, model = forgotten(topics, "herbs", model, preparation=settings)
    adapter.save(tmp_path / "model")
    assert (tmp_path / "model/encoder/model.safetensors").is_file()
    assert (tmp_path / "model/request-2/reading.safetensors").is_file()
    assert not [p for p in (tmp_path / "model").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    back = load(tmp_path / "model")
    assert back.fingerprint() == adapter.fingerprint()
    some = [*topics.facts["ships"][:4], *topics.facts["herbs"][:4], *rest[:4]]
    assert torch.equal(of_prompts(back, some), of_prompts(adapter, some))
    one = torch.cat([of_prompts(adapter, [r]) for r in some], 1)
    torch.testing.assert_close(of_prompts(adapter, some), one, rtol=1e-3, atol=1e-3)
    examples = [adapter.encode(r) for r in some]
    assert back.generate(back.model, examples, 5) == adapter.generate(model, examples, 5)
    third, model = forgotten(topics, "stars", model)  # without an encoder of its own, beside those that have one
    assert [r.detector.encoder for r in model.requests] == [True, True, False]
    assert of_prompts(third, some).shape == (3, 12)


def test_encoders_that_do_not_serve_are_refused(topics, encoder_folder, tmp_path):
    with pytest.raises(InputError, match="There is no model folder"):
        build("o3", {"encoder": str(tmp_path / "nowhere")}).preparation.check()
    topics.target().save(tmp_path / "llama")
    with pytest.raises(InputError, match=r"is no masked language model|lack"):
        open_encoder(tmp_path / "llama")
    encoder = open_encoder(encoder_folder)
    with pytest.raises(InputError, match="has no mask token"):
        TextEncoder(encoder.model, topics.target().tokenizer, "bare")
    few = encoder.model
    few.resize_token_embeddings(20)
    with pytest.raises(InputError, match=r"token ids up to \d+, but the encoder only 20 embeddings"):
        TextEncoder(few, encoder.tokenizer, "short")
    _, model = forgotten(topics, "ships", preparation={"encoder": str(encoder_folder), "epochs": 0.1})
    from transformers import BertForMaskedLM

    other = BertForMaskedLM.from_pretrained(encoder_folder)
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    open_encoder(encoder_folder).tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="has other weights than the one that an earlier request"):
        forgotten(topics, "herbs", model, preparation={"encoder": str(tmp_path / "other")})
    from expunge.adapters.words import word_tokenizer

    words = word_tokenizer(["other words"])
    words.add_special_tokens({"mask_token": "<mask>"})
    words.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="has another tokenizer than the one that an earlier request"):
        forgotten(topics, "herbs", model, preparation={"encoder": str(tmp_path / "other")})


def test_an_encoder_decoder_has_no_place_for_it(topics):
    tokenizer = topics.target().tokenizer
    from expunge.adapters.pairs import PairAdapter

    adapter = PairAdapter(preset("t5-tiny", tokenizer), tokenizer)
    examples = {s: [adapter.encode(r) for r in topics.facts["ships"]] for s in (Stream.FORGET, Stream.ALTERNATIVE)}
    with pytest.raises(InputError, match="does not offer"):
        train(adapter, build("o3", {"schedule": SCHEDULE, "finish": {"scale": 1.0}}), examples, QUIET)
