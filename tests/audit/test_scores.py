from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from audit_models import Counter

from expunge.adapters.language import LanguageAdapter
from expunge.audit.generations import cut, generate, shorten
from expunge.audit.metrics.memorisation import extraction_strength
from expunge.audit.probes import probes, take_clusters
from expunge.audit.scores import by_length, end_targets, score, token_statistics
from expunge.audit.store import ScoreStore, compute_signature


def direct(adapter, example) -> dict[str, np.ndarray]:
    """The same quantities by one unbatched forward of the bare model in float64."""
    ids = torch.tensor(example.data.ids[None].astype(np.int64))
    with torch.no_grad():
        logits = adapter.model(input_ids=ids).logits[0].double()
    rows = logits[example.data.start - 1 : -1]
    labels = ids[0, example.data.start :]
    logp = torch.log_softmax(rows, 1)
    p = logp.exp()
    mean = (p * logp).sum(1)
    own = logp.gather(1, labels[:, None])
    return {
        "logp": own[:, 0].numpy(),
        "hit": (rows.argmax(1) == labels).numpy(),
        "rank": (logp > own).sum(1).numpy(),
        "mean_logp": mean.numpy(),
        "std_logp": ((p * logp**2).sum(1) - mean**2).sqrt().numpy(),
    }


def test_statistics_of_known_distributions():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [1.0, 2.0, float("-inf"), 0.0]])
    found = token_statistics(logits, torch.tensor([1, 0, 1]))
    assert found["logp"][0] == pytest.approx(-math.log(4))
    assert found["mean_logp"][0] == pytest.approx(-math.log(4))
    assert found["std_logp"][0] == pytest.approx(0, abs=1e-6)
    assert found["hit"].tolist() == [False, True, True]  # a tie goes to the first class, as in greedy decoding
    assert found["rank"].tolist() == [0, 0, 0]
    p = np.exp([1, 2, 0]) / np.exp([1, 2, 0]).sum()
    assert found["mean_logp"][2] == pytest.approx((p * np.log(p)).sum(), abs=1e-6)
    assert torch.isfinite(found["std_logp"]).all()


def test_bfloat16_logits_are_reduced_in_float32():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = torch.arange(50)
    found = token_statistics(logits, targets)
    exact = torch.log_softmax(logits.double(), 1)
    assert found["logp"].dtype == torch.float32
    assert torch.allclose(found["logp"].double(), exact[torch.arange(50), targets], atol=1e-5)
    p = exact.exp()
    sigma = ((p * exact**2).sum(1) - (p * exact).sum(1) ** 2).sqrt()
    assert torch.allclose(found["std_logp"].double(), sigma, atol=1e-4)


def test_scores_equal_a_direct_computation_whatever_the_batch(target, sets):
    examples = list(probes(target, sets["forget"], "perturbed"))[:25]
    padded = score(target, examples, batch_tokens=4096, shard_examples=10)
    single = score(target, examples, batch_tokens=1)
    names = ("logp", "hit", "rank", "mean_logp", "std_logp")
    for example, a, b in zip(examples, padded.examples(*names), single.examples(*names), strict=True):
        want = direct(target, example)
        for name, x, y in zip(names, a, b, strict=True):
            if name in ("hit", "rank"):
                assert (x == y).all()
                assert (x == want[name]).all()
            else:
                np.testing.assert_allclose(x, y, atol=1e-4)
                np.testing.assert_allclose(x, want[name], atol=2e-4)
    assert padded.ids == tuple(e.id for e in examples)
    assert padded.counts.tolist() == [e.n_targets for e in examples]


def test_one_forward_per_example_and_none_the_second_time(target, sets, tmp_path):
    store = ScoreStore(tmp_path)
    examples = probes(target, sets["retain"], "answer")
    with Counter(target.model) as first:
        a = score(target, examples, store=store, shard_examples=7)
    assert first.rows == len(examples)
    with Counter(target.model) as second:
        b = score(target, examples, store=ScoreStore(tmp_path), shard_examples=7)
    assert second.passes == 0
    np.testing.assert_array_equal(a.nll(), b.nll())


def changed(target, kind: str):
    if kind == "weight":
        other = target.copy()
        with torch.no_grad():
            next(other.model.parameters()).view(-1)[3] += 1e-3
        return other
    if kind == "template":
        return LanguageAdapter(target.model, target.tokenizer, template="Question: {prompt} \nAnswer: {answer}")
    if kind == "dtype":
        other = target.copy()
        other.model = other.model.to(torch.bfloat16)
        return other
    other = target.copy()
    other.model.set_attn_implementation("eager")
    return other


@pytest.mark.parametrize("kind", ["weight", "template", "dtype", "attention"])
def test_a_change_of_model_or_computation_invalidates(target, sets, tmp_path, kind):
    store = ScoreStore(tmp_path)
    score(target, probes(target, sets["forget"], "answer"), store=store)
    generate(target, probes(target, sets["forget"], "answer")[:3], 4, store=store)
    other = changed(target, kind)
    with Counter(other.model) as counted:
        score(other, probes(other, sets["forget"], "answer"), store=store)
        scored = counted.passes
        generate(other, probes(other, sets["forget"], "answer")[:3], 4, store=store)
    assert scored > 0
    assert counted.passes > scored


def test_other_answers_to_the_same_prompts_are_other_examples(target, sets, tmp_path):
    store = ScoreStore(tmp_path)
    first = sets["forget"][0]
    a = score(target, [target.encode(first)], store=store)
    b = score(target, [target.encode(first, answer=first.answer + " Indeed")], store=store)
    assert a.nll() != b.nll()
    assert compute_signature(target, 8)["batch_tokens"] == "8"


def test_a_damaged_file_is_computed_anew(target, sets, tmp_path):
    store = ScoreStore(tmp_path)
    examples = probes(target, sets["forget"], "answer")
    a = score(target, examples, store=store).nll()
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.warns(UserWarning, match="damaged"):
        b = score(target, examples, store=store).nll()
    np.testing.assert_array_equal(a, b)


def test_hits_predict_greedy_decoding_from_every_prefix(target, sets):
    """Extraction strength from one forward equals the search over prefixes by real generation."""
    seen = set()
    for record in [*sets["forget"][:6], *sets["retain"][:6], *sets["holdout"][:4]]:
        example = target.encode(record)
        (hits,) = next(score(target, [example]).examples("hit", end="exclude"))
        ids, start = example.data.ids, example.data.start
        answer = ids[start:-1].tolist()
        shortest = len(answer)
        for k in range(len(answer)):
            data = dataclasses.replace(example.data, ids=ids[: start + k + 1], start=start + k)
            cut_example = dataclasses.replace(example, data=data, n_targets=1, size=start + k + 1)
            (made,) = target.generate(target.model, [cut_example], len(answer) - k)
            if list(made.tokens) == answer[k:]:
                shortest = k
                break
        assert extraction_strength(hits) == pytest.approx(1 - shortest / len(answer))
        seen.add(round(extraction_strength(hits), 3))
    assert len(seen) > 1  # the models of the test neither know everything nor nothing


def test_only_an_appended_end_token_is_left_out(target, sets, text_records):
    question = target.encode(sets["forget"][0])
    text = target.encode(text_records[0])
    assert (end_targets(question), end_targets(text)) == (1, 0)
    scores = score(target, [question, text])
    with_end, without = (list(scores.examples("logp", end=e)) for e in ("include", "exclude"))
    assert len(without[0][0]) == len(with_end[0][0]) - 1
    assert len(without[1][0]) == len(with_end[1][0]) == text.n_targets


def test_a_shorter_view_equals_a_fresh_shorter_generation(target, sets, tmp_path):
    store = ScoreStore(tmp_path)
    examples = list(probes(target, sets["forget"], "answer"))
    long = generate(target, examples, 24, store=store)
    for limit in (1, 3, 8, 24):
        with Counter(target.model) as counted:
            view = generate(target, examples, limit, store=store)
        assert counted.passes == 0
        fresh = [target.generate(target.model, [e], limit)[0] for e in examples]
        assert view == fresh
        assert view == [shorten(target.decode, g, limit) for g in long]
    assert len({g.ended for g in generate(target, examples, 8, store=store)} | {g.ended for g in long}) == 2


def test_a_longer_limit_generates_again_and_replaces(target, sets, tmp_path):
    store = ScoreStore(tmp_path)
    examples = list(probes(target, sets["forget"], "answer"))
    generate(target, examples, 2, store=store)
    long = generate(target, examples, 12, store=store)
    assert max(len(g.tokens) for g in long) > 2
    assert long == generate(target, examples, 12)
    assert len(list(tmp_path.rglob("*.jsonl"))) == 1


def test_cut():
    assert cut(" yes \n\nQuestion: no", ("\n\n", "Question:")) == "yes"
    assert cut("Question: x", ("\n\n", "Question:")) == ""
    assert cut(" a b ", ()) == "a b"


def test_batches_hold_every_item_once_under_the_budget():
    lengths = [5, 1, 9, 3, 3, 200, 7]
    batches = list(by_length(lengths, 20))
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 20 for b in batches)
    assert batches[0] == [5]


def test_a_budget_drops_whole_clusters():
    clusters = [f"c{i // 4}" for i in range(40)]
    chosen = take_clusters(clusters, 18, seed=0)
    assert len(chosen) == 16
    names = [clusters[i] for i in chosen]
    assert all(names.count(n) == 4 for n in names)
    assert (take_clusters(clusters, 18, seed=0) == chosen).all()
    assert take_clusters(["one"] * 9, 5, seed=0).tolist() == [0, 1, 2, 3, 4]


class Wide:
    """Many lazily made examples of a few records."""

    def __init__(self, adapter, records, n: int) -> None:
        self.adapter, self.records, self.n = adapter, records, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        return self.adapter.encode(self.records[i % len(self.records)], suffix=f"#{i}")


def test_memory_does_not_grow_with_the_number_of_examples(fresh, sets, tmp_path):
    """Ten times as many examples: the arrays of one shard are held, not those of all."""

    def peak(n: int) -> int:
        store = ScoreStore(tmp_path / str(n))
        tracemalloc.start()
        scores = score(fresh, Wide(fresh, sets["forget"], n), store=store, fingerprint="f", shard_examples=32)
        scores.nll()
        scores.reduce(lambda *a: float(a[0].sum()), "hit", "rank", "mean_logp")
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(32)  # imports and caches
    few, many = peak(64), peak(640)
    targets = 640 * 9
    # Ids, clusters, counts and file names stay (some 300 bytes an example); arrays of all targets would be 17 bytes each on top.
    assert many - few < 640 * 500
    assert many < few + targets * 17 + 640 * 350 or many < 1.5 * few


def test_logits_of_a_batch_are_never_held_at_once():
    """Peak memory of scoring a batch whose logits would be 350 MB."""
    code = """
import resource, torch
from expunge.audit.scores import token_statistics, score
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.adapters.language import LanguageAdapter
from expunge.data.records import Record
torch.set_num_threads(1)
tokenizer = word_tokenizer(["a b c d e f g h "])
model = build("llama-tiny", tokenizer, vocab_size=20000)
adapter = LanguageAdapter(model, tokenizer)
examples = [adapter.encode(Record(id=str(i), answer="a b c d " * 48)) for i in range(24)]
score(adapter, examples[:1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score(adapter, examples, batch_tokens=1 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, sum(e.n_targets for e in examples))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    grown, targets = int(out[0]), int(out[1])
    whole = targets * 20000 * 4 / 2**20
    assert whole > 330
    assert grown < 0.6 * whole, f"{grown} MiB for logits of {whole:.0f} MiB"
