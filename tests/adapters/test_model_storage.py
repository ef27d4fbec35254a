"""Loading, saving and identity, and one clear sentence for every way in which a model cannot be had."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from expunge.adapters.head import head_of
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load
from expunge.adapters.memory import training_memory
from expunge.adapters.presets import PRESETS, build
from expunge.core.errors import InputError

LOSSES = frozenset({"losses"})


def losses(adapter, records, model=None):
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        return adapter.forward(adapter.model if model is None else model, batch, LOSSES).losses


def test_round_trip(each, records, tmp_path):
    folder = tmp_path / "deep" / "model"
    each.save(folder)
    assert (folder / "model.safetensors").is_file()
    assert not list(folder.glob("*.bin"))
    again = load(folder)
    assert torch.equal(losses(again, records), losses(each, records))
    assert again.fingerprint() == each.fingerprint()
    straight = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Where was Ada born?", return_tensors="pt")["input_ids"]
    assert torch.equal(straight(input_ids=ids).logits, each.model(input_ids=ids).logits)


def test_saving_never_overwrites(llama, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    llama.save(folder)
    with pytest.raises(InputError, match="exists and is not empty"):
        llama.save(folder)


def test_saving_with_contradictory_generation_settings(llama, tmp_path):
    llama.model.generation_config.do_sample = False
    llama.model.generation_config.temperature = 0.6
    llama.save(tmp_path / "model")
    assert llama.model.generation_config.do_sample is False
    assert load(tmp_path / "model").model.generation_config.temperature == 0.6


def test_fingerprint_sees_every_change_and_nothing_else(llama, tokenizer):
    first = llama.fingerprint()
    assert first == llama.fingerprint()
    assert len(first) == 64
    tokenizer(["a", "b b"], padding=True)
    assert llama.fingerprint() == first, "padding that somebody asked for changes no ids of ours"
    assert LanguageAdapter(llama.model, tokenizer, template="Question: {prompt}\nAnswer:  {answer}").fingerprint() != first
    weight = llama.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        held = weight[3, 4].item()
        weight[3, 4] = held * (1 + 1e-6)
        assert llama.fingerprint() != first
        weight[3, 4] = held
    assert llama.fingerprint() == first
    llama.model.config.rms_norm_eps *= 2
    assert llama.fingerprint() != first


def test_peft_adapter(llama, records, tmp_path):
    llama.save(tmp_path / "base")
    base = load(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapter = LanguageAdapter(peft.get_peft_model(base.model, config), base.tokenizer)
    expected = losses(adapter, records)
    assert (expected - losses(llama, records)).abs().max() > 1e-2
    adapter.save(tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "lora" / "model.safetensors").exists()

    plain = load(tmp_path / "lora")
    assert not hasattr(plain.model, "peft_config")
    torch.testing.assert_close(losses(plain, records), expected, rtol=1e-4, atol=1e-4)
    apart = load(tmp_path / "lora", merge=False)
    assert torch.equal(losses(apart, records), expected)
    assert apart.fingerprint() == adapter.fingerprint()
    with torch.no_grad():
        next(p for n, p in apart.model.named_parameters() if "lora_B" in n).add_(1e-3)
    assert apart.fingerprint() != adapter.fingerprint()

    adapter.save(tmp_path / "merged", merge=True)
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(losses(merged, records), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(losses(adapter, records), expected), "merging leaves the adapter as it was"


def test_a_peft_folder_that_does_not_say_its_base(llama, tmp_path):
    wrapped = peft.get_peft_model(llama.model, peft.LoraConfig(r=2, target_modules="all-linear"))
    LanguageAdapter(wrapped, llama.tokenizer).save(tmp_path / "lora")
    with pytest.raises(InputError, match="does not name its base"):
        load(tmp_path / "lora")


def test_number_types(llama, tmp_path):
    llama.save(tmp_path / "m")
    assert load(tmp_path / "m").model.dtype == torch.float32
    half = load(tmp_path / "m", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    half.save(tmp_path / "half")
    assert load(tmp_path / "half", dtype="auto").model.dtype == torch.bfloat16
    assert half.fingerprint() != llama.fingerprint()
    with pytest.raises(InputError, match="float32, bfloat16, auto; got 'int8'"):
        load(tmp_path / "m", dtype="int8")


def test_settings_reach_the_adapter(llama, tmp_path):
    llama.save(tmp_path / "m")
    adapter = load(tmp_path / "m", max_length=20, template="{prompt} => {answer}")
    assert adapter.context == 20
    assert adapter.template == "{prompt} => {answer}"


def test_missing_folders_name_the_nearest(llama, tmp_path):
    llama.save(tmp_path / "llama-full")
    for wrong in (tmp_path / "llama-fall", tmp_path):
        with pytest.raises(InputError, match="llama-full"):
            load(wrong)
    with pytest.raises(InputError, match="is a file"):
        load(tmp_path / "llama-full" / "config.json")
    with pytest.raises(InputError, match="no model folder 'no such name'"):
        load("no such name")


def test_pickled_weights_are_refused(llama, tmp_path):
    llama.save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load(tmp_path / "m")
    torch.save(llama.model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled weights only \(pytorch_model.bin\).*convert"):
        load(tmp_path / "m")


def test_other_architectures_are_refused(tokenizer, tmp_path):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="no causal language model: its architecture is BertForMaskedLM"):
        load(tmp_path / "bert")


@pytest.mark.parametrize("content", ["{", json.dumps({"model_type": "no-such-type"})])
def test_broken_configuration(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="could not be loaded"):
        load(tmp_path)


def test_broken_weights(llama, tmp_path):
    llama.save(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not be loaded"):
        load(tmp_path / "m")


def test_incomplete_weights(llama, tmp_path):
    llama.save(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 of the model's tensors \(such as 'model.layers.1.mlp.up_proj.weight'\)"):
        load(tmp_path / "m")


def test_missing_tokenizer(llama, tmp_path):
    llama.model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="tokenizer"):
        load(tmp_path / "m")


def test_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"neither a local folder nor to be had from the hub.*give the folder"):
        load("no-such-organisation/no-such-model")


def test_presets(tokenizer):
    sizes = {}
    for name in PRESETS:
        first, again, other = (build(name, tokenizer, seed=s) for s in (0, 0, 1))
        pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b, _ in pairs)
        assert any(not torch.equal(a, c) for a, _, c in pairs)
        sizes[name] = sum(p.numel() for p in first.parameters())
    assert min(sizes.values()) < 200_000
    assert max(sizes.values()) > 8_000_000
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build("gpt2-tiny", tokenizer)
    assert torch.equal(torch.rand(1), expected), "building leaves the global random state alone"
    with pytest.raises(InputError, match="llama-tiny"):
        build("lama-tiny", tokenizer)


@pytest.mark.parametrize("preset", ["llama-small", "gpt2-small"])
def test_memory_estimate_is_right_within_a_factor_of_two(preset, tokenizer, records):
    adapter = LanguageAdapter(build(preset, tokenizer), tokenizer)
    batch = adapter.collate([adapter.encode(r) for r in records * 8])
    tokens = batch.tensors["input_ids"].numel()
    held = {p.data_ptr() for p in adapter.model.parameters()}
    saved = {}

    def note(tensor):
        if tensor.data_ptr() not in held:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = adapter.forward(adapter.model, batch, LOSSES)
    measured = sum(saved.values())
    assert out.losses.isfinite().all()
    weights = sum(p.numel() * 4 for p in adapter.model.parameters())
    estimated = training_memory(adapter, tokens, targets=len(batch.targets)) - 4 * weights
    assert measured / 2 < estimated < 2 * measured
    assert training_memory(adapter, tokens, lora=True) < training_memory(adapter, tokens)
    assert training_memory(adapter, 2 * tokens) > training_memory(adapter, tokens)
    assert training_memory(adapter, tokens, checkpointing=True) < training_memory(adapter, tokens)
    assert head_of(adapter.model) is adapter.model.lm_head


def test_an_adapter_on_a_model_that_an_adapter_was_added_to_keeps_both(tokenizer, tmp_path):
    """The second of two requests with LoRA names no file that holds its base, so it is written as a whole model."""
    LanguageAdapter(build("llama-tiny", tokenizer), tokenizer).save(tmp_path / "0")
    ids = torch.tensor([[5, 6, 7, 8]])
    for number in (1, 2):
        adapter = load(tmp_path / str(number - 1))
        torch.manual_seed(number)
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(adapter.model, options)
        adapter.save(tmp_path / str(number), wrapped)
        with torch.no_grad():
            said, again = wrapped(ids).logits, load(tmp_path / str(number)).model(ids).logits
        torch.testing.assert_close(said, again, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "1" / "adapter_config.json").is_file()
    assert (tmp_path / "2" / "model.safetensors").is_file()
