"""Terms evaluated without training: against textbook code on padded tensors, and through a real model."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.methods.evaluate import Given, loss_on, loss_terms
from expunge.methods.recipe import build
from expunge.methods.registry import METHODS

close = torch.testing.assert_close
V = 13


def padded(lengths: list[tuple[int, int]], seed: int, width: int = 9, layers: int = 2) -> Given:
    """Examples of (prompt, answer) lengths, right padded."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)
    labels, mask = torch.full(shape, -100), torch.zeros(shape, dtype=torch.long)
    for row, (prompt, answer) in enumerate(lengths):
        labels[row, prompt : prompt + answer] = torch.randint(V, (answer,), generator=g)
        mask[row, : prompt + answer] = 1
    logits, reference, ignorant, oracle = torch.randn(4, *shape, V, generator=g)
    features = {f"b{i}": torch.randn(*shape, 4, generator=g) for i in range(layers)}
    frozen = {f"b{i}": torch.randn(*shape, 4, generator=g) for i in range(layers)}
    return Given(logits, labels, reference, features, frozen, mask, ignorant, oracle)


PLAIN = [n for n, m in METHODS.items() if m.build().preparation is None]
FORGET, RETAIN = padded([(2, 3), (1, 6), (4, 1)], 1), padded([(3, 2), (2, 5)], 2)
ALTERNATIVE = padded([(2, 4), (1, 2), (4, 5)], 3)


def sequence_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return flat.sum(1)


def batch_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100)


def textbook(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Forget and retain loss as one would write them on padded tensors."""
    f, r, a = FORGET, RETAIN, ALTERNATIVE
    mask = f.labels[:, 1:] != -100
    lengths = mask.sum(1)
    loss_f = sequence_nll(f.logits, f.labels)
    ratio = loss_f - sequence_nll(f.reference_logits, f.labels)
    retain = batch_nll(r.logits, r.labels)
    p = f.logits[:, :-1].log_softmax(-1).gather(2, f.labels[:, 1:].clamp(min=0)[..., None])[..., 0].exp()[mask]
    if name == "graddiff":
        return -batch_nll(f.logits, f.labels), retain
    if name == "graddiff-kl":
        keep = r.labels[:, 1:] != -100
        ref, cur = r.reference_logits[:, :-1][keep].log_softmax(-1), r.logits[:, :-1][keep].log_softmax(-1)
        return -batch_nll(f.logits, f.labels), F.kl_div(cur, ref, log_target=True, reduction="batchmean")
    if name == "npo":
        return -F.logsigmoid(0.1 * ratio).mean() * 2 / 0.1, retain
    if name == "simnpo":
        return -F.logsigmoid(4.5 * loss_f / lengths).mean() * 2 / 4.5, retain
    if name == "idkdpo":
        won = sequence_nll(a.logits, a.labels) - sequence_nll(a.reference_logits, a.labels)
        return -F.logsigmoid(0.1 * (ratio - won)).mean() * 2 / 0.1, retain
    if name == "idk-nll":
        return batch_nll(a.logits, a.labels), retain
    if name == "wga":
        return (p * p.log()).mean(), retain
    if name == "satimp":
        return (p**5 * (1 - p) * p.log()).mean(), retain
    if name == "pdu":
        z = f.logits[:, :-1][mask]
        return ((z.max(-1).values - z.mean(-1)) ** 2).mean(), retain
    raise KeyError(name)


@pytest.mark.parametrize("name", ["graddiff", "graddiff-kl", "npo", "simnpo", "idkdpo", "idk-nll", "wga", "satimp", "pdu"])
def test_terms_equal_textbook_code_on_padded_tensors(name):
    got = loss_terms(name, forget=FORGET, retain=RETAIN, alternative=ALTERNATIVE)
    recipe = build(name)
    forget, retain = textbook(name)
    close(got[f"forget.{recipe.forget[0].name}"], forget)
    close(got[f"retain.{recipe.retain[0].name}"], retain)
    dual = 100.0 if name == "pdu" else 1.0
    close(got["total"], forget * recipe.forget[0].weight + dual * retain)


def test_every_method_can_be_evaluated_and_differentiated():
    for name in PLAIN:
        leaves = [x.logits.clone().requires_grad_() for x in (FORGET, RETAIN, ALTERNATIVE)]
        leaves += [t.clone().requires_grad_() for x in (FORGET, RETAIN, ALTERNATIVE) for t in x.features.values()]
        features = [dict(zip(("b0", "b1"), leaves[i : i + 2], strict=True)) for i in (3, 5, 7)]
        got = loss_terms(
            name,
            forget=Given(
                leaves[0],
                FORGET.labels,
                FORGET.reference_logits,
                features[0],
                FORGET.reference_features,
                FORGET.attention_mask,
                FORGET.incompetent_logits,
                FORGET.oracle_logits,
            ),
            retain=Given(
                leaves[1],
                RETAIN.labels,
                RETAIN.reference_logits,
                features[1],
                RETAIN.reference_features,
                RETAIN.attention_mask,
                oracle_logits=RETAIN.oracle_logits,
            ),
            alternative=Given(
                leaves[2],
                ALTERNATIVE.labels,
                ALTERNATIVE.reference_logits,
                features[2],
                attention_mask=ALTERNATIVE.attention_mask,
            ),
        )
        gradients = torch.autograd.grad(got["total"], leaves, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients), name


@pytest.mark.parametrize("name", PLAIN)
def test_padding_changes_nothing(name):
    def widen(given: Given, by: int) -> Given:
        g = torch.Generator().manual_seed(99)

        def junk(t):
            return torch.cat([t, 50 * torch.randn(t.shape[0], by, t.shape[2], generator=g)], 1)

        return Given(
            junk(given.logits),
            F.pad(given.labels, (0, by), value=-100),
            junk(given.reference_logits),
            {k: junk(v) for k, v in given.features.items()},
            {k: junk(v) for k, v in given.reference_features.items()},
            F.pad(given.attention_mask, (0, by)),
            junk(given.incompetent_logits),
            junk(given.oracle_logits),
        )

    narrow = loss_terms(name, forget=FORGET, retain=RETAIN, alternative=ALTERNATIVE)
    wide = loss_terms(name, forget=widen(FORGET, 3), retain=widen(RETAIN, 5), alternative=widen(ALTERNATIVE, 1))
    assert narrow.keys() == wide.keys()
    for key, value in narrow.items():
        close(value, wide[key])


def test_two_terms_of_one_name_are_kept_apart():
    recipe = build("custom", {"forget": ["gradascent", {"name": "gradascent", "reduction": "sum"}]})
    got = loss_terms(recipe, forget=FORGET)
    assert set(got) == {"forget.gradascent", "forget.gradascent#2", "total"}
    close(got["total"], got["forget.gradascent"] + got["forget.gradascent#2"])


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("npo", {"forget": FORGET}, "'npo' reads retain examples, and none were given. Give retain=Given(logits, labels)."),
        (
            "undial",
            {"forget": Given(FORGET.logits, FORGET.labels)},
            "'undial' reads the logits of the reference model on forget examples. Give forget=Given(..., reference_logits=...).",
        ),
        ("rmu", {"forget": Given(FORGET.logits, FORGET.labels)}, "'rmu' reads features that were not given"),
        ("gradascent", {"forget": Given(FORGET.logits[0], FORGET.labels)}, "logits must be [B, T, V] and labels [B, T]"),
        ("npoo", {}, "There is no method 'npoo'"),
    ],
)
def test_what_is_missing_is_said(name, given, said):
    with pytest.raises(InputError, match=re.escape(said)):
        loss_terms(name, **given)


# ---- real models


@pytest.fixture(scope="module")
def models():
    pytest.importorskip("transformers")
    from expunge.adapters.language import LanguageAdapter
    from expunge.adapters.presets import build as preset
    from expunge.adapters.words import word_tokenizer

    tokenizer = word_tokenizer(
        ["Where does the tall person from the town live ? Question Answer : In a house by the sea , they say ."]
    )
    current, frozen = (LanguageAdapter(preset("llama-tiny", tokenizer, seed=s), tokenizer) for s in (1, 2))
    return current, frozen


RECORDS = [
    Record("a", "In a house.", "Where does the person live?", subject="a"),
    Record("b", "By the sea, they say, in a tall house.", "Where?", subject="b"),
    Record("c", "The town.", "Where does the tall person from the town live?", subject="c"),
]
KEPT = [Record("d", "They live by the town.", "Where do they live?"), Record("e", "In the sea.", "Where?")]


def hub_layout(adapter, frozen, examples, layers):
    """The same examples as transformers takes them: ids, labels with -100, and everything from its own forward pass."""
    batch = adapter.collate(examples)
    ids, mask = batch.tensors["input_ids"], batch.tensors["attention_mask"]
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        size = example.size
        labels[row, size - example.n_targets : size] = ids[row, size - example.n_targets : size]
    out, ref = (a.model(input_ids=ids, attention_mask=mask, output_hidden_states=True) for a in (adapter, frozen))
    # hidden_states[i + 1] is the output of block i, except for the last one, which has passed the final norm
    states = [dict(zip(layers, o.hidden_states[1:], strict=True)) for o in (out, ref)]
    frozen_logits = ref.logits.detach()
    return Given(out.logits, labels, frozen_logits, states[0], states[1], mask, frozen_logits, frozen_logits), labels, ids, mask


@pytest.mark.parametrize("name", PLAIN)
def test_the_adapter_gives_what_transformers_gives(models, name):
    adapter, frozen = models
    other = ["The person.", "They live in the sea.", "A house, they say."]
    layers = adapter.layers()
    # What transformers calls the states of the last block has passed the final norm, so another one is compared.
    recipe = build(name, {"layer": 0} if name == "wpn" else {})
    got = loss_on(recipe, adapter, frozen, RECORDS, KEPT, alternatives=other, incompetent=frozen, oracle=frozen)
    encoded = [adapter.encode(r) for r in RECORDS], [adapter.encode(r) for r in KEPT]
    encoded += ([adapter.encode(r, answer=a, suffix="#alternative") for r, a in zip(RECORDS, other, strict=True)],)
    forget, retain, alternative = (hub_layout(adapter, frozen, e, layers)[0] for e in encoded)
    want = loss_terms(recipe, forget=forget, retain=retain, alternative=alternative)
    assert got.keys() == want.keys()
    for key, value in want.items():
        close(got[key], value, rtol=1e-4, atol=1e-5)


def test_nll_is_what_transformers_returns_as_its_loss(models):
    adapter, frozen = models
    _, labels, ids, mask = hub_layout(adapter, frozen, [adapter.encode(r) for r in KEPT], adapter.layers())
    want = adapter.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    close(loss_on("finetune", adapter, None, [], KEPT)["retain.nll"], want)


def test_a_batch_is_the_mean_of_its_examples(models):
    adapter, frozen = models
    whole = loss_on("npo", adapter, frozen, RECORDS, KEPT)["forget.npo"]
    single = [loss_on("npo", adapter, frozen, [r], KEPT)["forget.npo"] for r in RECORDS]
    close(whole, torch.stack(single).mean())


def test_a_missing_reference_or_set_is_said(models):
    adapter, _ = models
    with pytest.raises(InputError, match="'npo' reads the reference, and none was given"):
        loss_on("npo", adapter, None, RECORDS, KEPT)
    with pytest.raises(InputError, match="'npo' reads retain records, and none were given"):
        loss_on("npo", adapter, adapter, RECORDS)
