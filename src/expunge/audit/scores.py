"""One forward pass per (model, example): everything that any score-based metric or attack reads, per target, cached by content.

Log-softmax, means and spreads are computed in float32 whatever the precision of the model: with the 8 mantissa bits of
bfloat16 losses fall on a coarse grid, and the ties distort every rank statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expunge.adapters.base import Adapter, Example
from expunge.adapters.passes import evaluating
from expunge.audit.store import Arrays, ScoreStore, compute_signature, device_of, examples_digest
from expunge.core.access import Offer
from expunge.core.errors import InputError

Progress = Callable[[str, int, int], None]  #: (what is being done, done so far, of how many)
End = Literal["include", "exclude"]  #: whether the end token that the adapter appended counts as part of the answer
Floats = npt.NDArray[np.float64]

FIELDS: dict[str, type[np.generic]] = {
    "logp": np.float32,
    "hit": np.bool_,
    "rank": np.int32,
    "mean_logp": np.float32,
    "std_logp": np.float32,
}
_TYPES = {"logp": torch.float32, "hit": torch.bool, "rank": torch.int32, "mean_logp": torch.float32, "std_logp": torch.float32}
_BLOCK = 1 << 21  # scores reduced at a time: the four passes over them stay in the processor's cache, or nearly so
_SURELY_ZERO = -200.0  # exp(-200) is 0 in float32, so p log p is 0 there instead of 0 * -inf


def token_statistics(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What is kept of each target's distribution.

    Args:
        logits: scores of the target at row ``n`` over all classes, any float type, ``[N, V]`` (a language model's row for
            target ``y_t`` is its output at the position before ``y_t``).
        targets: class ids, int64 ``[N]``.

    Returns:
        Float32 / bool / int32 tensors ``[N]``: ``logp`` = log p(target); ``hit`` = the target is the argmax (the first one
        on a tie, as greedy decoding takes it); ``rank`` = classes with a strictly greater score (0 is best); ``mean_logp`` =
        sum_v p log p (minus the entropy, in nats); ``std_logp`` = its standard deviation, sqrt(sum_v p (log p - mean)^2).
    """
    rows = max(1, _BLOCK // max(logits.shape[1], 1))
    parts = [_statistics(logits[a : a + rows].float(), targets[a : a + rows]) for a in range(0, len(targets), rows)]
    if not parts:
        return {n: torch.zeros(0, dtype=_TYPES[n], device=logits.device) for n in _TYPES}
    return {n: torch.cat([part[n] for part in parts]) for n in _TYPES}


def _statistics(scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
    own = scores.gather(1, targets.unsqueeze(1))
    hit = scores.argmax(dim=1) == targets
    rank = (scores > own).sum(dim=1).to(torch.int32)
    logp_all = torch.log_softmax(scores, dim=1)
    logp = logp_all.gather(1, targets.unsqueeze(1)).squeeze(1)
    logp_all.clamp_(min=_SURELY_ZERO)
    p = logp_all.exp()
    mean = (p * logp_all).sum(dim=1)
    std = (p * logp_all.sub_(mean.unsqueeze(1)).square_()).sum(dim=1).sqrt()
    return {"logp": logp, "hit": hit, "rank": rank, "mean_logp": mean, "std_logp": std}


@dataclass(frozen=True)
class Shard:
    """Per-target arrays of consecutive examples, in memory or in the store; ``counts`` are targets per example."""

    counts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    held: Arrays | None = None
    store: ScoreStore | None = None
    key: str = ""

    def read(self, names: Sequence[str]) -> Arrays:
        """The named arrays, ``[sum(counts)]`` each."""
        if self.held is not None:
            return {n: self.held[n] for n in names}
        arrays = self.store.load_arrays(self.key, names) if self.store is not None else None
        if arrays is None:
            raise InputError(f"The score file {self.key} has vanished or is damaged.", "Start the audit again: it is made anew.")
        return arrays


@dataclass(frozen=True)
class TokenScores:
    """Scores of a list of examples, read shard by shard, so that memory does not grow with the number of examples.

    Attributes:
        ids: example ids (E).
        clusters: their independent units (E).
        shards: the per-target arrays.
        counts: targets per example, int64 ``[E]``, the end token included.
        ends: how many of these targets are an appended end token, int64 ``[E]``.
    """

    ids: tuple[str, ...]
    clusters: tuple[str, ...]
    shards: tuple[Shard, ...]
    counts: npt.NDArray[np.int64] = field(init=False)
    ends: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        none = np.zeros(0, dtype=np.int64)
        object.__setattr__(self, "counts", np.concatenate([none, *(s.counts for s in self.shards)]))
        object.__setattr__(self, "ends", np.concatenate([none, *(s.ends for s in self.shards)]))

    def __len__(self) -> int:
        return len(self.ids)

    def examples(self, *names: str, end: End = "include") -> Iterator[tuple[npt.NDArray[Any], ...]]:
        """For each example in order, its arrays of the named fields (:data:`FIELDS`), ``[T]`` each.

        ``end="exclude"`` leaves out an end token that was appended, and only that: an answer without one keeps its last token.
        """
        for shard in self.shards:
            arrays = shard.read(names)
            stops = np.cumsum(shard.counts)
            kept = stops - (shard.ends if end == "exclude" else 0)
            for start, stop in zip(stops - shard.counts, kept, strict=True):
                yield tuple(arrays[n][start:stop] for n in names)

    def reduce(self, function: Callable[..., float], *names: str, end: End = "include") -> Floats:
        """``function`` of each example's arrays, float64 ``[E]``; NaN for an example without targets (it is skipped, not 0)."""
        out = np.full(len(self), np.nan)
        for i, arrays in enumerate(self.examples(*names, end=end)):
            if arrays[0].size:
                out[i] = function(*arrays)
        return out

    def nll(self, end: End = "include") -> Floats:
        """Mean negative log-likelihood per target of each example in nats, float64 ``[E]``; NaN without targets."""
        return self.reduce(lambda logp: -float(np.mean(logp, dtype=np.float64)), "logp", end=end)

    def entropy(self, end: End = "include") -> Floats:
        """Mean entropy of the predicted distributions of each example in nats, float64 ``[E]``."""
        return self.reduce(lambda mean: -float(np.mean(mean, dtype=np.float64)), "mean_logp", end=end)


def score(
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    store: ScoreStore | None = None,
    fingerprint: str | None = None,
    batch_tokens: int = 8192,
    shard_examples: int = 512,
    progress: Progress | None = None,
    what: str = "scoring",
) -> TokenScores:
    """Score examples under the adapter's model with one forward pass each, or none where the store has them.

    Examples are taken ``shard_examples`` at a time (``examples`` may encode lazily), sorted by length within that, and
    batched so that no batch has more than ``batch_tokens`` padded tokens; logits come in blocks, so ``[N, V]`` is never
    held. A shard is written when it is done: an interrupted audit goes on from there.

    Args:
        adapter: holds the model.
        examples: what to score (E).
        store: where scores are kept; None keeps them in memory.
        fingerprint: the adapter's fingerprint, if it is known already (computing it reads all weights).
        batch_tokens: padded tokens per batch; part of the cache key.
        shard_examples: examples per file.
        progress: called after each shard.
        what: its first argument.

    Returns:
        The scores, in the order of ``examples``.
    """
    signature = compute_signature(adapter, batch_tokens)
    identity = fingerprint or (adapter.fingerprint() if store is not None else "")
    ids: list[str] = []
    clusters: list[str] = []
    shards: list[Shard] = []
    for start in range(0, len(examples), shard_examples):
        block = [examples[i] for i in range(start, min(start + shard_examples, len(examples)))]
        counts = np.array([e.n_targets for e in block], dtype=np.int64)
        ends = np.array([end_targets(e) for e in block], dtype=np.int64)
        ids += [e.id for e in block]
        clusters += [e.cluster for e in block]
        if store is None:
            shards.append(Shard(counts, ends, held=_score_block(adapter, block, counts, batch_tokens)))
        else:
            key = store.key("scores", identity, signature, examples_digest(adapter, block))
            if not _stored(store, key, int(counts.sum())):
                store.save_arrays(key, _score_block(adapter, block, counts, batch_tokens))
            shards.append(Shard(counts, ends, store=store, key=key))
        if progress is not None:
            progress(what, min(start + shard_examples, len(examples)), len(examples))
    return TokenScores(tuple(ids), tuple(clusters), tuple(shards))


def end_targets(example: Example) -> int:
    """How many of the example's last targets are an end token rather than text (0 or 1), where its adapter says so.

    An adapter says so by a true ``ends`` in :attr:`Example.data`. Plain text ends without one, and then its last token is
    text like any other: leaving out the last target of everything would lose a real token there.
    """
    return int(bool(getattr(example.data, "ends", False)))


def by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of ``lengths`` grouped into batches, longest first, with at most ``budget`` padded units each (or one item).

    Longest first makes memory run out, if it does, at the start.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    at = 0
    while at < len(order):
        room = max(1, budget // max(lengths[order[at]], 1))
        yield order[at : at + room]
        at += room


def _stored(store: ScoreStore, key: str, n_targets: int) -> bool:
    if not store.arrays_path(key).is_file():
        return False
    arrays = store.load_arrays(key, ["logp"])
    return arrays is not None and arrays["logp"].shape == (n_targets,)


@torch.no_grad()
def _score_block(adapter: Adapter, block: Sequence[Example], counts: npt.NDArray[np.int64], batch_tokens: int) -> Arrays:
    model = adapter.model
    device = device_of(model)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    out: dict[str, npt.NDArray[Any]] = {n: np.empty(int(counts.sum()), dtype=t) for n, t in FIELDS.items()}
    with evaluating(model):
        for chosen in by_length([e.units for e in block], batch_tokens):
            batch = adapter.collate([block[i] for i in chosen]).to(device)
            place = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
            if Offer.LOGITS not in adapter.offers:
                losses = adapter.forward(model, batch, frozenset({"losses"})).losses
                for name, values in _from_losses(losses).items():
                    out[name][place] = values.cpu().numpy()
                continue
            for first, logits in adapter.logit_blocks(model, batch):
                rows = slice(first, first + logits.shape[0])
                for name, values in token_statistics(logits, batch.targets[rows]).items():
                    out[name][place[rows]] = values.cpu().numpy()
    return out


def _from_losses(losses: Tensor) -> dict[str, Tensor]:
    """What is known of targets that no distribution over classes is predicted for: minus the loss stands for ``logp``."""
    unknown = torch.full_like(losses, float("nan"))
    return {
        "logp": -losses.float(), "hit": torch.zeros_like(losses, dtype=torch.bool),
        "rank": torch.zeros_like(losses, dtype=torch.int32), "mean_logp": unknown, "std_logp": unknown,
    }  # fmt: skip
