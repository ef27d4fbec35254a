"""The diffusion adapter: its losses against their formula, its draws, what another class means, drawing, storage, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge.adapters.diffusion import DiffusionAdapter
from expunge.core.errors import InputError
from expunge.data.rows import Row
from expunge.data.sets.drawn import drawn_shapes
from expunge.engine.objective import mean_losses
from tests.drawings import fresh, network, scheduler

LOSSES = frozenset({"losses"})


@pytest.fixture(scope="module")
def adapter() -> DiffusionAdapter:
    """With weights that do not cancel: the last layer of a fresh network is not zero, as its library sets none to zero."""
    return fresh(draws=4)


def rows(n: int = 3) -> list[Row]:
    return list(drawn_shapes(n).rows())


def losses(adapter: DiffusionAdapter, examples) -> torch.Tensor:
    with torch.no_grad():
        return adapter.forward(adapter.model, adapter.collate(examples), LOSSES).losses


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_losses_are_the_squared_error_of_what_the_scheduler_predicts(kind) -> None:
    adapter = DiffusionAdapter(network(), scheduler(prediction_type=kind), list("abcd"), draws=3)
    batch = adapter.collate([adapter.encode(r) for r in rows(1)])
    with torch.no_grad():
        found = adapter.forward(adapter.model, batch, LOSSES).losses
    assert found.shape == (12,)
    kept = adapter.scheduler.alphas_cumprod
    for at in range(12):
        picture, level, noise = (
            batch.tensors["pictures"][at // 3],
            int(batch.tensors["levels"][at]),
            batch.tensors["noise"][at],
        )
        a = float(kept[level])
        noisy = a**0.5 * picture + (1 - a) ** 0.5 * noise
        with torch.no_grad():
            out = adapter.model(noisy[None], level, class_labels=torch.tensor([at // 3])).sample[0]
        goal = {"epsilon": noise, "sample": picture, "v_prediction": a**0.5 * noise - (1 - a) ** 0.5 * picture}[kind]
        assert float(found[at]) == pytest.approx(float((out - goal).square().mean()), rel=1e-4)


def test_levels_cover_the_schedule_and_noise_is_normal(adapter) -> None:
    batch = adapter.collate([adapter.encode(r) for r in rows(100)])
    levels = batch.tensors["levels"].reshape(-1, 4)
    for part in range(4):
        assert 12.5 * part - 1 <= levels[:, part].min() < 12.5 * part + 1
        assert 12.5 * (part + 1) - 2 <= levels[:, part].max() <= 12.5 * (part + 1)
    counts = np.bincount(levels.flatten(), minlength=50)
    assert counts.min() > 10  # 32 each are expected
    noise = batch.tensors["noise"]
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1, abs=0.01)


def test_a_loss_belongs_to_the_example_and_in_training_to_the_step(adapter) -> None:
    examples = [adapter.encode(r) for r in rows()]
    whole = losses(adapter, examples)
    alone = losses(adapter, examples[5:6])
    torch.testing.assert_close(whole[20:24], alone)
    assert torch.equal(whole, losses(adapter, examples))
    with adapter.drawing(0, 7):
        stepped = losses(adapter, examples)
    with adapter.drawing(0, 7):
        torch.testing.assert_close(losses(adapter, examples[5:6]), stepped[20:24])
    with adapter.drawing(0, 8):
        assert (losses(adapter, examples) - stepped).abs().min() > 0
    with adapter.drawing(1, 7):
        assert (losses(adapter, examples) - stepped).abs().min() > 0
    assert torch.equal(losses(adapter, examples), whole)
    other = DiffusionAdapter(adapter.model, adapter.scheduler, adapter.classes, draws=4, seed=1)
    assert (losses(other, examples) - whole).abs().min() > 0


def test_another_class_is_what_the_model_draws_of_it_and_does_not_learn(adapter) -> None:
    picture = rows()[2]
    own = adapter.encode(picture, answer="cross", suffix="#other")
    assert own.id == picture.id + "#other"
    torch.testing.assert_close(losses(adapter, [own]), torch.zeros(4))
    other = adapter.encode(picture, answer=0, suffix="#other")
    batch = adapter.collate([adapter.encode(picture), other])
    found = adapter.forward(adapter.model, batch, LOSSES).losses
    half = slice(4, 8)
    noisy = adapter.scheduler.add_noise(batch.tensors["pictures"][batch.owner], batch.tensors["noise"], batch.tensors["levels"])[
        half
    ]
    with torch.no_grad():
        ours, theirs = (
            adapter.model(noisy, batch.tensors["levels"][half], class_labels=torch.full((4,), c)).sample for c in (2, 0)
        )
    torch.testing.assert_close(found[half], (ours - theirs).square().flatten(1).mean(1))
    torch.testing.assert_close(found[:4], losses(adapter, [adapter.encode(picture)]))
    (gradient,) = torch.autograd.grad(found[half].sum(), [adapter.model.class_embedding.weight])
    assert gradient[2].abs().max() > 0
    assert torch.equal(gradient[[0, 1, 3]], torch.zeros(3, gradient.shape[1]))


def test_features_have_one_row_for_each_target(adapter) -> None:
    layers = adapter.layers()
    assert layers == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    batch = adapter.collate([adapter.encode(r) for r in rows(1)])
    found = adapter.forward(adapter.model, batch, frozenset({"features:mid_block", "losses"}))
    assert found.features("mid_block").shape == (16, 16 * 4 * 4)
    assert found.narrow(1, 3).features("mid_block").shape == (8, 256)
    assert len(found.narrow(1, 3).losses) == 8
    one = adapter.collate([adapter.encode(rows(1)[1])])
    alone = adapter.forward(adapter.model, one, frozenset({"features:mid_block"})).features("mid_block")
    torch.testing.assert_close(found.features("mid_block")[4:8], alone)


def test_drawings_follow_seed_and_class(drawings) -> None:
    target = drawings.target()
    first = target.draw(["cross", "ring"], seed=3, steps=25)
    assert first.shape == (2, 1, 8, 8)
    assert np.abs(first).max() <= 1
    assert np.array_equal(first, target.draw([2, 0], seed=3, steps=25))
    assert not np.array_equal(first, target.draw([2, 0], seed=4, steps=25))
    many = target.draw(np.repeat(np.arange(4), 10), seed=5, steps=25, batch=16)
    seen = drawings.judge.predict(many.reshape(40, -1))
    assert (seen == np.repeat(np.arange(4), 10)).mean() > 0.9
    with pytest.raises(InputError, match="no class 'ribg'"):
        target.draw(["ribg"])


def test_it_comes_back_from_its_folder(adapter, tmp_path) -> None:
    adapter.save(tmp_path / "held")
    assert list((tmp_path / "held" / "unet").glob("*.safetensors"))
    back = DiffusionAdapter.load(tmp_path / "held")
    assert back.fingerprint() == adapter.fingerprint()
    examples = [adapter.encode(r) for r in rows()]
    assert mean_losses(back, back.model, examples, 4096) == mean_losses(adapter, adapter.model, examples, 4096)
    with torch.no_grad():
        back.model.conv_out.bias += 1
    assert back.fingerprint() != adapter.fingerprint()
    copy = adapter.copy()
    with torch.no_grad():
        copy.model.conv_out.bias += 1
    assert not torch.equal(copy.model.conv_out.bias, adapter.model.conv_out.bias)
    longer = DiffusionAdapter(adapter.model, scheduler(num_train_timesteps=60), adapter.classes, draws=4)
    assert longer.fingerprint() != adapter.fingerprint()
    with pytest.raises(InputError, match="not empty"):
        adapter.save(tmp_path / "held")
    with pytest.raises(InputError, match="no diffusion model"):
        DiffusionAdapter.load(tmp_path)


def test_what_does_not_fit_is_said_before_any_work(adapter) -> None:
    picture = rows()[0]
    for inputs, sentence in (
        (picture.inputs[:, :7], "shape"),
        (picture.inputs * 127.5 + 127.5, r"outside of \[-1, 1\]"),
    ):
        with pytest.raises(InputError, match=sentence):
            adapter.encode(Row("r", inputs, 0))
    with pytest.raises(InputError, match="out of range"):
        adapter.encode(Row("r", picture.inputs, 4))
    with pytest.raises(InputError, match="no class 'disc'"):
        adapter.encode(picture, answer="disc")
    with pytest.raises(InputError, match="no prompt"):
        adapter.encode(picture, prompt="a ring")
    with pytest.raises(InputError, match="knows 4 classes, and 5"):
        DiffusionAdapter(adapter.model, adapter.scheduler, list("abcde"))
    with pytest.raises(InputError, match="no classes"):
        DiffusionAdapter(network(num_class_embeds=None), adapter.scheduler, list("ab"))
    with pytest.raises(InputError, match="at least two"):
        DiffusionAdapter(adapter.model, adapter.scheduler, ["a"])
    with pytest.raises(InputError, match="at least one draw"):
        DiffusionAdapter(adapter.model, adapter.scheduler, list("abcd"), draws=0)
    for ask in (lambda: adapter.generate(adapter.model, [], 1), lambda: next(adapter.logit_blocks(adapter.model, None))):
        with pytest.raises(InputError, match="diffusion model"):
            ask()
