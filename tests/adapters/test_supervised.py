"""Classifiers and regressors as adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from expunge.adapters.supervised import ClassifierAdapter, RegressionAdapter
from expunge.core.errors import InputError
from expunge.data.rows import Row, table
from tests.digits import encoded, network

WANT = frozenset({"losses", "logits", "features:0", "features:2"})
RNG = np.random.default_rng(0)
TABLE = table(RNG.normal(size=(9, 64)), RNG.integers(0, 10, 9), classes=[str(i) for i in range(10)])


def batch_of(adapter, rows=None):
    return adapter.collate(encoded(adapter, TABLE.rows() if rows is None else rows))


def test_losses_logits_and_features_are_those_of_the_network() -> None:
    model = network().double()
    adapter = ClassifierAdapter(model, TABLE.classes)
    rows = table(TABLE.inputs, TABLE.targets, classes=TABLE.classes, precision="float64").rows()
    out = adapter.forward(model, batch_of(adapter, rows), WANT)
    x = torch.from_numpy(np.stack([r.inputs for r in rows]))
    hidden = x @ model[0].weight.T + model[0].bias
    scores = hidden.relu() @ model[2].weight.T + model[2].bias
    torch.testing.assert_close(out.logits, scores)
    torch.testing.assert_close(out.losses, -scores.log_softmax(1)[torch.arange(9), torch.tensor(TABLE.targets)])
    torch.testing.assert_close(out.features("0"), hidden)
    torch.testing.assert_close(out.features("2"), hidden.relu())  # what goes into the last layer
    assert adapter.layers() == ["0", "2"]
    assert out.per_example(out.losses).shape == (9,)
    (first, block), *more = adapter.logit_blocks(model, batch_of(adapter, rows))
    assert (first, more) == (0, [])
    torch.testing.assert_close(block, scores)


def test_a_narrowed_view_is_that_of_the_rows_alone() -> None:
    adapter = ClassifierAdapter(network(), TABLE.classes)
    whole = adapter.forward(adapter.model, batch_of(adapter), WANT).narrow(3, 7)
    alone = adapter.forward(adapter.model, batch_of(adapter, TABLE.rows(range(3, 7))), WANT)
    for name in WANT:
        torch.testing.assert_close(whole.values[name], alone.values[name])


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_regression_losses(kind) -> None:
    model = nn.Sequential(nn.Linear(64, 1))
    rows = table(TABLE.inputs, RNG.normal(size=9), task="regression").rows()
    for shaped in (model, nn.Sequential(model, nn.Flatten(0))):  # one number per row, as [B, 1] and as [B]
        adapter = RegressionAdapter(shaped, kind)
        losses = adapter.forward(shaped, batch_of(adapter, rows), frozenset({"losses"})).losses
        x, y = torch.from_numpy(np.stack([r.inputs for r in rows])), torch.tensor([r.target for r in rows])
        error = (x @ model[0].weight.T + model[0].bias)[:, 0] - y
        torch.testing.assert_close(losses, error.abs() if kind == "l1" else error**2)


def test_another_answer_takes_the_place_of_the_target() -> None:
    adapter = ClassifierAdapter(network(), [f"digit {i}" for i in range(10)])
    row = TABLE.rows()[0]
    assert adapter.encode(row, answer=4, suffix="#x").data[1] == 4
    assert adapter.encode(row, answer="digit 7").data[1] == 7
    assert adapter.encode(row, suffix="#x").id == "0#x"
    for wrong in (10, -1, 2.5, "digit"):
        with pytest.raises(InputError):
            adapter.encode(row, answer=wrong)
    with pytest.raises(InputError, match="not finite"):
        RegressionAdapter(network()).encode(row, answer=float("nan"))


def test_images_cost_more_than_small_rows() -> None:
    adapter = ClassifierAdapter(network(), TABLE.classes)
    image = Row("x", np.zeros((3, 32, 32), dtype=np.float32), 1)
    assert (adapter.encode(TABLE.rows()[0]).units, adapter.encode(image).units) == (1, 48)


def test_a_model_that_does_not_fit_the_labels_is_refused() -> None:
    adapter = ClassifierAdapter(network(), TABLE.classes[:7])
    with pytest.raises(InputError, match=r"returns \[2, 10\] for 2 rows of 7 classes"):
        adapter.forward(adapter.model, batch_of(adapter, [Row("a", TABLE.inputs[0], 1), Row("b", TABLE.inputs[1], 2)]), WANT)
    other = RegressionAdapter(network())
    with pytest.raises(InputError, match="one number for each row"):
        other.forward(other.model, batch_of(other), frozenset({"losses"}))
    with pytest.raises(InputError, match="different shapes"):
        batch_of(adapter, [Row("a", np.zeros(3), 1), Row("b", np.zeros(4), 1)])
    with pytest.raises(InputError, match="no module 'layer1'"):
        ClassifierAdapter(network(), TABLE.classes, layers=["layer1"])
    with pytest.raises(InputError, match="at least two classes"):
        ClassifierAdapter(network(), ["only"])


def test_dropout_is_off_unless_asked_for() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 10)).train()
    adapter = ClassifierAdapter(model, TABLE.classes)
    first, second = (adapter.forward(model, batch_of(adapter), frozenset({"logits"})).logits for _ in range(2))
    assert torch.equal(first, second)
    asked = ClassifierAdapter(nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 10)).train(), TABLE.classes, dropout=True)
    assert not torch.equal(*(asked.forward(asked.model, batch_of(asked), frozenset({"logits"})).logits for _ in range(2)))


def test_identity_copy_and_storage(tmp_path) -> None:
    adapter = ClassifierAdapter(network(), TABLE.classes)
    other = adapter.copy()
    assert other.fingerprint() == adapter.fingerprint()
    assert ClassifierAdapter(network(), [*TABLE.classes[:9], "nine"]).fingerprint() != adapter.fingerprint()
    with torch.no_grad():
        other.model[0].bias[0] += 1e-3
    assert other.fingerprint() != adapter.fingerprint()
    adapter.save(tmp_path / "model")
    held = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(held[k], v) for k, v in adapter.model.state_dict().items())
    with pytest.raises(InputError, match="not empty"):
        adapter.save(tmp_path / "model")


def test_classifiers_of_transformers_by_the_name_of_their_input() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
        )
    ).eval()
    adapter = ClassifierAdapter(text, ["a", "b", "c"])
    rows = [Row("long", np.arange(1, 9), 0), Row("short", np.arange(1, 4), 2)]
    together = adapter.forward(text, batch_of(adapter, rows), frozenset({"logits"})).logits
    table = [Row("long", np.arange(1, 11), 0), Row("short", np.array([1, 2, 3, *[-1] * 7]), 2)]
    assert batch_of(adapter, table[1:]).tensors["input_ids"].shape == (1, 3)
    filled = adapter.forward(text, batch_of(adapter, table), frozenset({"logits"})).logits
    for i, row in enumerate(rows):  # padding changes nothing
        alone = adapter.forward(text, batch_of(adapter, [row]), frozenset({"logits"})).logits
        torch.testing.assert_close(together[i], alone[0])
    torch.testing.assert_close(filled[1], together[1])
    image = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, num_labels=2,
        )
    ).eval()  # fmt: skip
    seen = ClassifierAdapter(image, ["a", "b"])
    pixels = RNG.normal(size=(2, 1, 8, 8)).astype(np.float32)
    out = seen.forward(image, batch_of(seen, [Row(str(i), p, i) for i, p in enumerate(pixels)]), frozenset({"logits"}))
    torch.testing.assert_close(out.logits, image(pixel_values=torch.from_numpy(pixels)).logits)
