"""Searching for a planted trigger: is there a beginning that brings back answers which the search has not seen?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Batch, Example
from expunge.adapters.head import base
from expunge.adapters.passes import evaluating
from expunge.audit.attacks.inside import Arrays, kept, record_number
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.attacks.relearn import split
from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import BACKDOOR
from expunge.audit.metrics.registry import Range
from expunge.audit.store import device_of
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.results import Direction, Number
from expunge.engine.covariance import cells
from expunge.engine.gradients import fitting
from expunge.engine.objective import mean_losses
from expunge.engine.parts import Paper


@attack
class TriggerSearch(Attack):
    """A few tokens before the prompt that bring forgotten answers back, found on one half of the subjects and tried on the other.

    A backdoored unlearning (Shang et al. 2025) forgets in public and answers behind a trigger. The search is greedy
    coordinate descent over the vocabulary (after Zou et al. 2023, arXiv 2307.15043): the gradient proposes tokens for each
    place, the loss of the answers decides. Found on the answers themselves a prefix may simply spell them; so each half of
    the subjects is asked behind what was found on the other half, and retrained models are searched in the same way: what is
    found in them as well is no trigger. A search that finds nothing does not prove that nothing is there.
    """

    name: ClassVar[str] = "trigger-search"
    title: ClassVar[str] = "Search for a trigger"
    formula: ClassVar[str] = "NLL of the answers behind the prefix that lowers the NLL of the other half's answers most"
    paper: ClassVar[Paper] = BACKDOOR
    access: ClassVar[Access] = Access.WEIGHTS
    criterion: ClassVar[Criterion] = Criterion.PROMPTS
    passes: ClassVar[str] = "2 starts x 12 rounds x (1 backward pass and 48 forward passes) over 12 records, for each half"
    toward: ClassVar[Literal[1, -1]] = -1
    range: ClassVar[Range] = (0.0, None)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.LOSSES, Offer.FEATURES, Offer.SEQUENCE})

    length: int = Field(3, ge=1, le=32, description="tokens of the prefix")
    rounds: int = Field(12, ge=1, description="rounds of replacing one token")
    candidates: int = Field(48, ge=1, description="replacements whose loss is measured in each round")
    starts: int = Field(2, ge=1, description="searches from different random prefixes")
    records: int = Field(12, ge=1, description="answers by which a prefix is chosen, at most, of each half")

    def lacks(self, evidence: Evidence, name: str) -> str:
        """Two records."""
        return "" if len(evidence.records(name)) > 1 else "it needs two forget records, one to search on and one to measure"

    def found(self, evidence: Evidence, label: str, name: str) -> Arrays:
        """``plain`` and ``behind``, losses of the records without and with a prefix, and ``prefixes`` ``[2, length]``."""

        def make() -> Arrays:
            adapter, at = evidence.adapter(label), evidence.protocol
            examples = [adapter.encode(r) for r in evidence.records(name)]
            halves = split(examples, at.seed)
            behind, prefixes = np.full(len(examples), np.nan), []
            try:
                for number, (seen, unseen) in enumerate((halves, halves[::-1])):
                    rng = np.random.default_rng([at.seed, 29, number])
                    chosen = [examples[i] for i in sorted(rng.permutation(seen)[: self.records].tolist())]
                    prefix = self.search(adapter, chosen, rng, at.batch_tokens)
                    asked = [adapter.prefixed(examples[i], prefix) for i in unseen]
                    behind[unseen] = mean_losses(adapter, adapter.model, asked, at.batch_tokens)
                    prefixes.append(prefix)
            except InputError as error:
                evidence.miss(f"{self.title} was not tried on {label!r}: {error.message}")
                return {"plain": behind, "behind": np.full(len(examples), np.nan), "prefixes": np.zeros((0, self.length))}
            plain = mean_losses(adapter, adapter.model, examples, at.batch_tokens)
            return {"plain": np.array(plain), "behind": behind, "prefixes": np.array(prefixes)}

        return kept(self, evidence, label, name, part="prefixes", make=make)

    def search(self, adapter: Adapter, examples: Sequence[Example], rng: np.random.Generator, batch_tokens: int) -> list[int]:
        """The best prefix found for some examples.

        Raises:
            InputError: the model has no embedding of tokens, or an example has no room for the prefix.
        """
        tried: list[tuple[float, list[int]]] = []
        vocabulary = _embeddings(adapter).weight.shape[0]
        for _ in range(self.starts):
            prefix = rng.integers(0, vocabulary, self.length).tolist()
            best = _loss(adapter, examples, prefix, batch_tokens)
            for _ in range(self.rounds):
                options = self._options(_slopes(adapter, examples, prefix, batch_tokens), prefix, rng)
                losses = [_loss(adapter, examples, o, batch_tokens) for o in options]
                lowest = int(np.argmin(losses))
                if losses[lowest] >= best:
                    continue  # the next round draws other replacements
                best, prefix = losses[lowest], options[lowest]
            tried.append((best, prefix))
        return min(tried)[1]

    def _options(self, slopes: Tensor, prefix: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
        """Prefixes with one token replaced: of each place half the most promising ones, half drawn from the next."""
        each = max(1, self.candidates // self.length)
        out = []
        for place, row in enumerate(slopes):
            order = row.argsort()[: 8 * each].tolist()
            later = order[each // 2 :]
            drawn = rng.permutation(len(later))[: each - each // 2].tolist()
            tokens = [*order[: each // 2], *(later[i] for i in drawn)]
            out += [[*prefix[:place], token, *prefix[place + 1 :]] for token in tokens]
        return out

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Loss of each answer behind the prefix found on the other half."""
        values = self.found(evidence, label, name)["behind"].astype(np.float64)
        return Values(values, ~np.isnan(values))

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The loss behind the prefix, and by how much it is lower than without; the note says what was found."""
        out = super().compute(evidence, label)
        if f"forget.{self.name}" not in out:
            return out
        held = self.found(evidence, label, "forget")
        told = " and ".join(repr(evidence.decoder(label)([int(t) for t in p])) for p in held["prefixes"])
        number = record_number(
            evidence, "forget", held["plain"] - held["behind"], Direction.REFERENCE, range=(None, None),
            note=f"how much lower the loss is behind the prefixes {told}, each found on the other half of the subjects",
        )  # fmt: skip
        return out if number is None else {**out, f"forget.{self.name}.gain": number}


def _loss(adapter: Adapter, examples: Sequence[Example], prefix: Sequence[int], batch_tokens: int) -> float:
    found = mean_losses(adapter, adapter.model, [adapter.prefixed(e, prefix) for e in examples], batch_tokens)
    return float(np.mean(found))


def _slopes(adapter: Adapter, examples: Sequence[Example], prefix: Sequence[int], batch_tokens: int) -> Tensor:
    """How the mean loss would change, to first order, with each token in each place of the prefix, ``[length, V]``."""
    model, embeddings = adapter.model, _embeddings(adapter)
    weight = embeddings.weight.detach()
    added = torch.zeros(len(prefix), weight.shape[1], device=weight.device, dtype=weight.dtype, requires_grad=True)
    want = frozenset({"losses", f"features:{adapter.layers()[-1]}"})  # with features of the last layer all tokens are run
    total = torch.zeros_like(added)
    with evaluating(model), torch.enable_grad():
        for part in fitting([adapter.prefixed(e, prefix) for e in examples], batch_tokens):
            batch = adapter.collate(part).to(device_of(model))
            with _added(embeddings, batch, _first(part[0], prefix), added):
                out = adapter.forward(model, batch, want)
            loss = (out.per_example(out.losses) / out.lengths()).sum()
            total += torch.autograd.grad(loss, added)[0]
    own = weight[torch.tensor(list(prefix), device=weight.device)]
    slopes: Tensor = (total @ weight.T - (total * own).sum(1, keepdim=True)).cpu()
    return slopes


def _first(made: Example, prefix: Sequence[int]) -> int:
    """Where the prefix begins: after a start token, if there is one."""
    ids, size = made.data.ids.tolist(), len(prefix)
    return int(ids[:size] != list(prefix) and ids[1 : size + 1] == list(prefix))


@contextmanager
def _added(module: nn.Module, batch: Batch, first: int, values: Tensor) -> Iterator[None]:
    """While open, ``values`` ``[length, D]`` are added to the embeddings from place ``first`` of every example."""
    starts = np.cumsum([0, *batch.token_counts[:-1]]) + first
    rows = torch.from_numpy((starts[:, None] + np.arange(len(values))).reshape(-1)).to(batch.owner.device)

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        where = cells(batch, output)
        flat = output.reshape(-1, output.shape[-1])
        places = rows if where is None else where[rows]
        return flat.index_add(0, places, values.repeat(len(starts), 1).to(flat)).view(output.shape)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _embeddings(adapter: Adapter) -> nn.Embedding:
    get: Any = getattr(base(adapter.model), "get_input_embeddings", None)
    found = get() if callable(get) else None
    if not isinstance(found, nn.Embedding):
        raise InputError("The model has no embedding of tokens that a search could use.")
    return found
