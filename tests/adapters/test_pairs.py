"""Encoder-decoders: losses, features and answers are those of transformers itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load, wrap
from expunge.adapters.pairs import PairAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.core.errors import InputError
from expunge.data.records import Record

RECORDS = [
    Record("a", "Ada lives in Arles.", "Where does Ada live?"),
    Record("b", "He is a baker and lives in Bath, as all of them do.", "What is Ben?"),
    Record("c", "Cork.", "In which town, if in any at all, was Cleo said to live?"),
    Record("d", " and so on.", "It begins here", verbatim=True),
]


def tokenizer(begin: str = "") -> Any:
    """Words, with an end token after each text as T5 has it (and with a begin token as BART has it)."""
    made = word_tokenizer([r.prompt + " " + r.answer for r in RECORDS])
    ids = [(t, made.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A </s>".strip(), pair=f"{begin} $A $B </s>".strip(), special_tokens=ids
    )
    return made


def config(kind: str, size: int) -> Any:
    if kind == "t5":
        return T5Config(
            vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=2, num_heads=4, pad_token_id=0,
            eos_token_id=2, decoder_start_token_id=0,
        )  # fmt: skip
    return BartConfig(
        vocab_size=size, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["t5", "bart"])
def each(request: pytest.FixtureRequest) -> PairAdapter:
    words = tokenizer("<s>" if request.param == "bart" else "")
    torch.manual_seed(1)
    model = AutoModelForSeq2SeqLM.from_config(config(request.param, len(words))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if request.param == "t5" or parameter.ndim < 2 else 8.0)  # further from uniform
        if request.param == "bart":
            model.final_logits_bias.normal_(std=0.1)
            model.final_logits_bias[0, 2] = -20  # no end at once
    made = wrap(model, words)
    assert isinstance(made, PairAdapter)
    return made


def own(adapter: PairAdapter, record: Record) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of each target by transformers: prompt and answer as its tokenizer has them."""
    inputs = adapter.tokenizer(record.prompt, return_tensors="pt")["input_ids"]
    labels = adapter.tokenizer(text_target=record.answer.lstrip(), return_tensors="pt")["input_ids"]
    out = adapter.model(input_ids=inputs, labels=labels, output_hidden_states=True)
    losses = torch.nn.functional.cross_entropy(out.logits[0], labels[0], reduction="none")
    assert losses.mean().item() == pytest.approx(out.loss.item(), rel=1e-5)
    return losses, {"labels": labels[0], "states": out.decoder_hidden_states, "logits": out.logits[0]}


def test_losses_are_those_of_transformers_whatever_the_batch(each) -> None:
    examples = [each.encode(r) for r in RECORDS]
    batch = each.collate(examples)
    with torch.no_grad():
        wanted = [own(each, r) for r in RECORDS]
        out = each.forward(each.model, batch, frozenset({"losses", "logits"}))
        fused = each.forward(each.model, batch, frozenset({"losses"}))
    assert torch.equal(out.targets, torch.cat([w[1]["labels"] for w in wanted]))
    for found in (out.losses, fused.losses):
        torch.testing.assert_close(found, torch.cat([w[0] for w in wanted]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits, torch.cat([w[1]["logits"] for w in wanted]), rtol=1e-4, atol=1e-4)
    alone = each.forward(each.model, each.collate(examples[1:2]), frozenset({"losses"})).losses
    start = sum(batch.counts[:1])
    torch.testing.assert_close(alone, out.losses[start : start + len(alone)], rtol=1e-4, atol=1e-5)
    blocks = torch.cat([b for _, b in each.logit_blocks(each.model, batch, rows=5)])
    torch.testing.assert_close(blocks, out.logits, rtol=1e-5, atol=1e-5)
    assert [e.n_targets for e in examples] == list(batch.counts)
    assert [e.units for e in examples] == [
        e.size + len(each.tokenizer(r.prompt)["input_ids"]) for e, r in zip(examples, RECORDS, strict=True)
    ]


def test_the_gradient_is_that_of_transformers(each) -> None:
    record = RECORDS[1]
    parameters = list(each.model.parameters())
    wanted = torch.autograd.grad(own(each, record)[0].sum(), parameters, allow_unused=True)
    loss = each.forward(each.model, each.collate([each.encode(record)]), frozenset({"losses"})).losses.sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert sum(w is not None for w in wanted) > 20
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_features_are_the_states_of_the_decoder(each) -> None:
    names = each.layers()
    assert len(names) == 2
    assert all("decoder" in n for n in names)
    examples = [each.encode(r) for r in RECORDS]
    batch = each.collate(examples)
    with torch.no_grad():
        found = each.forward(each.model, batch, frozenset({f"features:{names[0]}", "losses"}))
        states = found.features(names[0])
        assert states.shape == (sum(e.size for e in examples), 32)
        assert int(found.token_supervised.sum()) == sum(e.n_targets for e in examples)
        for i, record in enumerate(RECORDS):
            mine = states[found.token_owner == i]
            hidden = own(each, record)[1]["states"][1][
                0
            ]  # after the first block, at the start token and all targets but the last
            torch.testing.assert_close(mine[:-1], hidden, rtol=1e-4, atol=1e-4)
        only = each.forward(each.model, batch, frozenset({f"features:{names[0]}"}))
        torch.testing.assert_close(only.features(names[0]), states)


def test_answers_are_those_of_generate(each) -> None:
    examples = [each.encode(r) for r in RECORDS]
    found = each.generate(each.model, examples, 7)
    for record, answer in zip(RECORDS, found, strict=True):
        inputs = each.tokenizer(record.prompt, return_tensors="pt")
        kept = copy.deepcopy(each.model.generation_config)
        options = {"max_new_tokens": 7, "do_sample": False, "num_beams": 1, "decoder_start_token_id": each.begin}
        wanted = each.model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)[
            0, 1:
        ].tolist()
        cut = wanted.index(2) if 2 in wanted else len(wanted)
        assert list(answer.tokens) == wanted[:cut]
        assert answer.ended == (2 in wanted)
        assert each.model.generation_config == kept
    assert len({g.tokens for g in found}) > 1


def test_saved_and_loaded_it_says_the_same(each, tmp_path) -> None:
    each.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert isinstance(again, PairAdapter)
    assert again.fingerprint() == each.fingerprint()
    batch = each.collate([each.encode(r) for r in RECORDS])
    with torch.no_grad():
        one, two = (a.forward(a.model, batch, frozenset({"losses"})).losses for a in (each, again))
    torch.testing.assert_close(one, two)
    twin = each.copy()
    with torch.no_grad():
        next(twin.model.parameters()).add_(1.0)
    assert twin.fingerprint() != each.fingerprint()


def test_templates_say_what_goes_to_the_encoder(each) -> None:
    told = wrap(each.model, each.tokenizer, template="What is {prompt} \n{answer}")
    made = told.encode(RECORDS[0]).data
    assert made.prompt.tolist() == each.tokenizer("What is Where does Ada live? \n")["input_ids"]
    assert made.ids.tolist()[1:] == each.tokenizer("Ada lives in Arles.")["input_ids"]
    other = each.encode(RECORDS[0], answer="Bath.", prompt="Who?", suffix="#x")
    assert other.data.prompt.tolist() == each.tokenizer("Who?")["input_ids"]
    assert (other.id, other.n_targets) == ("a#x", len(each.tokenizer("Bath.")["input_ids"]))


def test_what_an_encoder_decoder_cannot_read_is_refused(each) -> None:
    with pytest.raises(InputError, match=r"'t' is plain text.*no prompt"):
        each.encode(Record("t", "A long text."))
    with pytest.raises(InputError, match="no token to supervise"):
        each.encode(Record("e", "  ", "Who?"))
    short = wrap(each.model, each.tokenizer, max_length=8)
    with pytest.raises(InputError, match="The prompt of record 'c' has"):
        short.encode(RECORDS[2])
    with pytest.raises(InputError, match="The answer of record 'b' has"):
        short.encode(RECORDS[1])
    cut = wrap(each.model, each.tokenizer, max_length=8, truncate=True).encode(RECORDS[1])
    assert (cut.n_targets, cut.data.ends) == (8, False)
    with pytest.raises(InputError, match="is an encoder-decoder, no causal"):
        LanguageAdapter(each.model, each.tokenizer)
    words = each.tokenizer
    with pytest.raises(InputError, match="is no encoder-decoder"):
        PairAdapter(build("llama-tiny", words), words)
    blind = copy.deepcopy(each.model)
    blind.config.decoder_start_token_id = None
    with pytest.raises(InputError, match="no token with which the decoder starts"):
        wrap(blind, words)
