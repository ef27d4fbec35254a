"""S3T: deletions cut chains without training, and what is left is what a training without the slices makes."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.methods.prepared.small import accuracy, files
from torch import nn

from expunge.core.errors import InputError
from expunge.data.rows import Table, table
from expunge.engine.members import Training
from expunge.engine.prepared import Job
from expunge.engine.record import Record
from expunge.engine.source import Source
from expunge.methods.prepared import sequences
from expunge.methods.prepared.s3t import S3T

METHOD = S3T(shards=2, slices=4, chains=2, rank=4, alpha=8, dropout=0.0)
TRAINING = Training(steps=100, batch=16, lr=1e-2)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


@functools.cache
def taught() -> dict[str, torch.Tensor]:
    """Weights of a base that was trained a little on other pictures, under other names of the classes."""
    held = images(300, 99)
    x, y = torch.from_numpy(held.inputs), (torch.from_numpy(held.targets) + 1) % 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vit()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(30):
            at = torch.arange(50) + 50 * (step % 6)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixel_values=x[at]).logits, y[at]).backward()
            optimizer.step()
    return {k: v for k, v in model.state_dict().items() if not k.startswith("classifier")}


def with_base() -> nn.Module:
    model = vit()
    model.load_state_dict(taught(), strict=False)
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3)
    )


class Blocks(nn.Module):
    """A plain network with a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def images(n: int = 160, seed: int = 0) -> Table:
    """Four classes by which quarter is bright."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 4, n)
    x = 0.5 * draw.normal(size=(n, 1, 8, 8))
    for i, k in enumerate(y):
        x[i, 0, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1.5
    return table(x, y, ids=[f"i{k}" for k in range(n)], columns={"risk": np.arange(n) / n})


def source() -> Source:
    return Source(images(), with_base, TRAINING)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s3t") / "run"
    report = METHOD.train(source(), folder)
    assert report.notes == ("About 17 deletions of rows that are alike until no chain is left.",)
    return folder


PLAIN = S3T(shards=2, slices=4, chains=2, rank=2, alpha=4, layers=("0",))


def plain_source() -> Source:
    draw = np.random.default_rng(0)
    y = draw.integers(0, 4, 80)
    held = table(np.eye(4, 8)[y] * 2 + draw.normal(size=(80, 8)), y)
    return Source(held, Blocks, Training(steps=40, batch=16, lr=0.02))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    PLAIN.train(plain_source(), folder)
    return folder


def rows_of(folder: Path, shard: int, part: int) -> list[str]:
    return [name for name, s, r in Record.open(folder).plan["rows"] if (s, r) == (shard, part)]


def test_a_deletion_cuts_the_chain_and_trains_nothing(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    before = files(folder)
    assert set(before) == {f"shards/00{s}/{c}.safetensors" for s in (1, 2) for c in ("1", "1-2", "1-2-3", "1-2-3-4", *OTHER)}
    name = rows_of(folder, 0, 2)[0]
    report = METHOD.delete(source(), folder, [name])
    gone = {f"shards/001/{c}.safetensors" for c in ("1-2-3", "1-2-3-4", "2-3", "2-3-4", "2-3-4-1")}
    assert files(folder) == {k: v for k, v in before.items() if k not in gone}
    assert report.row_visits == 0
    assert report.full_row_visits > 0
    assert report.redone == ("shard 1: 2 chains cut, 0 ended, 2 of 4 stages left",)
    assert report.notes == ("2 of 2 shards are left.",)
    assert len(METHOD.load(source(), folder).members) == 2


OTHER = ("2", "2-3", "2-3-4", "2-3-4-1")


def test_what_is_left_never_saw_the_slice(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "run"))
    never = [name for r in (2, 3) for name in rows_of(folder, 0, r)]
    PLAIN.delete(plain_source(), folder, never[:1])
    PLAIN.train(plain_source(), tmp_path / "never", without=never)
    left, there = files(folder), files(tmp_path / "never")
    compared = [k for k in left if k in ("shards/001/1.safetensors", "shards/001/1-2.safetensors", "shards/001/2.safetensors")]
    assert len(compared) == 3
    assert all(left[k] == there[k] for k in compared)
    assert all(left[k] == there[k] for k in left if "002/" in k)

    # The whole model too: the head is rolled back, and the adapters below do nothing.
    x = torch.from_numpy(plain_source().table.inputs)
    job = Job(plain_source(), Record.open(folder))
    found = PLAIN.load(plain_source(), folder).member_scores(x)[0]
    keys = PLAIN._keys(job, PLAIN._slices(job))
    model = PLAIN._adapted(job, None)()
    state = dict(model.named_parameters())
    with torch.no_grad():
        for k in ("1", "1-2"):
            from safetensors.torch import load_file

            for name, value in load_file(tmp_path / "never" / "shards" / "001" / f"{k}.safetensors").items():
                state[name].copy_(value)
        assert torch.equal(found, model.eval()(x))
    assert (0, 0, 1, 2) in keys
    for group in PLAIN._adapted(job, None).groups[2:]:
        for layer in group:
            assert not state[f"{layer}.lora_B.default.weight"].any()


def test_longer_chains_know_more_and_all_know_something(trained: Path, tmp_path: Path) -> None:
    unseen, given = images(200, 7), source()
    job = Job(given, Record.open(trained))
    keys = METHOD._keys(job, METHOD._slices(job))
    found = []
    for end in range(1, 5):
        at = []
        for part in [(s, *chain[:end]) for s in (0, 1) for chain in ((0, 1, 2, 3), (1, 2, 3, 0))]:
            model = METHOD._adapted(job, None)()
            held = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in METHOD._state(job, part, keys).items():
                    held[name].copy_(value)
                logits = model.eval()(pixel_values=torch.from_numpy(unseen.inputs)).logits
            at.append(float((logits.argmax(1).numpy() == unseen.targets).mean()))
        found.append(float(np.mean(at)))
    assert found[0] > 0.5, found
    assert found[-1] > found[0] + 0.05, found
    assert accuracy(METHOD.load(given, trained), unseen) > 0.8


def test_only_the_group_of_the_stage_and_the_head_move(trained: Path) -> None:
    from safetensors.torch import load_file

    names = [set(load_file(trained / "shards" / "001" / f"{c}.safetensors")) for c in ("1", "1-2", "1-2-3", "1-2-3-4")]
    head = {"classifier.weight", "classifier.bias"}
    for stage, held in enumerate(names):
        assert head < held
        assert {int(n.split(".layers.")[1].split(".")[0]) for n in held - head} == {3 - stage}
        assert all("lora_" in n for n in held - head)


def test_shards_end_and_the_last_chain_is_kept(trained: Path, tmp_path: Path) -> None:
    folder, given = Path(shutil.copytree(trained, tmp_path / "run")), source()
    first = [rows_of(folder, 0, r)[0] for r in (0, 1)]
    report = METHOD.delete(given, folder, first)
    assert report.notes == ("1 of 2 shards are left.",)
    assert len(METHOD.load(given, folder).members) == 1
    before = files(folder)
    with pytest.raises(InputError, match="No chain of any shard would be left"):
        METHOD.delete(given, folder, [rows_of(folder, 1, r)[0] for r in (0, 1)])
    assert files(folder) == before
    assert Record.open(folder).pending is None


def test_an_interrupted_training_goes_on_and_an_interrupted_deletion_too(plain: Path, tmp_path: Path) -> None:
    folder, given = tmp_path / "run", plain_source()

    def stop(done: int, total: int, what: str) -> None:
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PLAIN.train(given, folder, progress=stop)
    assert 0 < len(files(folder)) < 16
    PLAIN.train(given, folder)
    assert files(folder) == files(plain)
    name = rows_of(folder, 1, 1)[0]
    Record.open(folder).begin([name])  # as if killed right after the request was written down
    (folder / "shards" / "002" / "1-2-3.safetensors").unlink()
    PLAIN.delete(given, folder, [name])
    assert not [k for k in files(folder) if k.startswith("shards/002/") and "2" in k.rpartition("/")[2]]
    (folder / "shards" / "001" / "1.safetensors").unlink()
    with pytest.raises(InputError, match="is missing"):
        PLAIN.delete(given, folder, [rows_of(folder, 0, 3)[0]])


@pytest.mark.parametrize("chains", [1, 2, 3, 4, 6])
def test_deletions_until_no_chain_is_left(chains: int) -> None:
    shards, slices, draw = 5, 6, np.random.default_rng(chains)
    orders, found = sequences.cyclic(range(slices), chains), []
    for _ in range(300):
        hit: list[set[int]] = [set() for _ in range(shards)]
        count = 0
        while any(sequences.length(c, hit[s]) for s in range(shards) for c in orders):
            hit[draw.integers(shards)].add(int(draw.integers(slices)))
            count += 1
        found.append(count)
    expected = sequences.expected_deletions(shards, slices, chains)
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(300))
    assert {1: 68.5, 2: 87.9, 3: 99.5, 4: 107.9, 6: 119.8}[chains] == pytest.approx(expected, abs=0.06)


def test_cyclic_orders_begin_differently_and_are_different() -> None:
    assert sequences.cyclic(range(3), 2) == [(0, 1, 2), (1, 2, 0)]
    for slices in (2, 3, 4):
        for count in range(1, int(np.prod(range(1, slices + 1))) + 1):
            found = sequences.cyclic(range(slices), count)
            assert len(set(found)) == count
            assert all(sorted(c) == list(range(slices)) for c in found)
            assert len({c[0] for c in found}) == min(count, slices)
    with pytest.raises(InputError, match="6 orders"):
        sequences.cyclic(range(3), 7)


def test_matched_orders_put_the_risky_slices_last() -> None:
    p = [0.4, 0.3, 0.2, 0.1]
    found = sequences.matched(p, 4, deletions=5)
    assert {c[0] for c in found} == {0, 1, 2, 3}
    assert found[0][0] == 3, "the safest beginning is the best chain"
    scores = [sequences.score(c, p, 5) for c in found]
    assert scores == sorted(scores, reverse=True)
    assert sequences.score((3, 2, 1, 0), p, 5) > sequences.score((0, 1, 2, 3), p, 5)
    assert sequences.score((1, 0), [0.5, 0.25, 0.25], 2) == pytest.approx(0.75**2 + 2 * 0.25**2)
    for early, late in zip(found[0], found[0][1:], strict=False):
        assert p[early] < p[late]


def test_risks_decide_slices_and_orders(tmp_path: Path) -> None:
    method = METHOD.model_copy(update={"risk": "risk", "chains": 1})
    plan = method.plan(source())
    mean = [np.mean([int(name[1:]) for name, _, r in plan["rows"] if r == k]) for k in range(4)]
    assert mean == sorted(mean)
    assert plan["chains"] == [[0, 1, 2, 3]]
    with pytest.raises(InputError, match="no column 'age'"):
        METHOD.model_copy(update={"risk": "age"}).plan(source())


def test_any_network_with_a_list_of_blocks(tmp_path: Path) -> None:
    given = plain_source()
    held = given.table
    method = S3T(shards=2, slices=2, chains=2, rank=2, alpha=4, layers=("0",), reads="slice")
    method.train(given, tmp_path / "run")
    method.delete(given, tmp_path / "run", ["0", "1"])
    assert accuracy(method.load(given, tmp_path / "run"), held) > 0.4
    for settings, said in (
        ({"layers": ("query",)}, "no linear layer called query"),
        ({"layers": ("0",), "slices": 5}, "4 blocks cannot make 5 groups"),
        ({"layers": ("0",), "shards": 50}, "80 rows cannot be dealt"),
    ):
        with pytest.raises(InputError, match=said):
            S3T(**settings).train(given, tmp_path / "bad")
    with pytest.raises(InputError, match="no list of blocks"):
        S3T(shards=1).train(Source(held, lambda: nn.Linear(8, 4), TRAINING), tmp_path / "bad")


def test_token_ids(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    y, x = draw.integers(0, 3, 40), draw.integers(4, 30, (40, 6))
    x[:, 2] = y + 1
    given = Source(table(x, y), bert, Training(steps=24, batch=8, lr=1e-2))
    method = S3T(shards=1, slices=2, chains=2, rank=4)
    method.train(given, tmp_path / "run")
    model = method.load(given, tmp_path / "run")
    with torch.no_grad():
        before = model(torch.from_numpy(x))
        assert before.shape == (40, 3)
        method.delete(given, tmp_path / "run", ["3"])
        assert not torch.equal(before, method.load(given, tmp_path / "run")(torch.from_numpy(x)))
