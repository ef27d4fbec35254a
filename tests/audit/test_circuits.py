"""Edge scores against patching by brute force, completeness of integrated gradients, counterparts, refused models."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.pairs import PairAdapter
from expunge.adapters.presets import build
from expunge.adapters.tokenise import DEFAULT_TEMPLATE
from expunge.adapters.words import word_tokenizer
from expunge.audit.circuits import CircuitSettings, circuits, edge_scores, largest
from expunge.audit.swaps import swaps
from expunge.audit.wiring import Wiring
from expunge.core.errors import InputError
from expunge.data.records import Record

RECORDS = [
    Record("a", "Anna Beck lives in Rome", prompt="Where does Anna Beck live", subject="Anna Beck"),
    Record("b", "in Oslo", prompt="Where does Tom live then", subject="Tom"),
    Record("c", "Ida Lund likes red", prompt="What does Ida Lund like", subject="Ida Lund"),
]
TEXTS = [t for r in RECORDS for t in (r.prompt, r.answer)]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([*TEXTS, DEFAULT_TEMPLATE])


def exact_norm(module, x):
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def adapter_of(preset: str, tokenizer) -> LanguageAdapter:
    """An untrained model in float64 whose weights are large enough for its parts to matter."""
    model = build(preset, tokenizer, seed=3).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # it would round to float32
            module.forward = partial(exact_norm, module)
    return LanguageAdapter(model, tokenizer)


# ---- patching by brute force: whole modules are run again, and nothing of the code under test is used


PLACES = {  # blocks, attention, its output matrix, what adds the feed-forward layer, both norms, the last norm, the embeddings
    "llama-tiny": ("model.layers", "self_attn", "o_proj", "mlp", ("input_layernorm", "post_attention_layernorm"), "model.norm"),
    "gpt2-tiny": ("transformer.h", "attn", "c_proj", "mlp", ("ln_1", "ln_2"), "transformer.ln_f"),
    "neox-tiny": ("gpt_neox.layers", "attention", "dense", "mlp", ("input_layernorm", "post_attention_layernorm"),
                  "gpt_neox.final_layer_norm"),
}  # fmt: skip


class Brute:
    """Runs a model from embeddings, with something added to what one target reads."""

    def __init__(self, preset: str, model) -> None:
        blocks, attention, out, feed, norms, last = PLACES[preset]
        self.model, self.blocks = model, list(model.get_submodule(blocks))
        self.attention = [getattr(b, attention) for b in self.blocks]
        self.out = [getattr(a, out) for a in self.attention]
        self.feed = [getattr(b, feed) for b in self.blocks]
        self.norms = [[getattr(b, n) for n in norms] for b in self.blocks]
        self.last = model.get_submodule(last)
        self.heads = model.config.num_attention_heads

    @torch.no_grad()
    def said(self, embeddings, targets) -> float:
        logits = self.model(inputs_embeds=embeddings, use_cache=False).logits[0]
        return float(sum(logits[at].log_softmax(-1)[token] for at, token in targets))

    @torch.no_grad()
    def added(self, embeddings) -> list[torch.Tensor]:
        """What each source adds, ``[T, D]``, up to constants."""
        seen: dict[str, torch.Tensor] = {}
        handles = [self.blocks[0].register_forward_pre_hook(lambda m, a, k: seen.update(start=(a or (k["hidden_states"],))[0]),
                                                            with_kwargs=True)]  # fmt: skip
        for i, (out, feed) in enumerate(zip(self.out, self.feed, strict=True)):
            handles.append(out.register_forward_pre_hook(lambda m, a, i=i: seen.update({f"z{i}": a[0]})))
            handles.append(feed.register_forward_hook(lambda m, a, o, i=i: seen.update({f"m{i}": o})))
        self.model(inputs_embeds=embeddings, use_cache=False)
        for handle in handles:
            handle.remove()
        parts = [seen["start"][0]]
        for i, out in enumerate(self.out):
            z = seen[f"z{i}"]
            width = z.shape[-1] // self.heads
            for h in range(self.heads):
                alone = torch.zeros_like(z)
                alone[..., h * width : (h + 1) * width] = z[..., h * width : (h + 1) * width]
                parts.append((out(alone) - out(torch.zeros_like(z)))[0])
            parts.append(seen[f"m{i}"][0])
        return parts

    @contextmanager
    def moved(self, target: str, by: torch.Tensor):
        """While open, ``by`` is added to what the target reads from the stream."""
        if target == "scores":
            module = self.last
        elif target.endswith("mlp"):
            module = self.norms[int(target.split(".", maxsplit=1)[0])][1]
        else:
            with self.moved_head(int(target.split(".", maxsplit=1)[0]), int(target.split("h")[1]), by):
                yield
            return
        handle = module.register_forward_pre_hook(lambda m, a: (a[0] + by,))
        yield
        handle.remove()

    @contextmanager
    def moved_head(self, layer: int, head: int, by: torch.Tensor):
        """Attention runs twice, on the stream as it is and as it is moved; of the second only one head's mixture is used."""
        attention, out, norm = self.attention[layer], self.out[layer], self.norms[layer][0]
        own, stream, mixed = attention.forward, [], []
        handles = [norm.register_forward_pre_hook(lambda m, a: stream.append(a[0])),
                   out.register_forward_pre_hook(lambda m, a: mixed.append(a[0]))]  # fmt: skip

        def forward(*args, **kwargs):
            first = own(*args, **kwargs)
            moved = norm.forward(stream[-1] + by)
            if "hidden_states" in kwargs:
                own(**{**kwargs, "hidden_states": moved})
            else:
                own(moved, *args[1:], **kwargs)
            plain, other = mixed[-2].clone(), mixed[-1]
            width = plain.shape[-1] // self.heads
            plain[..., head * width : (head + 1) * width] = other[..., head * width : (head + 1) * width]
            return (out(plain), *first[1:])

        attention.forward = forward
        yield
        del attention.forward
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("preset", list(PLACES))
def test_edge_scores_are_what_patching_by_brute_force_gives(preset: str, tokenizer) -> None:
    """Central differences of every edge at both points of m = 2, in float64."""
    adapter = adapter_of(preset, tokenizer)
    wiring = Wiring(adapter)
    [pair] = swaps(adapter, RECORDS[:1], RECORDS[1:])[0]
    found = edge_scores(adapter, wiring, [pair], CircuitSettings(steps=2))[0]
    brute, embed = Brute(preset, adapter.model), adapter.model.get_input_embeddings()
    ids, start = pair.example.data.ids, pair.example.data.start
    clean, corrupt = (embed(torch.tensor(np.asarray(x[:-1], dtype=np.int64)))[None].detach() for x in (ids, pair.other))
    targets = [(at - 1, int(ids[at])) for at, counts in zip(range(start, len(ids)), pair.counted, strict=True) if counts]
    change = [b - a for a, b in zip(brute.added(clean), brute.added(corrupt), strict=True)]
    graph, size, expected = wiring.graph, 1e-5, []
    for u, v in graph.edges.nonzero().tolist():
        slopes = []
        for j in (1, 2):
            at, said = corrupt + j / 2 * (clean - corrupt), []
            for sign in (1, -1):
                with brute.moved(graph.targets[v], sign * size * change[u]):
                    said.append(brute.said(at, targets))
            slopes.append((said[0] - said[1]) / (2 * size))
        expected.append(np.mean(slopes))
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_the_graph_has_an_edge_from_each_part_to_each_later_one(tokenizer) -> None:
    graph = Wiring(adapter_of("llama-tiny", tokenizer)).graph
    named = {(graph.sources[u], graph.targets[v]) for u, v in graph.edges.nonzero().tolist()}
    assert len(named) == graph.n_edges == 54
    assert ("embeddings", "0.h2") in named
    assert ("0.h1", "0.mlp") in named
    assert ("1.mlp", "scores") in named
    assert ("0.h1", "0.h2") not in named
    assert ("1.h0", "0.mlp") not in named
    beside = Wiring(adapter_of("neox-tiny", tokenizer)).graph  # attention and feed-forward layer read the same stream
    pairs = {(beside.sources[u], beside.targets[v]) for u, v in beside.edges.nonzero().tolist()}
    assert pairs == named - {(f"{i}.h{h}", f"{i}.mlp") for i in range(2) for h in range(4)}


@pytest.mark.parametrize("preset", ["llama-tiny", "gpt2-tiny", "qwen3-tiny", "opt-tiny"])
def test_edges_of_the_embeddings_add_up_to_the_change_of_what_is_said(preset: str, tokenizer) -> None:
    """Completeness of integrated gradients: the error of the sum falls as one over m."""
    adapter = adapter_of(preset, tokenizer)
    wiring = Wiring(adapter)
    pairs = [held[0] for held in swaps(adapter, RECORDS, RECORDS)]
    batch = adapter.collate([p.example for p in pairs])
    rows = wiring.graph.edges.nonzero()[:, 0] == 0
    said = []
    for other in (False, True):
        ids = batch.tensors["input_ids"].clone()
        for row, pair in enumerate(pairs):
            if other:
                ids[row, : len(pair.other)] = torch.from_numpy(pair.other)
        with torch.no_grad():
            logits = adapter.model(input_ids=ids, attention_mask=batch.tensors["attention_mask"]).logits
        own = logits[batch.owner, batch.tensors["predict"]].log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        counted = torch.from_numpy(np.concatenate([p.counted for p in pairs]))
        said.append(torch.zeros(3, dtype=torch.float64).index_add_(0, batch.owner, own * counted))
    errors = []
    for steps in (20, 160):
        sums = edge_scores(adapter, wiring, pairs, CircuitSettings(steps=steps))[:, rows].sum(1)
        errors.append((sums - (said[1] - said[0])).abs())
    assert (said[1] - said[0]).abs().min() > 0.01
    assert errors[1].sum() < 0.2 * errors[0].sum()
    assert (errors[1] < 0.02 * (said[1] - said[0]).abs().clamp(min=0.1)).all()


def test_batches_and_padding_change_nothing_and_the_model_is_as_it_was(tokenizer) -> None:
    adapter = adapter_of("llama-tiny", tokenizer)
    batch = adapter.collate([adapter.encode(RECORDS[0])])
    before = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses
    wiring = Wiring(adapter)
    pairs = [held[0] for held in swaps(adapter, RECORDS, RECORDS)]
    together = edge_scores(adapter, wiring, pairs, CircuitSettings())
    alone = torch.cat([edge_scores(adapter, wiring, [p], CircuitSettings()) for p in pairs])
    assert torch.allclose(together, alone, rtol=1e-9, atol=1e-12)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in adapter.model.modules())
    assert {m.num_key_value_groups for m in adapter.model.modules() if hasattr(m, "num_key_value_groups")} == {2}
    assert all(p.grad is None for p in adapter.model.parameters())
    assert torch.equal(adapter.forward(adapter.model, batch, frozenset({"losses"})).losses, before)


def test_a_circuit_is_the_edges_of_the_largest_scores_over_all_counterparts(tokenizer) -> None:
    adapter = adapter_of("llama-tiny", tokenizer)
    wiring, settings = Wiring(adapter), CircuitSettings(counterparts=2, edges=7)
    held = swaps(adapter, RECORDS, RECORDS, count=2)
    assert [len(h) for h in held] == [2, 2, 2]
    found = circuits(adapter, wiring, held, settings, batch_tokens=16)
    for row, pairs in zip(found, held, strict=True):
        total = edge_scores(adapter, wiring, pairs, settings).sum(0)
        assert row.sum() == 7
        assert total[torch.from_numpy(row)].abs().min() >= total[~torch.from_numpy(row)].abs().max()
    assert largest(torch.tensor([[1.0, -3.0, 2.0]]), CircuitSettings(edges=1)).tolist() == [[False, True, False]]
    assert CircuitSettings(share=0.01).size(20) == 1
    assert CircuitSettings(edges=50).size(20) == 19


# ---- counterparts


def test_a_counterpart_has_another_subject_in_the_same_places(tokenizer) -> None:
    adapter = adapter_of("llama-tiny", tokenizer)
    [first], [second], _ = swaps(adapter, RECORDS, RECORDS)
    assert first.how == "subject"
    assert tokenizer.decode(first.other) == tokenizer.decode(first.example.data.ids).replace("Anna Beck", "Ida Lund")
    start = first.example.data.start
    told = tokenizer.convert_ids_to_tokens([int(i) for i in first.example.data.ids[start:][first.counted]])
    assert "Rome" in told[2]
    assert not any("Anna" in t or "Beck" in t for t in told)
    assert len(second.other) == len(second.example.data.ids)  # no name of one word: the first word of another one fits
    assert (second.other != second.example.data.ids).sum() == 1
    assert second.counted.all()


def test_without_a_name_the_nearest_prompt_of_another_subject_serves(tokenizer) -> None:
    adapter = adapter_of("llama-tiny", tokenizer)
    numbered = [Record(r.id, r.answer, prompt=r.prompt, subject=f"p{i}") for i, r in enumerate(RECORDS)]
    own = Record("d", "in Oslo", prompt="Where does Anna live then", subject="p1")  # of the same subject: not taken
    held = swaps(adapter, [numbered[1]], [*numbered, own, Record("t", "Anna Beck lives in Rome", subject="p9")])
    assert held[0][0].how == "prompt"
    assert "Anna" in tokenizer.decode(held[0][0].other)
    assert "Where does Anna live then" in tokenizer.decode(held[0][0].other)  # cut to the places of one word
    assert swaps(adapter, [numbered[1]], [own]) == [[]]
    assert swaps(adapter, [Record("t", "Anna Beck lives in Rome")], numbered) == [[]]


# ---- models that are refused


SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "said", "more"),
    [
        ("gemma2", "do not add up", {"head_dim": 8}),
        ("granite", "do not add up", {"residual_multiplier": 0.3}),
        ("mixtral", "no model of dense blocks", {}),
        ("phi3", "cannot be told apart", {}),
        ("olmo2", "no norm before", {}),
        ("mamba", "cannot be told apart", {}),
    ],
)
def test_models_whose_heads_cannot_be_hooked_are_refused(kind: str, said: str, more: dict, tokenizer) -> None:
    ends = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ends, **SHAPE, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=said) as caught:
        Wiring(LanguageAdapter(model, tokenizer))
    assert "GPT-2" in caught.value.remedy


def test_encoder_decoders_and_adapters_of_peft_are_refused(tokenizer) -> None:
    import peft

    with pytest.raises(InputError, match="encoder-decoder"):
        Wiring(PairAdapter(build("t5-tiny", tokenizer), tokenizer))
    held = adapter_of("llama-tiny", tokenizer)
    wrapped = peft.get_peft_model(copy.deepcopy(held.model), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="peft"):
        Wiring(LanguageAdapter(wrapped, tokenizer))


def test_heads_dealt_wrongly_are_found_out(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX keeps query, key and value of a head together; dealt in thirds, heads would read one another's rows."""
    import re

    from expunge.audit import wiring

    monkeypatch.setattr(wiring, "_THIRDS", re.compile(r"query_key_value$"))
    with pytest.raises(InputError, match="one another's rows"):
        Wiring(adapter_of("neox-tiny", tokenizer))
