"""Updates that are loaded by row, the detector's formula, and both with a target as one model: run, generated from, saved."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from expunge.adapters.detector import Detector, Weighing, fit_detector
from expunge.adapters.gated import Gated, GatedRequest
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.loading import load
from expunge.adapters.lowrank import LowRank, loaded
from expunge.adapters.presets import build
from expunge.adapters.reading import HiddenStates, prompt_mask
from expunge.core.errors import InputError
from expunge.engine.parameters import LoraBeside
from expunge.pipeline.config import TextConfig
from expunge.pipeline.models import check_source, open_adapter

close = torch.testing.assert_close
WANT = frozenset({"logits", "losses"})


def features(adapter: LanguageAdapter, records, pool: str = "mean") -> torch.Tensor:
    """Of each prompt, one by one, in float32."""
    target = getattr(adapter.model, "target", adapter.model)
    out = []
    for record in records:
        data = adapter.encode(record).data
        ids = torch.tensor([data.ids[: data.start].tolist()])
        real = torch.ones_like(ids)
        out.append(HiddenStates(target).features(ids, real, real.bool(), range(len(adapter.layers())), pool))
    return torch.cat(out)


def detector_of(adapter: LanguageAdapter, records, pool: str = "mean") -> Detector:
    """A detector that was fitted on prompts around those of some records: they are usual, those of others are not."""
    seen = features(adapter, records, pool)
    noise = torch.Generator().manual_seed(0)
    size = 0.02 * seen.std()
    near = torch.cat([seen + size * torch.randn(seen.shape, generator=noise) for _ in range(8)])
    return fit_detector(
        near[: -2 * len(seen)], near[-2 * len(seen) :], layers=range(seen.shape[1]), pool=pool, encoder=False, cosine=None
    )  # fmt: skip


def update_of(adapter: LanguageAdapter, seed: int = 3) -> tuple[nn.Module, LowRank]:
    """A peft model whose LoRA says something, and the same as an update."""
    torch.manual_seed(seed)
    target = getattr(adapter.model, "target", adapter.model)
    wrapped = LoraBeside(rank=2).prepare(target, adapter.layers()).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return wrapped, LowRank.of(wrapped)


def gated(adapter: LanguageAdapter, records, *, strength: float = 1.0, **weighing) -> tuple[LanguageAdapter, nn.Module]:
    """The adapter's model with an update that is loaded for the prompts of some records; and the model with it always loaded."""
    wrapped, update = update_of(adapter)
    request = GatedRequest(update, detector_of(adapter, records), Weighing(rule="hard", **weighing), strength=strength)
    made = adapter.sharing()
    made.model = Gated(adapter.model, [request])
    return made, wrapped


def weights(adapter: LanguageAdapter, records) -> torch.Tensor:
    batch = adapter.collate([adapter.encode(r) for r in records])
    lengths = torch.tensor([adapter.encode(r).data.start for r in records])
    return adapter.model.weights(batch.tensors["input_ids"], batch.tensors["attention_mask"], lengths)


def outputs(adapter: LanguageAdapter, model: nn.Module, records) -> dict[str, torch.Tensor]:
    batch = adapter.collate([adapter.encode(r) for r in records])
    with torch.no_grad():
        return adapter.forward(model, batch, WANT).values


# ---- the update


def test_weight_zero_is_the_target_bit_by_bit_and_weight_one_the_adapter(each, records):
    wrapped, update = update_of(each)
    batch = each.collate([each.encode(r) for r in records])
    given = {k: batch.tensors[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target, whole = each.model(**given)["logits"], wrapped(**given)["logits"]
        assert not torch.allclose(target, whole)
        for rows in (torch.zeros(4), torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.ones(4)):
            with loaded(each.model, [(update, rows)]):
                got = each.model(**given)["logits"]
            for row, weight in enumerate(rows.tolist()):
                assert torch.equal(got[row], (whole if weight else target)[row])
        assert torch.equal(each.model(**given)["logits"], target), "the update stayed"


def test_the_formula_of_a_module_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3)).double()
    pairs = [(torch.randn(2, 5).double(), torch.randn(3, 2).double()) for _ in range(2)]
    updates = [LowRank({"0": p}, {"0": scale}) for p, scale in zip(pairs, (2.0, 0.5), strict=True)]
    x = torch.randn(4, 6, 5).double()
    rows = [torch.tensor([0.0, 1.0, 0.3, 1.2]), torch.tensor([1.0, 0.0, 0.7, 0.0])]
    with loaded(model, list(zip(updates, rows, strict=True))):
        got, twice = model(x), model(x.repeat_interleave(3, 0))
    for n in range(4):
        want = model(x[n])
        for (a, b), scale, weight in zip(pairs, (2.0, 0.5), rows, strict=True):
            want = want + weight[n] * scale * x[n] @ a.T @ b.T
        close(got[n], want.detach().requires_grad_(False), check_dtype=False, rtol=1e-6, atol=1e-6)
    close(twice[::3], got)
    with loaded(model, [(updates[0], rows[0])]), pytest.raises(InputError, match="5 rows for 4 sequences"):
        model(torch.randn(5, 5).double())


# ---- the detector


def test_the_detectors_formula_against_float64():
    rng = np.random.default_rng(1)
    fitted, held, other = (rng.normal(size=(n, 2, 7)) @ np.diag(np.arange(1, 8)) + 3 for n in (20, 6, 9))
    for signs in ("agree", "official"):
        made = fit_detector(
            *(torch.from_numpy(v) for v in (fitted, held)), layers=(0, 1), pool="mean", encoder=False, cosine=50.0, signs=signs
        )
        from scipy.stats import norm
        from sklearn.covariance import LedoitWolf
        from sklearn.svm import OneClassSVM

        def scores(x: np.ndarray, signs: str = signs) -> np.ndarray:
            columns = []
            for layer in range(2):
                shrunk = LedoitWolf().fit(fitted[:, layer])
                unit = [v[:, layer] / np.linalg.norm(v[:, layer], axis=1, keepdims=True) for v in (x, fitted)]
                cosine = (unit[0] @ unit[1].T).max(1)
                part = 1 - cosine if signs == "agree" else cosine
                columns.append(-0.5 * shrunk.mahalanobis(x[:, layer]) - 50 * part)
            return np.stack(columns, 1)

        line = OneClassSVM(kernel="linear", nu=0.1).fit(scores(fitted))
        places = [line.score_samples(scores(x)) for x in (fitted, held, other)]
        first, second, std = places[0].mean(), places[1].mean(), max(p.std(ddof=1) for p in places[:2])
        middle = (first + second) / 2

        def below(v: np.ndarray, first: float = first, second: float = second, std: float = std) -> np.ndarray:
            return 0.5 * norm.cdf(v, first, std) + 0.5 * norm.cdf(v, second, std)

        for x, place in zip((fitted, held, other), places, strict=True):
            want = 1 - np.abs(below(place) - below(2 * middle - place))
            close(made.closeness(torch.from_numpy(x)), torch.from_numpy(want).float(), rtol=2e-3, atol=2e-3)
        assert made.offset.item() == pytest.approx(float(line.offset_[0]), rel=1e-5)


def test_weights_from_closeness():
    c = torch.tensor([0.0, 0.03, 0.05, 0.115, 0.2, 0.5, 1.0])
    soft = 1 / (1 + torch.exp(-(10 * c - 2)))
    close(Weighing(level=0).weights(c), soft)
    assert Weighing(level=0).weights(c).min() == pytest.approx(1 / (1 + math.exp(2)))
    close(Weighing().weights(c), torch.where(c < 0.05, 0.0, soft))
    assert Weighing(rule="hard").weights(c).tolist() == [0, 0, 1, 1, 1, 1, 1]
    official = Weighing(rule="official").weights(c)  # soft: 0.12, 0.15, 0.18, 0.30, 0.5, 0.95, 1.0
    assert official.tolist() == [0, 0, 0, 0, 0, pytest.approx(1.2), pytest.approx(1.2)]
    assert Weighing(rule="official").weights(torch.tensor([0.14])).item() == pytest.approx(1 / (1 + math.exp(0.6)))
    with pytest.raises(InputError, match="rule"):
        Weighing(rule="sometimes")


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_and_company_do_not_change_what_is_read(each, records, pool):
    """A prompt is read alike alone, with an answer after it, padded on the left, and padded on the right."""
    alone = features(each, records, pool)
    batch = each.collate([each.encode(r) for r in records])
    lengths = torch.tensor([each.encode(r).data.start for r in records])
    mask = batch.tensors["attention_mask"]
    layers = range(len(each.layers()))
    reader = HiddenStates(each.model)
    got = reader.features(batch.tensors["input_ids"], mask, prompt_mask(mask, lengths), layers, pool)
    close(got, alone, rtol=1e-4, atol=1e-4)
    prompts = [each.encode(r).data.ids[: each.encode(r).data.start].tolist() for r in records]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    left = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    close(reader.features(ids, left, prompt_mask(left, None), layers, pool), alone, rtol=1e-4, atol=1e-4)


def test_the_states_are_those_after_the_blocks(llama, records):
    layers = llama.layers()
    batch = llama.collate([llama.encode(records[0])])
    with torch.no_grad():
        views = llama.forward(llama.model, batch, frozenset(f"features:{n}" for n in layers))
    start = llama.encode(records[0]).data.start
    want = torch.stack([views.features(n)[:start].mean(0) for n in layers])
    close(features(llama, records[:1])[0], want)
    whole = prompt_mask(torch.ones(2, 5), torch.tensor([1, 3]))
    assert whole.tolist() == [[True] * 5, [True] * 3 + [False] * 2], "a text without a prompt is read whole"


# ---- one model


def test_each_row_of_a_mixed_batch_gets_its_own_weight(each, records):
    made, wrapped = gated(each, records[:2])
    assert weights(made, records).tolist() == [[1, 1, 0, 0]]
    assert weights(made, records[::-1]).tolist() == [[0, 0, 1, 1]]
    target, whole = (outputs(each, m, records) for m in (each.model, wrapped))
    got = outputs(made, made.model, records)
    owner = made.collate([made.encode(r) for r in records]).owner
    for key in WANT:
        want = torch.where(owner.view(-1, *[1] * (got[key].ndim - 1)) < 2, whole[key], target[key])
        close(got[key], want, rtol=1e-4, atol=1e-4)
    one = torch.cat([outputs(made, made.model, [r])["logits"] for r in records])
    close(got["logits"], one, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(made, made.model, records[2:])["losses"], outputs(each, each.model, records[2:])["losses"])
    blocks = [b for _, b in made.logit_blocks(made.model, made.collate([made.encode(r) for r in records]), rows=4)]
    close(torch.cat(blocks), got["logits"])
    assert [n.removeprefix("target.") for n in made.layers()] == each.layers()
    states = f"features:{made.layers()[0]}"
    batch = made.collate([made.encode(r) for r in records])
    with torch.no_grad():
        found = made.forward(made.model, batch, frozenset({states})).values[states]
        inner = each.forward(
            wrapped, each.collate([each.encode(r) for r in records]), frozenset({f"features:{each.layers()[0]}"})
        )
    mine = batch.token_owner < 2
    close(found[mine], inner.features(each.layers()[0])[mine], rtol=1e-4, atol=1e-4)


def test_generation_keeps_the_prompts_weight_with_and_without_a_cache(each, records):
    made, wrapped = gated(each, records[:2])
    examples = [made.encode(r) for r in records]
    found = made.generate(made.model, examples, 8)
    apart = [each.generate(m, examples, 8) for m in (wrapped, each.model)]
    assert apart[0] != apart[1], "the update has no say"
    assert found == apart[0][:2] + apart[1][2:]
    assert [made.generate(made.model, [e], 8)[0] for e in examples] == found
    ids = torch.tensor([examples[0].data.ids[: examples[0].data.start].tolist()])
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(made.model.generate(ids, use_cache=True, **options), made.model.generate(ids, use_cache=False, **options))
    beams = {"num_beams": 3, "num_return_sequences": 2, **options}
    assert torch.equal(made.model.generate(ids, **beams), wrapped.generate(input_ids=ids, **beams))


def test_two_requests_are_loaded_apart_or_the_last_for_both(llama, records):
    first, _ = gated(llama, records[:1])
    _, update = update_of(first, seed=5)
    for continued in (False, True):
        second = GatedRequest(update, detector_of(llama, records[1:2]), Weighing(rule="hard"), strength=0.5, continued=continued)
        made = llama.sharing()
        made.model = Gated(llama.model, [*first.model.requests, second])
        want = [[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]] if continued else [[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]]
        assert weights(made, records).tolist() == want
    assert len(made.layers()) == len(llama.layers()) == 2, "two requests look like two blocks"


# ---- folders


def test_it_is_saved_and_loaded(each, records, tmp_path):
    made, _ = gated(each, records[:2], strength=0.7)
    made.save(tmp_path / "model")
    names = {p.relative_to(tmp_path / "model").as_posix() for p in (tmp_path / "model").rglob("*") if p.is_file()}
    wanted = {"composite.json", "target/model.safetensors", "request-1/adapter.safetensors", "request-1/detector.safetensors"}
    assert wanted <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl"))]
    with safe_open(tmp_path / "model/request-1/detector.safetensors", "pt") as held:
        assert set(held.keys()) == set(Detector.KEYS)
    back = load(tmp_path / "model")
    assert back.fingerprint() == made.fingerprint()
    assert torch.equal(outputs(back, back.model, records)["logits"], outputs(made, made.model, records)["logits"])
    examples = [made.encode(r) for r in records]
    assert back.generate(back.model, examples, 6) == made.generate(made.model, examples, 6)
    check_source(str(tmp_path / "model"))
    low = open_adapter(str(tmp_path / "model"), TextConfig(dtype="bfloat16"))
    assert low.model.dtype == torch.bfloat16
    assert torch.isfinite(outputs(low, low.model, records)["logits"]).all()


def test_identity_and_copies(llama, records):
    made, _ = gated(llama, records[:2])
    first, held = made.fingerprint(), outputs(made, made.model, records)["logits"]
    assert first != llama.fingerprint()
    twin = made.copy()
    assert twin.fingerprint() == first
    twin.model.requests[0].strength = 0.5
    twin.model.describe()
    assert twin.fingerprint() != first
    with torch.no_grad():
        for parameter in twin.model.target.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(features(twin, records[:1]), features(made, records[:1])), "the copy reads the old target"
    assert made.fingerprint() == first
    assert torch.equal(outputs(made, made.model, records)["logits"], held)
    size = sum(p.numel() for p in llama.model.parameters())
    assert size < sum(p.numel() for p in made.model.parameters()) < 1.3 * size


def test_gradients_reach_the_target_and_the_update(llama, records):
    """An attacker trains the whole of it."""
    made, _ = gated(llama, records[:2])
    made.model.requires_grad_(True)
    batch = made.collate([made.encode(r) for r in records])
    made.forward(made.model, batch, frozenset({"losses"})).losses.sum().backward()
    request = made.model.requests[0]
    assert all(p.grad is not None and bool(p.grad.any()) for p in (*request.update.a, *request.update.b))
    assert llama.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_target_can_be_named_instead_of_kept(llama, records, tmp_path):
    llama.save(tmp_path / "target")
    made, _ = gated(load(tmp_path / "target"), records[:2])
    made.model.keep_target = False
    made.save(tmp_path / "model")
    assert not (tmp_path / "model/target").exists()
    back = load(tmp_path / "model")
    assert torch.equal(outputs(back, back.model, records)["logits"], outputs(made, made.model, records)["logits"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: {**held, "requests": []}, "is damaged"),
        (lambda held: {**held, "requests": [{"update": {}}]}, "missing or damaged"),
        (lambda held: {**held, "requests": held["requests"] * 2}, "request-2' is missing or damaged"),
        (lambda held: {**held, "requests": [{**held["requests"][0], "reading": {"q": 1.0}}]}, "missing or damaged"),
        (lambda held: {**held, "requests": [{**held["requests"][0], "update": {"nowhere": 2.0}}]}, "missing or damaged"),
    ],
)
def test_a_damaged_folder_is_refused(llama, records, tmp_path, change, said):
    made, _ = gated(llama, records[:2])
    made.save(tmp_path / "model")
    path = tmp_path / "model/composite.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=said):
        load(tmp_path / "model")


def test_what_does_not_fit_is_refused(llama, tokenizer, records):
    made, _ = gated(llama, records[:2])
    wider = build("llama-tiny", tokenizer, seed=0, context=64, hidden_size=32)
    with pytest.raises(InputError, match=r"is for a module .* the target has none"):
        Gated(wider, made.model.requests)
    with pytest.raises(InputError, match="no plain model"):
        Gated(made.model, made.model.requests)
    with pytest.raises(InputError, match="has no LoRA"):
        LowRank.of(llama.model)
    held = made.model.requests[0]
    reading = Detector(held.detector.tensors(), **{**held.detector.described(), "encoder": True})
    with pytest.raises(InputError, match="reads an encoder, and the model has none"):
        Gated(llama.model, [GatedRequest(held.update, reading, held.weighing)])
    with pytest.raises(InputError, match=r"no module 'q_prok' that LoRA could adapt.*q_proj"):
        LoraBeside(modules=("q_prok",)).prepare(llama.model, llama.layers())
