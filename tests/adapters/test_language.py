"""The adapter against transformers itself: losses, logits, features, generations, and its bookkeeping."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from expunge.adapters import ADAPTERS
from expunge.adapters.language import LanguageAdapter, reference_off
from expunge.adapters.presets import build
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.data.records import Record

from .conftest import sharpen

LOSSES = frozenset({"losses"})
LOGITS = frozenset({"logits"})


def batch_of(adapter, records):
    return adapter.collate([adapter.encode(r) for r in records])


def labels(batch):
    """Labels in the form that transformers takes: -100 where nothing is supervised."""
    out = torch.full_like(batch.tensors["input_ids"], -100)
    out[batch.owner, batch.tensors["predict"] + 1] = batch.targets
    return out


def test_is_registered():
    assert ADAPTERS.get("language") is LanguageAdapter
    assert Offer.LOSSES in LanguageAdapter.offers


def test_losses_and_gradients_equal_those_of_transformers(each, records):
    batch = batch_of(each, records)
    own = each.forward(each.model, batch, LOSSES).losses
    assert own.dtype == torch.float32
    assert own.shape == batch.targets.shape
    theirs = each.model(
        input_ids=batch.tensors["input_ids"], attention_mask=batch.tensors["attention_mask"], labels=labels(batch)
    ).loss
    torch.testing.assert_close(own.mean(), theirs, rtol=1e-5, atol=1e-5)
    parameters = list(each.model.parameters())
    right = torch.autograd.grad(theirs, parameters)
    largest = max(float(g.abs().max()) for g in right)
    for got, expected in zip(torch.autograd.grad(own.mean(), parameters), right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * largest)


def test_fused_and_unfused_agree(each, records):
    batch = batch_of(each, records)
    plain = LanguageAdapter(each.model, each.tokenizer, fused=False)
    torch.testing.assert_close(
        each.forward(each.model, batch, LOSSES).losses, plain.forward(each.model, batch, LOSSES).losses, rtol=1e-5, atol=1e-5
    )
    both = each.forward(each.model, batch, LOSSES | LOGITS)
    torch.testing.assert_close(both.losses, -both.logits.log_softmax(1).gather(1, batch.targets[:, None])[:, 0])


def test_logits_are_those_before_each_target(each, records):
    batch = batch_of(each, records)
    whole = each.model(input_ids=batch.tensors["input_ids"], attention_mask=batch.tensors["attention_mask"]).logits
    got = each.forward(each.model, batch, LOGITS).logits
    torch.testing.assert_close(got, whole[batch.owner, batch.tensors["predict"]], rtol=1e-4, atol=1e-4)
    blocks = list(each.logit_blocks(each.model, batch, rows=5))
    assert [a for a, _ in blocks] == list(range(0, len(batch.targets), 5))
    assert max(len(b) for _, b in blocks) == 5
    torch.testing.assert_close(torch.cat([b for _, b in blocks]), got, rtol=1e-4, atol=1e-4)
    assert not blocks[0][1].requires_grad


def test_padding_changes_nothing(each, records):
    """A known bug of the field: the number for an example depends on the batch that it is in."""
    batch = batch_of(each, records)
    together = each.forward(each.model, batch, LOSSES | LOGITS)
    for i, record in enumerate(records):
        alone = each.forward(each.model, batch_of(each, [record]), LOSSES | LOGITS)
        part = together.narrow(i, i + 1)
        torch.testing.assert_close(part.losses, alone.losses, rtol=1e-4, atol=1e-4)
        assert torch.equal(part.logits.argmax(1), alone.logits.argmax(1))


def test_features_are_the_residual_stream(each, records):
    batch = batch_of(each, records)
    layers = each.layers()
    assert len(layers) == 2
    want = frozenset(f"features:{name}" for name in layers)
    got = each.forward(each.model, batch, want | LOSSES)
    hidden = each.model(
        input_ids=batch.tensors["input_ids"], attention_mask=batch.tensors["attention_mask"], output_hidden_states=True
    ).hidden_states
    real = batch.tensors["attention_mask"].bool()
    # The last entry of transformers' tuple has the final norm in it, so only blocks before the last can be compared.
    torch.testing.assert_close(got.features(layers[0]), hidden[1][real], rtol=1e-4, atol=1e-4)
    alone = each.forward(each.model, batch, frozenset({f"features:{layers[0]}"}))
    torch.testing.assert_close(alone.features(layers[0]), got.features(layers[0]))
    assert got.features(layers[1]).shape == (sum(batch.token_counts), 64)


def test_features_only_stops_after_the_deepest_block(llama, records):
    batch = batch_of(llama, records)
    llama.forward(llama.model, batch, LOSSES)  # the trials of the first pass are over
    ran = []
    for i, block in enumerate(llama.model.model.layers):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    llama.forward(llama.model, batch, frozenset({f"features:{llama.layers()[0]}"}))
    assert ran == [0]
    assert llama.forward(llama.model, batch, LOSSES).losses.isfinite().all(), "the model is as it was"
    assert ran[-2:] == [0, 1]


def test_gradient_checkpointing_gives_the_same_gradients(llama, records):
    batch = batch_of(llama, records)
    name = llama.layers()[1]

    def gradient():
        out = llama.forward(llama.model, batch, LOSSES | {f"features:{name}"})
        return torch.autograd.grad(out.losses.mean() + out.features(name).square().mean(), llama.model.model.embed_tokens.weight)[
            0
        ]

    llama.model.train()
    expected = gradient()
    llama.model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), expected)
    alone = llama.forward(llama.model, batch, frozenset({f"features:{name}"})).features(name).square().mean()
    assert torch.autograd.grad(alone, llama.model.model.embed_tokens.weight)[0].abs().sum() > 0


def test_bookkeeping(llama, records):
    batch = batch_of(llama, records)
    examples = [llama.encode(r) for r in records]
    assert batch.counts == tuple(e.n_targets for e in examples)
    assert batch.token_counts == tuple(e.size for e in examples)
    assert batch.tensors["input_ids"].shape == (4, max(batch.token_counts))
    assert [int((batch.owner == i).sum()) for i in range(4)] == list(batch.counts)
    assert batch.position.tolist() == [p for c in batch.counts for p in range(c)]
    for i, example in enumerate(examples):
        assert batch.targets[batch.owner == i].tolist() == example.data.ids[example.data.start :].tolist()
        assert (
            batch.token_supervised[batch.token_owner == i].tolist() == [False] * example.data.start + [True] * example.n_targets
        )
    out = llama.forward(llama.model, batch, LOSSES | {f"features:{llama.layers()[0]}"})
    part = out.narrow(1, 3)
    assert part.batch_ids == ("r1", "r2")
    assert part.owner.min() == 0
    torch.testing.assert_close(part.per_example(part.losses), out.per_example(out.losses)[1:3])
    assert len(part.features(llama.layers()[0])) == sum(batch.token_counts[1:3])
    with pytest.raises(KeyError):
        _ = out.logits


def test_unknown_layer_and_output_name_the_nearest(llama, records):
    batch = batch_of(llama, records)
    with pytest.raises(InputError, match=r"no layer 'model.layers.9'.*model\.layers\."):
        llama.forward(llama.model, batch, frozenset({"features:model.layers.9"}))
    with pytest.raises(InputError, match="'losses'"):
        llama.forward(llama.model, batch, frozenset({"loss"}))
    with pytest.raises(InputError, match="at least one example"):
        llama.collate([])


def test_generation_is_the_stepwise_argmax(each, records):
    limit = 12
    each.model.generation_config.repetition_penalty = 5.0  # settings that came with a model must not change an audit
    each.model.generation_config.do_sample = True
    examples = [each.encode(r) for r in records]
    generations = each.generate(each.model, examples, limit)
    assert each.model.generation_config.repetition_penalty == 5.0
    for example, generation in zip(examples, generations, strict=True):
        ids = example.data.ids[: example.data.start].tolist()
        expected, ended = [], False
        while len(expected) < limit and not ended:
            best = int(each.model(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax())
            ended = best in each.end_ids
            expected += [] if ended else [best]
        assert generation.tokens == tuple(expected)
        assert generation.ended == ended
        assert generation.text == each.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert each.generate(each.model, examples, limit) == generations


def test_generation_ends_at_the_end_token_and_learns_the_answer(tokenizer, records):
    adapter = LanguageAdapter(build("llama-tiny", tokenizer, seed=0), tokenizer)
    batch = batch_of(adapter, records)
    optimizer = torch.optim.AdamW(adapter.model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        adapter.forward(adapter.model, batch, LOSSES).losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = adapter.generate(adapter.model, [adapter.encode(r) for r in records], 40)
    assert [g.text for g in found] == [r.answer for r in records]
    assert all(g.ended for g in found)
    assert [g.id for g in found] == [r.id for r in records]
    short = adapter.generate(adapter.model, [adapter.encode(records[1])], 3)[0]
    assert len(short.tokens) == 3
    assert not short.ended
    assert found[1].tokens[:3] == short.tokens


def test_generation_stays_within_the_context(tokenizer, records):
    adapter = LanguageAdapter(sharpen(build("gpt2-tiny", tokenizer, context=40)), tokenizer)
    adapter.end_ids = frozenset()
    examples = [adapter.encode(r) for r in records]
    found = adapter.generate(adapter.model, examples, 30)
    assert [len(g.tokens) for g in found] == [min(30, 40 - e.data.start) for e in examples]
    alone = [adapter.generate(adapter.model, [e], 30)[0] for e in examples]
    assert found == alone


def test_no_gradient_means_evaluation_mode_and_dropout_is_off(tokenizer, records):
    model = build("gpt2-tiny", tokenizer, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    adapter = LanguageAdapter(model, tokenizer)
    batch = batch_of(adapter, records)
    first, second = (adapter.forward(model, batch, LOSSES).losses for _ in range(2))
    assert torch.equal(first, second)
    assert model.config.resid_pdrop == 0.5

    noisy = build("gpt2-tiny", tokenizer, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    asked = LanguageAdapter(noisy, tokenizer, dropout=True)
    assert not torch.equal(*(asked.forward(noisy, batch, LOSSES).losses for _ in range(2)))
    with torch.no_grad():
        assert torch.equal(*(asked.forward(noisy, batch, LOSSES).losses for _ in range(2)))
    assert noisy.training
    torch.testing.assert_close(asked.copy().forward(noisy.eval(), batch, LOSSES).losses, first)


def test_ragged_batches_run_without_their_padding(each, records):
    batch = batch_of(each, records)
    names = each.layers()
    seen = []
    handle = each.model.get_submodule(names[0]).register_forward_hook(
        lambda _m, _i, o: seen.append(o if torch.is_tensor(o) else o[0])
    )
    want = LOSSES | {f"features:{names[1]}"}
    for asked in (LOSSES, want):
        out = each.forward(each.model, batch, asked)
    handle.remove()
    assert [tuple(s.shape[:2]) for s in seen[-2:]] == [(1, sum(batch.token_counts) - 4), (1, sum(batch.token_counts))]
    plain = LanguageAdapter(each.model, each.tokenizer, packed=False)
    parameters = list(each.model.parameters())

    def gradients(result):
        return torch.autograd.grad(
            result.losses.mean() + result.features(names[1]).square().mean(), parameters, allow_unused=True
        )

    expected = plain.forward(each.model, batch, want)
    torch.testing.assert_close(out.losses, expected.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.features(names[1]), expected.features(names[1]), rtol=1e-4, atol=1e-4)
    pairs = list(zip(gradients(out), gradients(expected), strict=True))
    largest = max(float(b.abs().max()) for _, b in pairs if b is not None)
    for a, b in pairs:
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * largest)
    assert each.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
        ("mistral", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "head_dim": 16, "intermediate_size": 64, "sliding_window": 4}),
        ("llama", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                   "attn_implementation": "eager"}),
    ],
)  # fmt: skip
def test_models_that_cannot_run_packed_are_padded(architecture, settings, tokenizer, records):
    """Positions from the mask, layers with a memory, windows, other attention functions: the result is the same as one by one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings
    )
    adapter = LanguageAdapter(sharpen(AutoModelForCausalLM.from_config(config).float().eval(), 3.0), tokenizer)
    together = adapter.forward(adapter.model, batch_of(adapter, records), LOSSES)
    for i, record in enumerate(records):
        alone = adapter.forward(adapter.model, batch_of(adapter, [record]), LOSSES).losses
        torch.testing.assert_close(together.narrow(i, i + 1).losses, alone, rtol=1e-3, atol=1e-3)
    assert len(adapter.layers()) == 2


def test_heads_that_are_post_processed_are_not_fused(tokenizer, records):
    """Gemma caps its scores after the head: the short cut must notice and step aside."""
    config = AutoConfig.for_model(
        "gemma2", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    adapter = LanguageAdapter(sharpen(AutoModelForCausalLM.from_config(config)), tokenizer)
    batch = batch_of(adapter, records)
    theirs = adapter.model(
        input_ids=batch.tensors["input_ids"], attention_mask=batch.tensors["attention_mask"], labels=labels(batch)
    ).loss
    own = adapter.forward(adapter.model, batch, LOSSES)
    torch.testing.assert_close(own.losses.mean(), theirs, rtol=1e-5, atol=1e-5)
    blocks = torch.cat([b for _, b in adapter.logit_blocks(adapter.model, batch, 4)])
    assert blocks.abs().max() <= 2
    torch.testing.assert_close(blocks, adapter.forward(adapter.model, batch, LOGITS).logits)


def test_lora_off_is_the_base(each, records):
    batch = batch_of(each, records)
    base_losses = each.forward(each.model, batch, LOSSES).losses.detach()
    names = each.layers()
    wrapped = peft.get_peft_model(each.model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapter = LanguageAdapter(wrapped, each.tokenizer)
    assert adapter.layers() == names
    changed = adapter.forward(wrapped, batch, LOSSES | {f"features:{names[0]}"})
    assert (changed.losses - base_losses).abs().max() > 1e-2
    changed.losses.mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in wrapped.parameters())
    with reference_off(wrapped), torch.no_grad():
        assert torch.equal(adapter.forward(wrapped, batch, LOSSES).losses, base_losses)
    torch.testing.assert_close(adapter.forward(wrapped, batch, LOSSES).losses, changed.losses)
    generated = adapter.generate(wrapped, [adapter.encode(r) for r in records], 3)
    assert len(generated) == len(records)


def test_reference_off_needs_an_adapter(llama):
    with pytest.raises(InputError, match="parameters=lora"), reference_off(llama.model):
        pass


def test_soft_prompts_shift_the_columns(llama, records):
    batch = batch_of(llama, records)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(copy.deepcopy(llama.model), config)
    own = llama.forward(wrapped, batch, LOSSES).losses
    mask, ids = batch.tensors["attention_mask"], batch.tensors["input_ids"]
    theirs = wrapped(input_ids=ids, attention_mask=mask, labels=labels(batch)).loss
    torch.testing.assert_close(own.mean(), theirs, rtol=1e-5, atol=1e-5)


def test_data_parallel_wrapper_gives_the_same_gradients(llama, records, tmp_path):
    batch = batch_of(llama, records)
    want = LOSSES | {f"features:{llama.layers()[0]}"}
    expected = torch.autograd.grad(llama.forward(llama.model, batch, LOSSES).losses.mean(), list(llama.model.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(llama.model)
        llama.forward(wrapped, batch, want).losses.mean().backward()
        for parameter, right in zip(llama.model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, right)
        with torch.no_grad():
            assert llama.generate(wrapped, [llama.encode(records[0])], 2) == llama.generate(
                llama.model, [llama.encode(records[0])], 2
            )
    finally:
        torch.distributed.destroy_process_group()


def test_bfloat16_models_have_float32_losses(tokenizer, records):
    adapter = LanguageAdapter(sharpen(build("llama-tiny", tokenizer)).to(torch.bfloat16), tokenizer)
    batch = batch_of(adapter, records)
    out = adapter.forward(adapter.model, batch, LOSSES)
    both = adapter.forward(adapter.model, batch, LOSSES | LOGITS)
    assert out.losses.dtype == both.logits.dtype == torch.float32
    torch.testing.assert_close(out.losses, both.losses, rtol=1e-4, atol=1e-4)
    assert len(set(out.losses.tolist())) == len(out.losses), "no ties from a coarse grid"


def test_a_copy_is_independent(llama, records):
    batch = batch_of(llama, records)
    before = llama.forward(llama.model, batch, LOSSES).losses.detach()
    other = llama.copy()
    with torch.no_grad():
        next(other.model.parameters()).zero_()
    torch.testing.assert_close(llama.forward(llama.model, batch, LOSSES).losses, before)
    assert other.fingerprint() != llama.fingerprint()


def test_refuses_what_is_no_causal_language_model(tokenizer):
    with pytest.raises(InputError, match="Linear is no causal language model"):
        LanguageAdapter(nn.Linear(2, 2), tokenizer)
    headless = build("llama-tiny", tokenizer).model
    with pytest.raises(InputError, match="no causal language model"):
        LanguageAdapter(headless, tokenizer)
    small = build("llama-tiny", tokenizer, vocab_size=10)
    with pytest.raises(InputError, match="only 10 embeddings"):
        LanguageAdapter(small, tokenizer)
    with pytest.raises(InputError, match=r"max_length must be an int in \[2, 64\]"):
        LanguageAdapter(build("llama-tiny", tokenizer, context=64), tokenizer, max_length=65)


def test_plain_text_is_supervised_from_the_second_token_on(llama):
    example = llama.encode(Record(id="t", answer="What did she write? Notes."))
    assert example.n_targets == example.size - 1
    assert not example.data.ends
    assert llama.tokenizer.decode(example.data.ids[1:]) == "What did she write? Notes."


def value_projections(adapter, batch):
    """What each block's value projection puts out, by the modules that its architecture has, ``[B, T, D]``."""
    model, found = adapter.model, []
    blocks = [model.get_submodule(n) for n in adapter.layers()]

    def note(take):
        return lambda _module, _inputs, out: found.append(take(out))

    def of_neox(out):
        heads = model.config.num_attention_heads
        return out.unflatten(-1, (heads, 3, -1))[..., 2, :].flatten(-2)

    handles = []
    for block in blocks:
        parts = {n.rpartition(".")[2]: m for n, m in block.named_modules()}
        if "v_proj" in parts:
            handles.append(parts["v_proj"].register_forward_hook(note(lambda out: out)))
        elif "c_attn" in parts:
            handles.append(parts["c_attn"].register_forward_hook(note(lambda out: out.chunk(3, -1)[2])))
        else:
            handles.append(parts["query_key_value"].register_forward_hook(note(of_neox)))
    mask = batch.tensors["attention_mask"]
    model(input_ids=batch.tensors["input_ids"], attention_mask=mask)
    for handle in handles:
        handle.remove()
    return found


def test_value_vectors_are_those_of_the_blocks_own_projections(each, records):
    batch = batch_of(each, records)
    want = frozenset(f"values:{n}" for n in each.layers())
    got = each.forward(each.model, batch, want | LOSSES)
    real = batch.tensors["attention_mask"].bool()
    for name, expected in zip(each.layers(), value_projections(each, batch), strict=True):
        torch.testing.assert_close(got.value_vectors(name), expected[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.losses, each.forward(each.model, batch, LOSSES).losses, rtol=1e-4, atol=1e-4)
    alone = each.forward(each.model, batch_of(each, records[1:2]), want)
    torch.testing.assert_close(
        alone.value_vectors(each.layers()[1]), got.narrow(1, 2).value_vectors(each.layers()[1]), rtol=1e-4, atol=1e-4
    )
    assert got.columns().tolist() == [p for n in batch.token_counts for p in range(n)]
    assert each.model.config._attn_implementation == "sdpa"


def test_attention_received_is_the_mean_over_heads_and_later_tokens(each, records):
    batch = batch_of(each, records)
    want = frozenset(f"received:{n}" for n in each.layers())
    got = each.forward(each.model, batch, want)
    each.model.set_attn_implementation("eager")
    shares = each.model(
        input_ids=batch.tensors["input_ids"], attention_mask=batch.tensors["attention_mask"], output_attentions=True
    ).attentions
    for name, layer in zip(each.layers(), shares, strict=True):
        expected = []
        for row, size in zip(layer, batch.token_counts, strict=True):
            for place in range(size):
                later = row[:, place + 1 : size, place]
                expected.append(float(later.detach().mean()) if later.numel() else 0.0)
        torch.testing.assert_close(got.received(name), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="'eager'"):
        each.forward(each.model, batch, want)


def test_value_vectors_have_gradients_with_and_without_checkpointing(llama, records):
    batch, weight = batch_of(llama, records), llama.model.model.layers[1].self_attn.v_proj.weight
    name = llama.layers()[1]

    def gradient():
        out = llama.forward(llama.model, batch, LOSSES | {f"values:{name}"})
        return torch.autograd.grad(out.losses.mean() + out.value_vectors(name).norm(dim=1).mean(), weight)[0]

    llama.model.train()
    expected = gradient()
    plain = torch.autograd.grad(llama.forward(llama.model, batch, LOSSES).losses.mean(), weight)[0]
    assert not torch.allclose(expected, plain)
    llama.model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), expected)
