"""Code and instruction models of many families: built from a tiny configuration, saved, loaded, unlearned from, asked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.data.records import Record
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.methods.recipe import build

CODE = [
    Record("key", "def token():\n    return 'a1b2'", "Write the function token."),
    Record("add", "def add(a, b):\n    return a + b", "Write the function add."),
    Record("neg", "def neg(a):\n    return -a", "Write the function neg."),
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = [r.prompt + " " + r.answer for r in CODE] + ["Question: Answer: <|user|> <|assistant|>"]

WIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
GATED = {**WIDE, "intermediate_size": 64, "num_key_value_heads": 2}
OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {**WIDE, "intermediate_size": 64},
    "phi": {**WIDE, "intermediate_size": 64},
    "phi3": GATED,
    "qwen2": GATED,
    "mistral": {**GATED, "sliding_window": 64},
    "opt": {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma": {**GATED, "head_dim": 8},
    "gemma2": {**GATED, "head_dim": 8, "sliding_window": 64},
    "starcoder2": {**GATED, "sliding_window": None},
    "codegen": {**OLD, "n_inner": 64, "rotary_dim": 4},
    "gptj": {**OLD, "n_inner": 64, "rotary_dim": 4},
    "gpt_bigcode": {**OLD, "n_inner": 64},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": False},
}
INSTRUCTED = ("phi3", "qwen2", "mistral", "gemma")
"""Families that are asked through a chat template."""


def made(family: str, folder: Path) -> LanguageAdapter:
    """A random model with its tokenizer, saved in the layout of the hub and loaded from there."""
    words = word_tokenizer(TEXTS)
    if family in INSTRUCTED:
        words.chat_template = CHAT
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=len(words), **special, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # random models are all but uniform otherwise
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return load(folder)


def step(adapter: LanguageAdapter, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One step of a method; weights before and after."""
    before = copy.deepcopy(adapter.model.state_dict())
    examples = {Stream.FORGET: [adapter.encode(CODE[0])], Stream.RETAIN: [adapter.encode(r) for r in CODE[1:]]}
    recipe = build(name, {"schedule": {"name": "fixed", "lr": 1e-3, "steps": 1, "batch": 2, "warmup": 0}})
    outcome = train(adapter, recipe, examples, Engine(checkpoint_every=0))
    assert outcome.steps == 1
    assert outcome.reason == "schedule"
    return before, outcome.model.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_unlearns_and_answers(family, tmp_path) -> None:
    adapter = made(family, tmp_path / "model")
    assert len(adapter.layers()) == 3
    example = adapter.encode(CODE[0])
    batch = adapter.collate([example, adapter.encode(CODE[1])])
    with torch.no_grad():
        ids = torch.from_numpy(example.data.ids.astype("int64"))
        logits = adapter.model(input_ids=ids[None]).logits[0, example.data.start - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(logits.float(), ids[example.data.start :], reduction="none")
        found = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses[: example.n_targets]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    said = adapter.generate(adapter.model, [example], 5)[0]
    with torch.no_grad():
        prompt = ids[: example.data.start][None]
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        own = adapter.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
    assert list(said.tokens) == [t for t in own.tolist() if t not in adapter.end_ids]
    before, after = step(adapter, "npo")
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert len(moved) > 6
    with torch.no_grad():
        now = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses[: example.n_targets]
    assert now.mean() > found.mean(), "the step does not forget"
    before, after = step(adapter, "rmu")
    blocks = tuple(n + "." for n in adapter.layers()[:2])
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert moved
    assert all(k.startswith(blocks) for k in moved), moved


def test_instructions_go_through_the_chat_template(tmp_path) -> None:
    adapter = made("qwen2", tmp_path / "model")
    text = "".join(adapter.tokenizer.decode(adapter.encode(CODE[1]).data.ids.tolist()).split())
    assert text == "<|user|>Writethefunctionadd.</s><|assistant|>defadd(a,b):returna+b</s>"
