"""Projections as a part of a model: in every pass, in copies, in files, under adapters and in other architectures."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file, save_file

import expunge
from expunge.adapters.combination import Combination
from expunge.adapters.combined import Combined
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load, wrap
from expunge.adapters.presets import build as preset
from expunge.adapters.projection import Projection, install, installed, orthonormal, settle, without
from expunge.adapters.words import word_tokenizer
from expunge.audit.attacks.quantise import quantised
from expunge.core.errors import InputError
from expunge.data.records import Record

RECORDS = [Record(f"r{i}", f"amber birch {w}", f"What is {w} ?") for i, w in enumerate(("cedar", "delta", "ember", "flint"))]


def draw(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def fresh(**changes) -> LanguageAdapter:
    tokenizer = word_tokenizer([f"{r.prompt} {r.answer}" for r in RECORDS])
    return LanguageAdapter(preset("llama-tiny", tokenizer, seed=0, num_hidden_layers=3, **changes), tokenizer)


def projected(rank: int = 5, name: str = "model.layers.1") -> LanguageAdapter:
    adapter = fresh()
    install(adapter.model, name, Projection(orthonormal(draw(rank, 64))))
    return adapter


def states(adapter: LanguageAdapter, layer: str = "model.layers.1") -> torch.Tensor:
    batch = adapter.collate([adapter.encode(r) for r in RECORDS])
    with torch.no_grad():
        return adapter.forward(adapter.model, batch, frozenset({f"features:{layer}"})).features(layer)


def logits(adapter: LanguageAdapter) -> torch.Tensor:
    batch = adapter.collate([adapter.encode(r) for r in RECORDS])
    with torch.no_grad():
        return adapter.forward(adapter.model, batch, frozenset({"logits"})).logits


def test_the_directions_are_gone_and_nothing_else() -> None:
    """The card's (i) and (ii)."""
    basis = orthonormal(draw(5, 64))
    torch.testing.assert_close(basis @ basis.T, torch.eye(5), atol=1e-5, rtol=0)
    h = draw(30, 64, seed=1)
    gone = without(h, basis)
    assert (gone @ basis.T).abs().max() < 1e-5
    torch.testing.assert_close(without(gone, basis), gone, atol=1e-5, rtol=0)
    torch.testing.assert_close(h - gone, h @ basis.T @ basis, atol=1e-5, rtol=1e-5)
    assert without(h, orthonormal(draw(64, 64))).abs().max() < 1e-4
    # the span of earlier rows comes first, whatever is added
    both = orthonormal(torch.cat([basis, draw(3, 64, seed=2)]))
    torch.testing.assert_close(both[:5].T @ both[:5], basis.T @ basis, atol=1e-5, rtol=0)


def test_the_gradient_goes_through_the_decomposition() -> None:
    held, rows, h = (draw(n, 9, seed=n).double() for n in (2, 3, 4))

    def loss(w: torch.Tensor) -> torch.Tensor:
        return without(h, orthonormal(torch.cat([held, w]))).pow(3).sum()

    assert torch.autograd.gradcheck(loss, (rows.requires_grad_(True),))


def test_it_acts_in_the_model_and_in_every_step_of_a_generation() -> None:
    plain, adapter = fresh(), projected()
    basis = installed(adapter.model)["model.layers.1"].basis
    expected = without(states(plain), basis)
    torch.testing.assert_close(states(adapter), expected, atol=1e-5, rtol=1e-4)
    assert (states(adapter) @ basis.T).abs().max() < 1e-5 < 0.1 < (states(plain) @ basis.T).abs().max()
    assert not torch.allclose(logits(adapter), logits(plain), atol=1e-3)
    with torch.no_grad():
        handed_out = adapter.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    assert (handed_out[2] @ basis.T).abs().max() < 1e-5
    adapter.model.get_submodule("model.layers.1").expunge_projection = Projection(basis[:0])
    torch.testing.assert_close(logits(adapter), logits(plain))  # of no directions nothing is taken
    adapter = projected()
    ids = torch.tensor([[5, 6, 7]])
    seen = []
    handle = adapter.model.model.layers[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        made = adapter.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=None)
        handle.remove()
        assert [s.shape[1] for s in seen] == [3, 1, 1, 1, 1, 1]  # one token at a time, with a cache
        assert all((s @ basis.T).abs().max() < 1e-5 for s in seen)
        again = ids
        for _ in range(6):
            again = torch.cat([again, adapter.model(again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, again)


def test_a_copy_has_its_own_and_training_leaves_them(tmp_path: Path) -> None:
    adapter = projected()
    other = adapter.copy()
    assert other.fingerprint() == adapter.fingerprint() != fresh().fingerprint()
    before = logits(adapter)
    other.model.get_submodule("model.layers.1").expunge_projection.basis.copy_(orthonormal(draw(5, 64, seed=9)))
    assert torch.equal(logits(adapter), before)
    assert not torch.allclose(logits(other), before, atol=1e-3)
    assert other.fingerprint() != adapter.fingerprint()
    assert not [n for n, _ in adapter.model.named_parameters() if "projection" in n]
    rounded = quantised(adapter, 4)
    basis = installed(adapter.model)["model.layers.1"].basis
    assert torch.equal(installed(rounded.model)["model.layers.1"].basis, basis)
    assert (states(rounded) @ basis.T).abs().max() < 1e-5
    other.model.save_pretrained(tmp_path)  # a copy saves itself, not what it was copied from
    found = load_file(tmp_path / "projections.safetensors")["model.layers.1"]
    assert torch.equal(found, installed(other.model)["model.layers.1"].basis)


def test_half_precision_keeps_exact_directions() -> None:
    adapter = projected()
    basis = installed(adapter.model)["model.layers.1"].basis.clone()
    adapter.model.to(torch.bfloat16)
    held = installed(adapter.model)["model.layers.1"].basis
    assert held.dtype == torch.float32
    assert torch.equal(held, basis)
    found = states(adapter)
    assert found.dtype == torch.bfloat16
    assert (found.float() @ basis.T).abs().max() < 0.02 * found.float().norm(dim=1).max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = installed(projected().model)["model.layers.1"](draw(4, 64))
    assert (exact @ basis.T).abs().max() < 1e-5


def test_learnt_rows_are_settled_into_the_basis() -> None:
    held, rows = orthonormal(draw(2, 64)), draw(3, 64, seed=4)
    projection = Projection(held, rows)
    h = draw(7, 64, seed=5)
    before = projection(h)
    assert [n for n, _ in projection.named_parameters()] == ["rows"]
    adapter = fresh()
    install(adapter.model, "model.layers.0", projection)
    settle(adapter.model)
    assert not list(projection.parameters())
    assert projection.basis.shape == (5, 64)
    torch.testing.assert_close(projection.basis @ projection.basis.T, torch.eye(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(projection(h), before, atol=1e-5, rtol=1e-5)


# ---- files


def documented(folder: Path):
    """The function of the page on projections, run from its text."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "howto" / "projections.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    scope: dict = {}
    exec(code, scope)
    return scope["load_projected"](str(folder))


def test_a_saved_folder_is_the_model_and_no_other_library_takes_it_for_the_target(tmp_path: Path) -> None:
    adapter = projected()
    adapter.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir() if "token" not in p.name) == [
        "composite.json", "projections.safetensors", "target",
    ]  # fmt: skip
    back = load(tmp_path / "model")
    assert back.fingerprint() == adapter.fingerprint()
    assert torch.equal(logits(back), logits(adapter))
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    target = wrap(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "target"), adapter.tokenizer)
    assert torch.equal(logits(target), logits(fresh()))
    page = wrap(documented(tmp_path / "model"), adapter.tokenizer)
    torch.testing.assert_close(logits(page), logits(adapter))
    # whoever saves it, saves the same
    back.model.save_pretrained(tmp_path / "again")
    back.tokenizer.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").fingerprint() == adapter.fingerprint()
    half = load(tmp_path / "model", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert installed(half.model)["model.layers.1"].basis.dtype == torch.float32


def test_a_second_projection_is_saved_beside_the_first(tmp_path: Path) -> None:
    adapter = projected()
    adapter.save(tmp_path / "one")
    second = load(tmp_path / "one")
    install(second.model, "model.layers.0", Projection(orthonormal(draw(3, 64, seed=8))))
    held = installed(second.model)["model.layers.1"]
    install(second.model, "model.layers.1", Projection(held.basis, draw(2, 64, seed=9)))
    second.save(tmp_path / "two")  # what is still being learnt is written as it is now
    settle(second.model)
    found = load(tmp_path / "two")
    assert {n: tuple(p.basis.shape) for n, p in installed(found.model).items()} == {
        "model.layers.0": (3, 64), "model.layers.1": (7, 64),
    }  # fmt: skip
    torch.testing.assert_close(logits(found), logits(second))


def lora(adapter: LanguageAdapter):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(adapter.model, peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    made = adapter.sharing()
    made.model = model
    return made


def test_an_adapter_on_it_cannot_lose_it(tmp_path: Path) -> None:
    unsaved = lora(projected())
    expected = logits(unsaved)
    assert not torch.allclose(expected, logits(projected()), atol=1e-3)
    unsaved.save(tmp_path / "whole")  # no file holds the base: adapter and weights are saved as one
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(load(tmp_path / "whole")), expected, atol=1e-5, rtol=1e-4)
    unsaved.model.save_pretrained(tmp_path / "alone")  # by peft itself: without a base it is of no use, and says so
    unsaved.tokenizer.save_pretrained(tmp_path / "alone")
    with pytest.raises(InputError, match="does not name its base"):
        load(tmp_path / "alone")
    projected().save(tmp_path / "base")
    saved = lora(load(tmp_path / "base"))
    expected = logits(saved)
    saved.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    back = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(back), expected, atol=1e-5, rtol=1e-4)
    assert installed(back.model)
    apart = load(tmp_path / "adapter", merge=False)
    torch.testing.assert_close(logits(apart), expected, atol=1e-5, rtol=1e-4)


def test_an_assistant_beside_it_keeps_it(tmp_path: Path) -> None:
    adapter = projected()
    adapter.model = Combined(adapter.model, fresh().model, Combination(weight=-0.5))
    expected = logits(adapter)
    adapter.save(tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.fingerprint() == adapter.fingerprint()
    torch.testing.assert_close(logits(back), expected)


def test_merging_says_what_stands_in_the_way() -> None:
    with pytest.raises(
        InputError, match=r"Of model 1 and its target one takes directions out of its states .*after 'model.layers.1'"
    ):
        expunge.merge_models(fresh().model, [projected().model, fresh().model])
    # Where all have the same, weights are merged and it stays.
    target = projected()
    models = []
    for sign in (1, -1):
        one = target.copy()
        with torch.no_grad():
            one.model.model.layers[0].mlp.down_proj.weight.mul_(1 + 0.5 * sign)
        models.append(one.model)
    made = target.sharing()
    made.model = expunge.merge_models(target.model, models)
    torch.testing.assert_close(logits(made), logits(target), atol=1e-5, rtol=1e-4)
    assert installed(made.model)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    projected().save(tmp_path / "good")

    def spoilt(name: str, basis: torch.Tensor | None = None, block: str = "model.layers.1") -> Path:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        if basis is None:
            (folder / "projections.safetensors").unlink()
        else:
            save_file({block: basis}, folder / "projections.safetensors")
        return folder

    with pytest.raises(InputError, match=r"is missing or does not hold the projections.*\n?.*Restore the folder from a copy"):
        load(spoilt("missing"))
    with pytest.raises(InputError, match="does not hold the projections"):
        load(spoilt("fewer", orthonormal(draw(4, 64))))
    with pytest.raises(InputError, match="does not hold the projections"):
        load(spoilt("elsewhere", orthonormal(draw(5, 64)), "model.layers.0"))
    for name, basis in (("narrow", orthonormal(draw(5, 32))), ("long", 1.1 * orthonormal(draw(5, 64)))):
        with pytest.raises(InputError, match="must hold orthonormal rows of 64 numbers"):
            load(spoilt(name, basis))
    (tmp_path / "good" / "projections.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="does not hold the projections"):
        load(tmp_path / "good")


def test_weights_that_were_saved_around_it_are_refused(tmp_path: Path) -> None:
    adapter = projected()
    type(adapter.model).save_pretrained(adapter.model, tmp_path)
    adapter.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"hold directions that are taken out.* would be lost"):
        load(tmp_path)


def test_a_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"has no block 'model.layers.9'"):
        install(fresh().model, "model.layers.9", Projection(orthonormal(draw(2, 64))))


def family(name: str):
    tokenizer = word_tokenizer([f"{r.prompt} {r.answer}" for r in RECORDS])
    common = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=64, **common)
        return wrap(transformers.GPT2LMHeadModel(config), tokenizer)
    if name == "t5":
        config = transformers.T5Config(
            d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2, decoder_start_token_id=0, pad_token_id=0, **common
        )
        return wrap(transformers.T5ForConditionalGeneration(config), tokenizer)
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, **common
    )
    return wrap(transformers.GPTNeoXForCausalLM(config), tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "t5"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    adapter = family(name)
    plain = copy.deepcopy(adapter.model)
    block = adapter.layers()[1]
    before = states(adapter, block)
    basis = orthonormal(draw(3, 32))
    install(adapter.model, block, Projection(basis))
    torch.testing.assert_close(states(adapter, block), without(before, basis), atol=1e-5, rtol=1e-4)
    changed = logits(adapter)
    adapter.model, held = plain, adapter.model
    assert not torch.allclose(changed, logits(adapter), atol=1e-4)
    adapter.model = held
    adapter.save(tmp_path / "model")
    back = load(tmp_path / "model")
    torch.testing.assert_close(logits(back), changed)
    assert adapter.generate(back.model, [adapter.encode(RECORDS[0])], 4) == adapter.generate(
        held, [adapter.encode(RECORDS[0])], 4
    )
