"""Models whose scores are combined: the formula, that two models are one in every respect, that they are saved and loaded."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from expunge.adapters.assistant import first_blocks
from expunge.adapters.combination import Combination
from expunge.adapters.combined import Combined, join
from expunge.adapters.decoding import AssistantScores
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.core.errors import InputError
from expunge.engine.parameters import Assistant
from expunge.pipeline.config import TextConfig
from expunge.pipeline.models import check_source, open_adapter

close = torch.testing.assert_close
WANT = frozenset({"logits", "losses"})


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def with_assistant(adapter: LanguageAdapter, combination: Combination, blocks: int = 1, seed: int = 3) -> LanguageAdapter:
    """The adapter's model with an assistant of its first blocks whose LoRA says something."""
    torch.manual_seed(seed)
    assistant = Assistant(blocks=blocks, rank=2).prepare(adapter.model, adapter.layers())
    with torch.no_grad():
        for name, parameter in assistant.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    made = adapter.sharing()
    made.model = Combined(adapter.model, assistant.eval(), combination, blocks=blocks)
    return made


def outputs(adapter: LanguageAdapter, model: nn.Module, records) -> dict[str, torch.Tensor]:
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        return adapter.forward(model, batch, WANT).values


# ---- the formula


def test_the_formula_by_hand():
    z1, z2 = rand(5, 7), rand(5, 7, seed=1)
    for a, b, centred in ((1.0, -0.8, False), (0.5, 2.0, True)):
        got = Combination(target_weight=a, weight=b, centred=centred).scores(z1, z2)
        for n in range(5):
            mean = sum(z2[n].tolist()) / 7 if centred else 0.0
            close(
                got[n],
                torch.tensor([a * x + b * (y - mean) for x, y in zip(z1[n].tolist(), z2[n].tolist(), strict=True)]).double(),
            )


def test_a_third_model_is_the_baseline():
    z1, z2, z3 = (rand(5, 7, seed=s) for s in range(3))
    plain = Combination(weight=0.7, against="baseline", centred=False)
    close(plain.scores(z1, z2, z3), z1 + 0.7 * (z2 - z3))
    assert torch.equal(plain.scores(z1, z2, z2), z1)
    close(
        Combination(weight=0.7, against="baseline").scores(z1, z2, z3 + 5),
        z1 + 0.7 * ((z2 - z2.mean(-1, True)) - (z3 - z3.mean(-1, True))),
    )
    for how, others in ((plain, (z2,)), (Combination(), (z2, z3))):
        with pytest.raises(InputError, match="third model"):
            how.scores(z1, *others)
    with pytest.raises(InputError, match="vocabularies differ"):
        plain.scores(z1, z2, z3[:, :6])


def test_generic_scores_of_whos_harry_potter():
    z1, z2 = rand(4, 6), rand(4, 6, seed=1)
    got = Combination(weight=-5, link="relu", against="target", centred=False).scores(z1, z2)
    want = [[v - 5 * max(r - v, 0.0) for v, r in zip(*rows, strict=True)] for rows in zip(z1.tolist(), z2.tolist(), strict=True)]
    close(got, torch.tensor(want, dtype=torch.float64))
    fell = z2 < z1
    assert torch.equal(got[fell], z1[fell]), "scores that fell under reinforcement must not be promoted"
    assert (got[~fell] < z1[~fell]).all()


@pytest.mark.parametrize("tau", [None, 0.01, 0.3, 0.9])
def test_weight_zero_is_the_target_and_a_uniform_assistant_says_nothing(tau):
    z1, flat = rand(6, 9), torch.full((6, 9), 4.2, dtype=torch.float64)
    assert torch.equal(Combination(weight=0.0, filter=tau).scores(z1, rand(6, 9, seed=1)), z1)
    for weight in (-0.8, -3.0, 2.0):
        close(Combination(weight=weight, filter=tau).scores(z1, flat).softmax(-1), z1.softmax(-1))
    raw = Combination(weight=-0.8, filter=tau, centred=False).scores(z1, flat).softmax(-1)
    changed = not torch.allclose(raw, z1.softmax(-1))
    assert changed == (tau is not None), "only a filter makes a constant of the assistant's scores matter"


@pytest.mark.parametrize("settings", [{}, {"filter": 0.3}, {"link": "relu", "against": "target"}, {"target_weight": 0.0}])
def test_what_is_excluded_already_stays_so(settings):
    z1, z2 = rand(4, 6), rand(4, 6, seed=1)
    whole = Combination(weight=0.5, **settings | {"filter": None}).scores(z1, z2)
    z1[:, 2] = -math.inf
    got = Combination(weight=0.5, **settings).scores(z1, z2)
    assert (got[:, 2] == -math.inf).all()
    assert torch.isfinite(got[:, [0, 1, 3, 4, 5]]).all()
    if settings.get("against") is None and "filter" not in settings:
        close(got[:, 3:], whole[:, 3:])


@pytest.mark.parametrize("tau", [0.02, 0.2, 0.6])
def test_the_filter_keeps_what_it_says(tau):
    z1, z2 = rand(40, 30), rand(40, 30, seed=1) * 20
    made = Combination(weight=-1.0, filter=tau)
    scored, generated = made.scores(z1, z2), made.scores(z1, z2, exclude=True)
    for n in range(40):
        p = z1[n].softmax(0).tolist()
        order = sorted(range(30), key=lambda v, p=p: -p[v])
        kept = {v for v in range(30) if p[v] >= tau * max(p) * (1 - 1e-12)} | set(order[: max(1, int(tau * 30))])
        for v in range(30):
            mean = z2[n].mean()
            close(scored[n, v], z1[n, v] - (z2[n, v] - mean) if v in kept else z1[n, v])
            assert (generated[n, v] == -math.inf) == (v not in kept)
        assert int(generated[n].argmax()) in kept


def test_scores_of_half_precision_are_combined_in_float32():
    z1, z2 = rand(3, 5).bfloat16(), rand(3, 5, seed=1).bfloat16()
    got = Combination(weight=-0.8).scores(z1, z2)
    assert got.dtype == torch.float32
    close(got, Combination(weight=-0.8).scores(z1.double(), z2.double()).float(), rtol=1e-5, atol=1e-5)


# ---- one model


def test_the_first_blocks_are_the_target_cut_short(each, records):
    layers = each.layers()
    batch = each.collate([each.encode(r) for r in records])
    small = first_blocks(each.model, 1)
    whole = first_blocks(each.model, len(layers))
    with torch.no_grad():
        close(each.forward(whole, batch, WANT).logits, each.forward(each.model, batch, WANT).logits)
        states = {f"features:{layers[0]}"}
        close(
            each.forward(small, batch, frozenset(states)).values[f"features:{layers[0]}"],
            each.forward(each.model, batch, frozenset(states)).values[f"features:{layers[0]}"],
        )
        assert not torch.allclose(each.forward(small, batch, WANT).logits, each.forward(each.model, batch, WANT).logits)
    own = {p.data_ptr() for p in each.model.parameters()}
    assert all(p.data_ptr() in own for p in small.parameters()), "weights were copied"
    assert len(each.layers()) == len(layers), "the target was cut"


def test_two_models_are_one(each, records):
    """Scores at the targets of a ragged batch are those of the formula on what each model says alone."""
    made = with_assistant(each, Combination(weight=-0.7, filter=0.05))
    both = [outputs(each, m, records)["logits"] for m in (each.model, made.model.assistant)]
    want = Combination(weight=-0.7, filter=0.05).scores(*both)
    got = outputs(made, made.model, records)
    close(got["logits"], want, rtol=1e-4, atol=1e-4)
    targets = made.collate([made.encode(r) for r in records]).targets
    close(got["losses"], nn.functional.cross_entropy(want, targets, reduction="none"), rtol=1e-4, atol=1e-4)
    one = torch.cat([outputs(made, made.model, [r])["logits"] for r in records])
    close(got["logits"], one, rtol=1e-4, atol=1e-4)
    blocks = [b for _, b in made.logit_blocks(made.model, made.collate([made.encode(r) for r in records]), rows=4)]
    assert max(map(len, blocks)) == 4
    close(torch.cat(blocks), got["logits"])
    assert [n.removeprefix("target.") for n in made.layers()] == each.layers()
    plain = each.model(input_ids=torch.arange(5)[None])["logits"]
    assert made.model(input_ids=torch.arange(5)[None])["logits"].shape == plain.shape


def test_a_model_that_ran_packed_before_does_not_pack_the_combined_one(llama, records):
    """The adapter remembers that its model can run without padding; the combined model has two sets of attention settings."""
    outputs(llama, llama.model, records)
    assert llama._runner._packs
    made = with_assistant(llama, Combination(weight=-0.7))
    got = outputs(made, made.model, records)["logits"]
    close(got, torch.cat([outputs(made, made.model, [r])["logits"] for r in records]), rtol=1e-4, atol=1e-4)


def by_hand(adapter: LanguageAdapter, combination: Combination, models, prompt, limit: int) -> list[int]:
    """Greedy generation that computes everything anew for each token."""
    ids = [int(i) for i in prompt]
    new: list[int] = []
    while len(new) < limit:
        with torch.no_grad():
            z1, z2 = (m(input_ids=torch.tensor([ids]))["logits"][0, -1] for m in models)
        token = int(combination.scores(z1, z2, exclude=True).argmax())
        if token in adapter.end_ids:
            break
        ids.append(token)
        new.append(token)
    return new


@pytest.mark.parametrize("tau", [None, 0.2])
def test_generation_is_greedy_in_the_combined_scores(each, records, tau):
    made = with_assistant(each, Combination(weight=-2.0, filter=tau))
    found = made.generate(made.model, [made.encode(r) for r in records], 8)
    target = each.generate(each.model, [each.encode(r) for r in records], 8)
    for record, generation in zip(records, found, strict=True):
        data = made.encode(record).data
        want = by_hand(made, made.model.combination, (each.model, made.model.assistant), data.ids[: data.start], 8)
        assert list(generation.tokens) == want
    assert [g.tokens for g in found] != [g.tokens for g in target], "the assistant has no say"
    made.model.combination = Combination(weight=0.0)
    assert made.generate(made.model, [made.encode(r) for r in records], 8) == target


def test_the_processor_serves_generate_on_its_own(llama, records):
    """With beams, whose rows are exchanged, and several sequences per prompt, as without a cache."""
    made = with_assistant(llama, Combination(weight=-1.5))
    ids = torch.tensor([llama.encode(records[0]).data.ids[:6].tolist()])
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {}):
        found = []
        for cached in (True, False):
            processor = AssistantScores(made.model.assistant, made.model.combination)
            processor._cached = cached
            found.append(
                llama.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, logits_processor=[processor], **options)
            )
        assert torch.equal(*found)
    ends = {"eos_token_id": made.model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)[0, -1].item()}
    longer = made.model.generate(input_ids=ids, min_new_tokens=5, max_new_tokens=5, do_sample=False, **ends)
    assert longer.shape[1] == ids.shape[1] + 5
    held = made.model.processor()
    for length in (3, 4, 5):
        held.following(ids[:, :length])
    assert held._past is not None
    assert held._past.get_seq_length() == 5


def test_models_of_different_number_types_are_joined(llama, records):
    other = llama.copy()
    other.model.bfloat16()
    made = join(llama, other, Combination(weight=-0.5))
    both = [outputs(a, a.model, records)["logits"] for a in (llama, other)]
    close(outputs(made, made.model, records)["logits"], Combination(weight=-0.5).scores(*both), rtol=3e-2, atol=3e-2)
    low = with_assistant(other, Combination(weight=-0.5))
    assert torch.isfinite(outputs(low, low.model, records)["logits"]).all()
    assert len(low.generate(low.model, [low.encode(records[0])], 4)) == 1


# ---- folders


def test_it_is_saved_and_loaded(each, records, tmp_path):
    made = with_assistant(each, Combination(weight=-0.7, filter=0.1))
    made.save(tmp_path / "model")
    names = {p.relative_to(tmp_path / "model").as_posix() for p in (tmp_path / "model").rglob("*") if p.is_file()}
    assert {"composite.json", "target/model.safetensors", "assistant/adapter_model.safetensors", "tokenizer.json"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl"))]
    with safe_open(tmp_path / "model/assistant/adapter_model.safetensors", "pt") as held:
        assert all("lora_" in k for k in held.keys())  # noqa: SIM118  (no mapping)
    back = load(tmp_path / "model")
    assert back.fingerprint() == made.fingerprint()
    assert torch.equal(outputs(back, back.model, records)["logits"], outputs(made, made.model, records)["logits"])
    examples = [made.encode(r) for r in records]
    assert back.generate(back.model, examples, 6) == made.generate(made.model, examples, 6)
    assert all(p.requires_grad for p in back.model.parameters())
    check_source(str(tmp_path / "model"))
    assert open_adapter(str(tmp_path / "model"), TextConfig(dtype="bfloat16")).model.dtype == torch.bfloat16


def test_an_assistant_that_is_a_model_of_its_own(llama, tokenizer, records, tmp_path):
    other = LanguageAdapter(build("gpt2-tiny", tokenizer, seed=5, context=64), tokenizer)
    made = join(llama, other, Combination(weight=0.5))
    both = [outputs(llama, m, records)["logits"] for m in (llama.model, other.model)]
    close(outputs(made, made.model, records)["logits"], Combination(weight=0.5).scores(*both), rtol=1e-4, atol=1e-4)
    made.save(tmp_path / "model")
    assert (tmp_path / "model/assistant/model.safetensors").is_file()
    back = load(tmp_path / "model")
    assert torch.equal(outputs(back, back.model, records)["logits"], outputs(made, made.model, records)["logits"])


def test_a_target_can_be_named_instead_of_kept(llama, records, tmp_path):
    llama.save(tmp_path / "target")
    made = with_assistant(load(tmp_path / "target"), Combination(weight=-1.0))
    made.model.keep_target = False
    made.save(tmp_path / "model")
    assert not (tmp_path / "model/target").exists()
    assert sum(p.stat().st_size for p in (tmp_path / "model").rglob("*.safetensors")) < 0.5 * (
        tmp_path / "target/model.safetensors"
    ).stat().st_size  # fmt: skip
    back = load(tmp_path / "model")
    assert torch.equal(outputs(back, back.model, records)["logits"], outputs(made, made.model, records)["logits"])
    assert not back.model.keep_target
    with torch.no_grad():
        next(llama.model.parameters()).add_(0.1)
    for path in (tmp_path / "target").iterdir():
        path.unlink()
    llama.save(tmp_path / "target")
    with pytest.raises(InputError, match="has other weights than"):
        load(tmp_path / "model")
    with pytest.raises(InputError, match="has no name"):
        Combined(llama.model, llama.model, Combination(), keep_target=False)


def test_identity_and_copies(llama, records):
    made = with_assistant(llama, Combination(weight=-0.7))
    first, held = made.fingerprint(), outputs(made, made.model, records)["logits"]
    assert first != llama.fingerprint()
    twin = made.copy()
    assert twin.fingerprint() == first
    twin.model.combination = Combination(weight=-0.8)
    assert twin.fingerprint() != first
    with torch.no_grad():
        for name, parameter in twin.model.assistant.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    assert made.fingerprint() == first
    assert torch.equal(outputs(made, made.model, records)["logits"], held)
    assert not torch.allclose(outputs(twin, twin.model, records)["logits"], held)
    size = sum(p.numel() for p in llama.model.parameters())
    assert size < sum(p.numel() for p in made.model.parameters()) < 1.3 * size, "the assistant has the target's weights"


def test_what_does_not_fit_is_refused(llama, tmp_path):
    few = word_tokenizer(["only some words"])
    other = LanguageAdapter(build("llama-tiny", few, seed=0, context=64), few)
    with pytest.raises(InputError, match="different tokenizers"):
        join(llama, other, Combination())
    with pytest.raises(InputError, match="their vocabularies differ"):
        Combined(llama.model, other.model, Combination())
    with pytest.raises(InputError, match="their vocabularies differ"):
        Combination().scores(rand(2, 5), rand(2, 6))
    with pytest.raises(InputError, match="An assistant of 9 blocks was asked for; the model has 2"):
        Assistant(blocks=9).prepare(llama.model, llama.layers())
    made = with_assistant(llama, Combination())
    with pytest.raises(InputError, match="no plain model"):
        Combined(made.model, llama.model, Combination())
    with pytest.raises(InputError, match="cannot be cut from a PeftModel"):
        first_blocks(made.model.assistant, 1)
    with pytest.raises(InputError, match="filter"):
        Combination(filter=1.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: {"format": 1}, "does not describe a model"),
        (lambda held: {**held, "format": 2}, "is of version 2"),
        (lambda held: {**held, "kind": "combine"}, "no kind of composite model 'combine'"),
        (lambda held: {k: v for k, v in held.items() if k != "combination"}, "is damaged"),
    ],
)
def test_a_damaged_folder_is_refused(llama, records, tmp_path, change, said):
    made = with_assistant(llama, Combination())
    made.save(tmp_path / "model")
    path = tmp_path / "model/composite.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=said):
        load(tmp_path / "model")
    path.write_text("{")
    with pytest.raises(InputError, match="does not describe a model"):
        load(tmp_path / "model")


def test_missing_parts_are_refused(llama, tmp_path):
    with_assistant(llama, Combination()).save(tmp_path / "model")
    (tmp_path / "model/assistant/adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load(tmp_path / "model")
    with pytest.raises(InputError, match="holds no weights"):
        check_source(str(tmp_path / "model"))
