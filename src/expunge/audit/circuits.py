"""Which paths through a model carry an answer: edge attribution with integrated gradients (EAP-IG).

Hanna, Pezzelle and Belinkov 2024, *Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model Mechanisms*
(arXiv 2403.17806). For an input ``x``, its counterpart ``x'`` about another subject, and the log-probability ``M`` of the answer,

    s(u -> v) = (a_u(x') - a_u(x)) . 1/m sum_{j=1..m} dM / d in_v   at embeddings  e(x') + j/m (e(x) - e(x')),

summed over tokens: what ``M`` would change by, in first order, if the part ``v`` read what ``u`` makes of the other subject. The
scores of the embeddings' edges together are ``M(x') - M(x)`` once ``m`` is large, whatever the model.

The work is per node, not per weight: ``m + 1`` forward and ``m`` backward passes, and one product of all that sources add with
all that reaches targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from expunge.adapters import storage
from expunge.adapters.base import Batch
from expunge.adapters.head import head_of, pick, replaced_head
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import evaluating
from expunge.audit.scores import by_length
from expunge.audit.store import device_of
from expunge.audit.swaps import Swap
from expunge.audit.wiring import Caught, Wiring
from expunge.core.settings import Settings

ROOM = 1 << 30  #: bytes that what sources add and what reaches targets may take together


class CircuitSettings(Settings):
    """How circuits are found."""

    name: ClassVar[str] = "circuits"

    steps: int = Field(5, ge=1, le=1000, description="points between both inputs at which gradients are taken")
    counterparts: int = Field(1, ge=1, le=64, description="other subjects whose scores are added up")
    share: float = Field(0.1, gt=0, lt=1, description="share of the edges that make up a circuit: those of the largest scores")
    edges: int | None = Field(None, ge=1, description="their number instead")

    def size(self, n_edges: int) -> int:
        """How many edges a circuit has, of ``n_edges``: at least one, and not all of them."""
        wanted = self.edges if self.edges is not None else round(self.share * n_edges)
        return min(max(1, wanted), max(1, n_edges - 1))


def edge_scores(
    adapter: LanguageAdapter, wiring: Wiring, pairs: Sequence[Swap], settings: CircuitSettings, batch_tokens: int = 8192
) -> Tensor:
    """Scores of all edges for each pair of inputs, ``[pairs, E]`` on the CPU, in the order of ``wiring.graph.edges``.

    Args:
        adapter: holds the model.
        wiring: of this model.
        pairs: inputs and their counterparts.
        settings: how many points.
        batch_tokens: padded tokens per batch, at most; fewer where activations of all parts would not fit into :data:`ROOM`.
    """
    out = torch.zeros(len(pairs), wiring.graph.n_edges, dtype=_exact(wiring))
    for chosen, scores in _batches(adapter, wiring, pairs, settings, batch_tokens):
        out[chosen] = scores
    return out


def circuits(
    adapter: LanguageAdapter,
    wiring: Wiring,
    counterparts: Sequence[Sequence[Swap]],
    settings: CircuitSettings,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.bool_]:
    """The circuit of each record: the edges of the largest scores, whatever their sign, bool ``[records, E]``.

    Scores of several counterparts are added up first.

    Args:
        adapter, wiring, settings, batch_tokens: see :func:`edge_scores`.
        counterparts: of each record, at least one.
        progress: called with (records done, of how many).
    """
    out = np.zeros((len(counterparts), wiring.graph.n_edges), dtype=np.bool_)
    sizes = [held[0].example.units for held in counterparts]
    done = 0
    for some in by_length(sizes, batch_tokens):  # so that scores of all records are never held at once
        pairs = [p for i in some for p in counterparts[i]]
        owner = torch.tensor([row for row, i in enumerate(some) for _ in counterparts[i]])
        scores = edge_scores(adapter, wiring, pairs, settings, batch_tokens)
        out[some] = largest(scores.new_zeros(len(some), scores.shape[1]).index_add_(0, owner, scores), settings)
        done += len(some)
        if progress is not None:
            progress(done, len(counterparts))
    return out


def largest(scores: Tensor, settings: CircuitSettings) -> NDArray[np.bool_]:
    """The edges of the largest scores, whatever their sign, bool ``[records, E]``.

    Args:
        scores: of all edges, ``[records, E]``.
        settings: how many edges.
    """
    kept = scores.abs().topk(settings.size(scores.shape[1]), dim=1).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, kept, True).numpy()


def _exact(wiring: Wiring) -> torch.dtype:
    rows: Any = wiring.model.get_input_embeddings().weight
    return torch.promote_types(rows.dtype, torch.float32)


def _batches(
    adapter: LanguageAdapter, wiring: Wiring, pairs: Sequence[Swap], settings: CircuitSettings, batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Which pairs, and their scores ``[b, E]``."""
    graph, exact = wiring.graph, _exact(wiring)
    width = int(storage.text_config(wiring.model).hidden_size)
    each = (len(graph.sources) + 2 * len(graph.targets)) * width * exact.itemsize
    with evaluating(adapter.model), torch.enable_grad():
        for chosen in by_length([p.example.units for p in pairs], max(1, min(batch_tokens, ROOM // each))):
            scores = _scores(adapter, wiring, [pairs[i] for i in chosen], settings.steps, exact)
            yield chosen, scores[:, graph.edges].cpu()


def _scores(adapter: LanguageAdapter, wiring: Wiring, pairs: Sequence[Swap], steps: int, exact: torch.dtype) -> Tensor:
    """Scores ``[B, sources, targets]`` of one batch."""
    device = device_of(adapter.model)
    batch = adapter.collate([p.example for p in pairs]).to(device)
    counted = torch.from_numpy(np.concatenate([p.counted for p in pairs])).to(device)
    ids: Tensor = batch.tensors["input_ids"]
    other = ids.clone()
    for row, pair in enumerate(pairs):
        other[row, : len(pair.other)] = torch.from_numpy(pair.other).to(ids)
    embed = wiring.model.get_input_embeddings()
    with torch.no_grad():
        clean, corrupt = embed(ids[:, :-1]), embed(other[:, :-1])
        difference = wiring.added(_run(wiring, batch, counted, corrupt)[0]).to(exact)
    reached: Tensor | None = None
    for step in range(1, steps + 1):
        start = (corrupt + step / steps * (clean - corrupt)).requires_grad_()
        found, said = _run(wiring, batch, counted, start)
        held = wiring.inputs(found)
        gradients = list(torch.autograd.grad(said.sum(), held))
        own = wiring.reached(found, gradients).to(exact)
        reached = own if reached is None else reached.add_(own)
        if step == steps:  # the last point is the input itself
            difference -= wiring.added(found).to(exact)
    assert reached is not None
    size = (len(pairs), -1)
    return torch.bmm(_flat(difference, size), _flat(reached / steps, size).transpose(1, 2))


def _flat(parts: Tensor, size: tuple[int, int]) -> Tensor:
    """``[K, B, T, D]`` as ``[B, K, T D]``."""
    return parts.transpose(0, 1).reshape(size[0], parts.shape[0], -1)


def _run(wiring: Wiring, batch: Batch, counted: Tensor, start: Tensor) -> tuple[Caught, Tensor]:
    """What a pass from given embeddings leaves, and the log-probability of each answer's counted tokens, ``[B]``."""
    model: Any = wiring.model
    head = head_of(model)
    assert head is not None  # checked by the adapter
    width = start.shape[1]

    def compute(states: Tensor, original: Any) -> Tensor:
        scores: Tensor = original(pick(states, batch.owner, batch.tensors["predict"], width)[None])
        return scores

    accepted = storage.forward_parameters(model)
    options: dict[str, Any] = {k: batch.tensors[k][:, :width] for k in ("attention_mask", "position_ids") if k in accepted}
    if "use_cache" in accepted:
        options["use_cache"] = False
    with wiring.caught() as found, replaced_head(head, compute):
        logits = model(inputs_embeds=start, **options)["logits"][0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = logits.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
    return found, own.new_zeros(batch.n_examples).index_add(0, batch.owner, own * counted)
