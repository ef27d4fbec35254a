"""Rank-one concept redirection: a name is made to lead where another name leads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor

from expunge.adapters.base import Adapter
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import evaluating
from expunge.adapters.places import Place, asked, find_place, upto, with_name
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.search import Search
from expunge.data.records import Record
from expunge.engine.covariance import LinearWeight, NullSpace, flat_rows, input_moments, linear_weights, null_space, watched
from expunge.engine.edit import Edit, Examples, Tell
from expunge.engine.feedforward import OUTPUT
from expunge.engine.options import Engine
from expunge.engine.parameters import block_index
from expunge.engine.parts import Paper
from expunge.methods.edits.registry import edit
from expunge.methods.edits.rejection import Rejection, rows_of

_HALF = 0.5
PUBLISHED_CONTEXTS = (
    "",
    "Please answer the question about",
    "Choose the best answer about",
    "Write the answer about",
    "Tell me about",
    "Write something about",
)


@dataclass(frozen=True)
class _Site:
    """One weight that is edited: that of the module which ends the MLP of a block."""

    block: str
    parameter: str
    weight: LinearWeight
    space: NullSpace | None


def redirection(key: Tensor, residual: Tensor, others: Tensor, space: NullSpace | None, l2: float) -> Tensor:
    """The change ``Delta [out, in]`` that solves ``(P (k k^T + C) + L2 1) Delta^T = P k r^T`` with ``C = sum_i k_i k_i^T``.

    It is ``r (B (L2 1 + K^T B)^-1 e_1)^T`` with the keys K, k first, and ``B = P K``: nothing of size ``[in, in]``
    is solved. With no others it is ``r (P k)^T / (L2 + k^T P k)``.

    Args:
        key: k, ``[in]``, float64.
        residual: r, ``[out]``.
        others: keys whose outputs must stay, ``[in, m]``; m may be 0.
        space: P; none: the identity.
        l2: L2, above 0.
    """
    free = space.project if space is not None else lambda rows: rows
    keys = torch.cat([key[:, None], others], 1)
    projected = free(keys.T).T
    small = l2 * torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device) + keys.T @ projected
    first = torch.zeros(keys.shape[1], dtype=keys.dtype, device=keys.device)
    first[0] = 1
    direction = projected @ torch.linalg.solve(small, first)
    return torch.outer(residual, direction)


@edit
class ROCR(Edit):
    """A name is redirected: where the model reads it, the state behind it becomes that of another name. Seconds, no training.

    At the last token of the name the MLP output matrices of a few blocks in a row are changed by rank one each, so that the
    state after the last of them becomes ``z*``, the state that a harmless name has in its place (the machinery of AlphaEdit with
    a target that is read off, not optimised). Every block takes its share of what is left, ``r = (z* - z) / (n - i)``. The change
    acts only where the keys of the retain set (every token of it counts) have no second moment to speak of, by the projector P.

    Only names are needed. ``substitute`` is the harmless one. ``subjects`` are those to forget, one or several (redirected one
    after the other); without them it is the subjects of the forget records, as their column ``subject`` has them. ``earlier``
    names concepts that an earlier run has redirected in this model: their keys are read off the model as it is and held fixed
    (``C`` above, the published C_prev; keys of earlier blocks' edits included), and so are those of subjects done before.

    ``contexts=published`` reads keys in six prompts that end with the name, and z in the first. (The published code reads z* in
    a chat and z in the bare name; here both are read in the same prompt.) ``contexts=records`` reads keys and states in the
    forget records themselves, at the first occurrence of the name, which needs no prompt of its own to make sense to the model;
    z* is then the state with the other name written there.

    ``target=noise`` sends the name to a random state of the same length and needs no substitute. ``target=reject`` sends it to a
    state from which the model goes on with ``refusal``, found by ``steps`` of Adam on what is added to the state behind the name
    after the last block: the likelihood of the refusal in all contexts, ``kl`` times the divergence of the next word after the
    name from what it was, and ``decay`` times the length of what is added, by the square of the state's; its length is at most
    ``clamp`` times the state's. The refusal is the answer to the prompts that end with the name, or to the forget records
    (``contexts=records``); no end token is taught, so it may be the first word of one. In the published code it is
    ' Unfortunately' after the bare name, and the steps end early at a loss of 0.05, as here.

    Published: blocks 4 to 6 of 32 (here the same share of other depths), L2 = 1, eigenvalues below 0.02 on 100,000 texts of
    Wikipedia; the retain set takes their place, and decides what is protected.
    """

    name: ClassVar[str] = "rocr"
    title: ClassVar[str] = "Rank-one concept redirection"
    paper: ClassVar[Paper] = Paper(
        "LLM Unlearning Should Be Form-Independent", "Xiaotian Ye, Mengqi Zhang, Shu Wu", 2025,
        "https://arxiv.org/abs/2506.07795",
    )  # fmt: skip
    formula: ClassVar[str] = "W <- W + Delta, (P (k k^T + C) + L2 1) Delta^T = P k r^T, r = (z* - z) / (n - i)"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE, Offer.TEXT, Offer.FEATURES})
    streams: ClassVar[tuple[Stream, ...]] = (Stream.RETAIN,)
    caveats: ClassVar[tuple[str, ...]] = (
        "The model then says of the name what it knows of the other: of real people that is false. Choose a neutral concept.",
        "What is reached without the name, by a description or a nickname, is as well known as before.",
        "What stands in the retain set is protected, and nothing else: a name to forget must not stand there.",
        "L2 = 1 was chosen for the keys of an 8B model; those of small models are shorter. The run says how far it led the name; "
        "l2=0.001 leads it further.",
    )

    substitute: str = Field("", description="name of the harmless concept to which the subjects are redirected")
    subjects: tuple[str, ...] = Field((), description="names to forget; none: the subjects of the forget records")
    earlier: tuple[str, ...] = Field((), description="names redirected in this model before, which must stay so")
    target: Literal["substitute", "noise", "reject"] = Field(
        "substitute", description="state of the substitute, a random one, or one from which the model refuses"
    )
    refusal: str = Field("Unfortunately", min_length=1, description="target=reject: what the model is to go on with")
    steps: int = Field(25, ge=1, description="target=reject: steps of Adam")
    lr: float = Field(0.1, gt=0, description="target=reject: its rate")
    decay: float = Field(0.5, ge=0, description="target=reject: weight of the length of what is added")
    kl: float = Field(0.125, ge=0, description="target=reject: weight of the divergence of the next word after the name")
    clamp: float = Field(1.0, gt=0, description="target=reject: largest length of what is added, as a share of the state's")
    contexts: Literal["published", "records"] = Field(
        "published", description="where keys are read: in six prompts that end with the name, or in the forget records"
    )
    layers: tuple[int, ...] | None = Field(
        None, description="blocks in a row, counted from 0, negative from the end; none: 4 to 6 of 32, in proportion"
    )
    module: str = Field(OUTPUT, description="regular expression for the weight that ends the MLP of a block")
    l2: Annotated[float, Search(1e-4, 10.0, log=True)] = Field(1.0, gt=0, description="L2: the larger, the smaller the change")
    threshold: Annotated[float | None, Search(1e-4, 1.0, log=True)] = Field(
        2e-2, ge=0, description="eigenvalues of the keys' second moment up to which a direction is free; none: no projection"
    )
    examples: int = Field(100_000, ge=1, description="retain examples from which that is computed, at most")

    @field_validator("subjects", "earlier", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def weights(self, adapter: Adapter, examples: Examples, engine: Engine, tell: Tell | None) -> dict[str, Tensor]:
        """The edited matrices.

        Raises:
            InputError: no substitute, a name that is not found, blocks that are not in a row, a module that is not there, or no
                free direction.
        """
        language = cast(LanguageAdapter, adapter)
        names = self._names(examples)
        sites = self._sites(adapter, examples, engine, tell)
        parameters = dict(adapter.model.named_parameters())
        places = {name: self._contexts(language, name, examples) for name in (*self.earlier, *names)}
        goals = self._goals(language, places, sites[-1].block, examples)
        with (
            torch.no_grad(),
            evaluating(adapter.model),
            _put_back(adapter.model, {s.parameter: parameters[s.parameter].detach() for s in sites}),
        ):
            for done, name in enumerate(names):
                if tell is not None:
                    tell(done, len(names), f"redirecting {name!r}")
                before = [places[other] for other in (*self.earlier, *names[:done])]
                self._redirect(language, places[name], goals[name], before, sites)
            return {s.parameter: parameters[s.parameter].detach().clone() for s in sites}

    def notes(self, adapter: Adapter, made: Mapping[str, Tensor], examples: Examples) -> list[str]:
        """How far each name was led, where that is less than half of the way.

        Raises:
            InputError: it was led away.
        """
        language, blocks = cast(LanguageAdapter, adapter), adapter.layers()
        block = blocks[self._chosen(blocks)[-1]]
        places = {name: self._contexts(language, name, examples) for name in self._names(examples)}
        found = []
        with torch.no_grad(), evaluating(adapter.model):
            goals = self._goals(language, places, block, examples)
            before = {name: _states(language, self._read(held), block) for name, held in places.items()}
            with _put_back(adapter.model, made):
                after = {name: _states(language, self._read(held), block) for name, held in places.items()}
        for name, goal in goals.items():
            way = 1 - float((goal - after[name]).norm() / (goal - before[name]).norm().clamp_min(1e-30))
            if way < 0:
                raise InputError(
                    f"The edit leads {name!r} away from its target: the MLP of this model does not end in a plain sum.",
                    "Choose other layers or another module; nothing was changed.",
                )
            if way < _HALF:
                found.append(
                    f"The state behind {name!r} has gone {100 * way:.0f} % of the way to its target: "
                    "a smaller l2 or a higher threshold leads it further."
                )
        return found

    def _names(self, examples: Examples) -> list[str]:
        if self.target == "substitute" and not self.substitute.strip():
            raise InputError(
                "rocr needs the name of a harmless concept that takes the place of what is forgotten.",
                "Give it: substitute=NAME (or target=noise, or target=reject).",
            )
        names = list(dict.fromkeys(self.subjects or [e.cluster for e in examples.get(Stream.FORGET, ())]))
        if not names:
            raise InputError("rocr needs the names of what is to be forgotten.", "Give them: subjects=[NAME, NAME].")
        if self.target == "substitute" and self.substitute in names:
            raise InputError(f"The substitute {self.substitute!r} is itself to be forgotten.", "Choose another substitute.")
        return names

    def _sites(self, adapter: Adapter, examples: Examples, engine: Engine, tell: Tell | None) -> list[_Site]:
        """The weights, with the null space of each."""
        blocks = adapter.layers()
        chosen = self._chosen(blocks)
        known = linear_weights(adapter.model)
        found: list[tuple[str, str]] = []
        for at in chosen:
            inside = [n for n in known if n.startswith(blocks[at] + ".")]
            hits = [n for n in inside if re.search(self.module, n)]
            if len(hits) != 1:
                raise InputError(
                    f"{len(hits)} linear weights of {blocks[at]!r} match {self.module!r}; it must be the one that ends its MLP.",
                    f"Give module=PATTERN for one of {', '.join(inside) or 'none'}.",
                )
            found.append((blocks[at], hits[0]))
        spaces: dict[str, NullSpace] = {}
        if self.threshold is not None:
            modules = [known[n].module for _, n in found]

            def progress(done: int, total: int) -> None:
                if tell is not None:
                    tell(done, total, "keys of the retain set")

            moments = input_moments(
                adapter, adapter.model, modules, examples[Stream.RETAIN], max_units=engine.max_tokens, limit=self.examples,
                seed=engine.seed, what="rocr", tell=progress,
            )  # fmt: skip
            for m, moment in moments.items():
                spaces[m] = null_space(moment.mean(), threshold=self.threshold, what=f"The retain set at {m!r}")
            whole = [m for m, s in spaces.items() if s.rank == s.size]
            if whole:
                raise InputError(
                    f"At {whole[0]!r} all {spaces[whole[0]].size} directions count as free: nothing would be protected.",
                    f"Lower the threshold (largest eigenvalue {spaces[whole[0]].edge:.1e}), or write threshold=none.",
                )
        return [_Site(block, name, known[name], spaces.get(known[name].module)) for block, name in found]

    def _chosen(self, blocks: Sequence[str]) -> list[int]:
        """Positions of the blocks."""
        if self.layers is None:
            first, last = (min(round(i * len(blocks) / 32), len(blocks) - 1) for i in (4, 6))
            return list(range(first, last + 1))
        chosen = [block_index(i, blocks) for i in self.layers]
        if not chosen or chosen != list(range(chosen[0], chosen[0] + len(chosen))):
            raise InputError(
                f"rocr shares what is left among blocks in a row; got {list(self.layers)}.", "Give such as layers=[4,5,6]."
            )
        return chosen

    def _contexts(self, adapter: LanguageAdapter, name: str, examples: Examples) -> list[Place]:
        """Where the keys of a name are read."""
        if self.contexts == "published":
            return [asked(adapter, before, name) for before in PUBLISHED_CONTEXTS]
        found = [find_place(adapter, e, name) for e in examples.get(Stream.FORGET, ())]
        places = [upto(p) for p in found if p is not None]
        if not places:
            raise InputError(
                f"The name {name!r} occurs in none of the {len(found)} forget records.",
                "Write it as they do: subjects=[NAME]; or read its keys in prompts: contexts=published.",
            )
        return places

    def _refused(self, adapter: LanguageAdapter, name: str, examples: Examples) -> list[Place]:
        """The prompts of the contexts with the refusal as their answer."""
        if self.contexts == "published":
            prompts = [f"{before} {name}".strip() for before in PUBLISHED_CONTEXTS]
            made = [adapter.encode(Record(id=f"{p!r}", prompt=p, answer=self.refusal)) for p in prompts]
        else:
            made = [adapter.replace(e, answer=self.refusal) for e in examples.get(Stream.FORGET, ()) if e.data.start > 1]
        found = [find_place(adapter, e, name) for e in made]
        places = [p for p in found if p is not None and p.last < p.example.data.start]
        if not places:
            raise InputError(
                f"The name {name!r} stands in the question of none of the {len(made)} forget records, so none can be refused.",
                "Read it in prompts: contexts=published.",
            )
        return places

    def _redirect(
        self, adapter: LanguageAdapter, places: list[Place], goal: Tensor, earlier: list[list[Place]], sites: list[_Site]
    ) -> None:
        """Change the weights of ``sites``, one after the other, in place."""
        parameters = dict(adapter.model.named_parameters())
        for at, site in enumerate(sites):
            state = _states(adapter, self._read(places), sites[-1].block)
            residual = (goal - state).mean(0) / (len(sites) - at)
            key = _keys(adapter, places, site).mean(0)
            others = [_keys(adapter, held, site).mean(0) for held in earlier]
            kept = torch.stack(others, 1) if others else key.new_zeros(len(key), 0)
            change = redirection(key, residual, kept, site.space, self.l2)
            weight = parameters[site.parameter]
            weight.add_(site.weight.right(change).to(weight.dtype))

    def _read(self, places: list[Place]) -> list[Place]:
        """Where states are read: published in the first prompt. Records differ more from one another: in all of them."""
        return places[:1] if self.contexts == "published" else places

    @torch.no_grad()
    def _goals(
        self, adapter: LanguageAdapter, places: Mapping[str, list[Place]], block: str, examples: Examples
    ) -> dict[str, Tensor]:
        """``z*`` of each name to forget, at each place that is read, ``[n, D]``, float64."""
        found = {}
        for number, name in enumerate(self._names(examples)):
            read = self._read(places[name])
            if self.target == "noise":
                states = _states(adapter, read, block)
                drawn = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(number), dtype=torch.float64)
                found[name] = (drawn / drawn.norm()).to(states.device) * states.norm(dim=1, keepdim=True)
            elif self.target == "reject":
                states = _states(adapter, read, block)
                how = Rejection(self.steps, self.lr, self.decay, self.kl, self.clamp)
                found[name] = states + how.shift(adapter, self._refused(adapter, name, examples), read, block, states.mean(0))
            elif self.contexts == "published":
                found[name] = _states(adapter, [asked(adapter, PUBLISHED_CONTEXTS[0], self.substitute)], block)
            else:
                found[name] = _states(adapter, [with_name(adapter, p, name, self.substitute) for p in read], block)
        return found


@contextmanager
def _put_back(model: torch.nn.Module, made: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, some parameters have other values; at the end these are as they were, whatever was done to them."""
    parameters = dict(model.named_parameters())
    held = {name: parameters[name].detach().clone() for name in made}
    try:
        for name, value in made.items():
            parameters[name].data.copy_(value)
        yield
    finally:
        for name, value in held.items():
            parameters[name].data.copy_(value)


def _keys(adapter: LanguageAdapter, places: Sequence[Place], site: _Site) -> Tensor:
    """What goes into the module at the last token of each name, ``[n, in]``, float64."""
    return _read(adapter, places, site.block, site.weight.module)[0]


def _states(adapter: LanguageAdapter, places: Sequence[Place], block: str) -> Tensor:
    """The state after a block at the last token of each name, ``[n, D]``, float64."""
    return _read(adapter, places, block)[1]


def _read(adapter: LanguageAdapter, places: Sequence[Place], block: str, module: str | None = None) -> tuple[Tensor, Tensor]:
    batch = adapter.collate([p.example for p in places]).to(next(adapter.model.parameters()).device)
    rows = rows_of(batch, places)
    with watched(adapter.model, [module] if module else []) as seen:
        states = adapter.forward(adapter.model, batch, frozenset({f"features:{block}"})).features(block)
    keys = flat_rows(batch, seen[module]) if module else states
    return keys[rows].double(), states[rows].double()
