"""What every method may ask of a model, whatever its modality.

The unit of supervision is a *target*: one thing that the model predicts. A language model has one target per supervised
token, a classifier one per row. All per-target tensors are flat, ``[N]`` or ``[N, V]``, with ``owner[n]`` naming the
example of target ``n``; so a term written once serves every modality, and no work is spent on padding.

Shapes used throughout: ``B`` examples in a batch, ``N`` targets, ``M`` real (unpadded) input tokens, ``V`` classes or
vocabulary entries, ``D`` features.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.adapters.answers import Generation, Listener, Taken
from expunge.adapters.generation import Draws
from expunge.core.access import Offer
from expunge.core.errors import InputError

Targets = Literal["all", "marked", "favoured", "unmarked"]
"""Which targets: all, those in marked spans of their record, those in spans of the other kind (to be said), or in no span."""

_BY_TOKEN = ("features:", "values:", "received:")  #: values of which there is one for every real input token


@dataclass(frozen=True, slots=True)
class Example:
    """A record in the form that the model eats.

    Attributes:
        id: the record's id, with a suffix where several examples come from one record (``"r7#alt0"``).
        cluster: the independent unit of the record.
        n_targets: supervised targets (tokens of the answer and its end token; 1 for a row).
        size: input length (tokens; 1 for a row).
        data: what the adapter needs to collate it.
        cost: what it costs to run, in tokens of a language model or as many numbers; 0: its size. Batches are filled by it.
        n_marked: how many of the targets lie in a marked span of the record.
        n_favoured: how many lie in a span that is to be said: none of the marked ones.
    """

    id: str
    cluster: str
    n_targets: int
    size: int
    data: Any
    cost: int = 0
    n_marked: int = 0
    n_favoured: int = 0

    @property
    def units(self) -> int:
        """The measure by which batches are filled."""
        return self.cost or self.size

    def only(self, which: Targets) -> Example:
        """The same with the counts of some of its targets; of the tokens, ``unmarked`` are all that are no target in a span."""
        if which == "all":
            return self
        if which == "marked":
            return replace(self, n_targets=self.n_marked, size=self.n_marked, n_favoured=0)
        if which == "favoured":
            return replace(self, n_targets=self.n_favoured, size=self.n_favoured, n_marked=0)
        spans = self.n_marked + self.n_favoured
        return replace(self, n_targets=self.n_targets - spans, size=self.size - spans, n_marked=0, n_favoured=0)


@dataclass(frozen=True)
class Batch:
    """Collated examples.

    Attributes:
        ids: example ids, in order (B).
        tensors: inputs of the model.
        targets: class or token id of each target, int64 ``[N]``, or the number to predict, a float; grouped by example, in order.
        owner: index of the example of each target, int64 ``[N]``, ascending.
        position: index of the target within its example, int64 ``[N]``; 0 is the first answer token.
        counts: targets per example (B).
        token_owner: index of the example of each real input token, int64 ``[M]``, ascending.
        token_supervised: whether that token is itself a target, bool ``[M]``.
        token_counts: real input tokens per example (B).
        marked: whether the target lies in a marked span of its record, bool ``[N]``; not given: no target does.
        favoured: whether it lies in a span that is to be said, bool ``[N]``; not given: no target does.
    """

    ids: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    targets: Tensor
    owner: Tensor
    position: Tensor
    counts: tuple[int, ...]
    token_owner: Tensor
    token_supervised: Tensor
    token_counts: tuple[int, ...]
    marked: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    favoured: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __post_init__(self) -> None:
        for name in ("marked", "favoured"):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, torch.zeros_like(self.owner, dtype=torch.bool))

    @property
    def n_examples(self) -> int:
        """B."""
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        move = {k: v.to(device, non_blocking=True) for k, v in self.tensors.items()}
        moved = (self.targets, self.owner, self.position, self.marked, self.favoured)
        targets, owner, position, marked, favoured = (t.to(device, non_blocking=True) for t in moved)
        return Batch(
            self.ids, move, targets, owner, position, self.counts,
            self.token_owner.to(device), self.token_supervised.to(device), self.token_counts, marked, favoured,
        )  # fmt: skip


@dataclass
class Outputs:
    """What one forward pass of one model says about a batch (or about a run of its examples, see :meth:`narrow`).

    Only what was asked for is there; reading anything else raises ``KeyError`` (a term must declare its needs).

    Attributes:
        batch_ids: ids of the examples covered (B).
        targets, owner, position: as in :class:`Batch`, with ``owner`` counted from this view's first example.
        counts: targets per example.
        values: ``losses`` float32 ``[N]``; ``logits`` float32 ``[N, V]``; ``numbers`` ``[N]``; ``features:<layer>`` ``[M, D]``;
            ``maps:<layer>`` ``[N, P]``; ``values:<layer>`` ``[M, D]``; ``received:<layer>`` ``[M, 1]``.
        token_owner, token_supervised, token_counts: as in :class:`Batch`, for features.
        marked, favoured: as in :class:`Batch`.
    """

    batch_ids: tuple[str, ...]
    targets: Tensor
    owner: Tensor
    position: Tensor
    counts: tuple[int, ...]
    token_owner: Tensor
    token_supervised: Tensor
    token_counts: tuple[int, ...]
    values: dict[str, Tensor] = field(default_factory=dict)
    marked: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    favoured: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __post_init__(self) -> None:
        for name in ("marked", "favoured"):
            if not len(getattr(self, name)):
                setattr(self, name, torch.zeros_like(self.owner, dtype=torch.bool))

    @classmethod
    def of(cls, batch: Batch, values: dict[str, Tensor]) -> Outputs:
        """Outputs for a whole batch."""
        return cls(
            batch.ids, batch.targets, batch.owner, batch.position, batch.counts,
            batch.token_owner, batch.token_supervised, batch.token_counts, values, batch.marked, batch.favoured,
        )  # fmt: skip

    @property
    def n_examples(self) -> int:
        """B."""
        return len(self.batch_ids)

    @property
    def losses(self) -> Tensor:
        """Negative log-likelihood (or the modality's loss) of each target, float32 ``[N]``."""
        return self.values["losses"]

    @property
    def logits(self) -> Tensor:
        """Scores of each target over all classes, float32 ``[N, V]``."""
        return self.values["logits"]

    def features(self, layer: str) -> Tensor:
        """Hidden states after ``layer`` at every real input token, ``[M, D]``."""
        return self.values[f"features:{layer}"]

    def value_vectors(self, layer: str) -> Tensor:
        """Value vectors that the attention of ``layer`` makes of every real input token, all heads side by side, ``[M, D]``."""
        return self.values[f"values:{layer}"]

    def received(self, layer: str) -> Tensor:
        """Mean attention in ``layer`` that each real input token gets from those after it, over heads, in [0, 1], ``[M]``."""
        return self.values[f"received:{layer}"].squeeze(-1)

    def columns(self) -> Tensor:
        """Place of each real input token in its example, from 0, int64 ``[M]``; not of a view on some of the tokens."""
        counts = torch.tensor(self.token_counts, device=self.token_owner.device)
        return torch.arange(len(self.token_owner), device=counts.device) - (counts.cumsum(0) - counts)[self.token_owner]

    @property
    def numbers(self) -> Tensor:
        """The number predicted for each target, ``[N]``."""
        return self.values["numbers"]

    def maps(self, layer: str) -> Tensor:
        """Squared activations after ``layer``, the mean over channels at each of P places (of a vector: as is), ``[N, P]``."""
        return self.values[f"maps:{layer}"]

    def per_example(self, per_target: Tensor) -> Tensor:
        """Sum a per-target tensor ``[N]`` by example, ``[B]``; examples without targets get 0."""
        return per_target.new_zeros(self.n_examples).index_add(0, self.owner, per_target)

    def lengths(self) -> Tensor:
        """Number of targets of each example, float32 ``[B]``, at least 1 so that it can divide."""
        return torch.tensor([max(c, 1) for c in self.counts], dtype=torch.float32, device=self.owner.device)

    def narrow(self, start: int, stop: int) -> Outputs:
        """The view on examples ``start`` to ``stop`` (no copy: targets of an example are contiguous)."""
        a, b = sum(self.counts[:start]), sum(self.counts[:stop])
        c, d = sum(self.token_counts[:start]), sum(self.token_counts[:stop])
        cut = {k: v[c:d] if k.startswith(_BY_TOKEN) else v[a:b] for k, v in self.values.items()}
        return Outputs(
            self.batch_ids[start:stop], self.targets[a:b], self.owner[a:b] - start, self.position[a:b], self.counts[start:stop],
            self.token_owner[c:d] - start, self.token_supervised[c:d], self.token_counts[start:stop], cut, self.marked[a:b],
            self.favoured[a:b],
        )  # fmt: skip

    def only(self, which: Targets) -> Outputs:
        """The view on some of the targets, counted anew within their examples; all examples stay, if only with no target.

        Of the tokens ``marked`` and ``favoured`` keep such targets, ``unmarked`` all but targets in spans (the prompt's, too).
        """
        if which == "all":
            return self
        kept = {"marked": self.marked, "favoured": self.favoured, "unmarked": ~(self.marked | self.favoured)}[which]
        tokens = torch.full_like(self.token_supervised, which == "unmarked")
        tokens[self.token_supervised] = kept
        owner, token_owner = self.owner[kept], self.token_owner[tokens]
        counts, token_counts = (torch.bincount(o, minlength=self.n_examples) for o in (owner, token_owner))
        position = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
        cut = {k: v[tokens] if k.startswith(_BY_TOKEN) else v[kept] for k, v in self.values.items()}
        return Outputs(
            self.batch_ids, self.targets[kept], owner, position, tuple(counts.tolist()),
            token_owner, self.token_supervised[tokens], tuple(token_counts.tolist()), cut, self.marked[kept], self.favoured[kept],
        )  # fmt: skip


class Adapter(abc.ABC):
    """One modality's answers to the questions that methods and audits ask.

    An adapter holds a model and what is needed to feed it. Methods call it with ``model`` explicit, because the same
    adapter serves the current model, the reference and a wrapped (distributed) model.
    """

    modality: ClassVar[str]
    offers: ClassVar[frozenset[Offer]]
    lasting: ClassVar[bool] = True  #: whether it says tomorrow what it says today: else no answer is kept beyond a run
    fronted: ClassVar[bool] = False  #: whether something stands before the model that may answer in its place
    draws_anew: ClassVar[bool] = False  #: whether :meth:`drawing` changes an example's losses: none may be stored then
    model: nn.Module

    @property
    def n_classes(self) -> int | None:
        """How many classes the model chooses from; none where answers are no classes of their own (text, numbers)."""
        return None

    @abc.abstractmethod
    def encode(self, record: Any, *, answer: Any = None, suffix: str = "", prompt: str | None = None) -> Example:
        """Turn a record of the modality's kind into an example.

        ``answer`` replaces its answer (its class, its number), ``prompt`` its prompt, ``suffix`` marks the new id.

        Raises:
            InputError: it does not fit into the model's context, or leaves no target.
        """

    @abc.abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Put examples into one batch (right padding)."""

    def drawing(self, seed: int, step: int) -> AbstractContextManager[None]:
        """While open, batches are collated for a training step.

        What a modality draws at random (noise) then depends on seed, step and example; outside, on the example alone, so that
        what is measured can be measured again. Most modalities draw nothing.
        """
        return nullcontext()

    @abc.abstractmethod
    def forward(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """One forward pass; ``want`` names the values needed: ``losses``, ``logits``, ``features:<layer>``."""

    @abc.abstractmethod
    def logit_blocks(self, model: nn.Module, batch: Batch, rows: int = 512) -> Iterator[tuple[int, Tensor]]:
        """One forward pass without gradients whose logits come in blocks: pairs of first target and float32 ``[<=rows, V]``.

        The full ``[N, V]`` is never held; this is what audits read.
        """

    @abc.abstractmethod
    def generate(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int) -> list[Generation]:
        """Greedy continuations of the examples' prompts (their targets are ignored), batched by the caller."""

    def streamed(self, model: nn.Module, examples: Sequence[Example], listeners: Sequence[Listener]) -> list[Taken]:
        """What a client has got of the greedy answer to each example's prompt, that reads it as it comes.

        Where something stands before the model that looks at answers, what it has let pass before it stops one counts as got.
        A model alone sends all that it says.

        Args:
            model: this adapter's model or a copy of it.
            examples: whose prompts are answered (B), batched by the caller.
            listeners: how each answer is taken (B).
        """
        limit = max((how.max_new_tokens for how in listeners), default=1)
        made = self.generate(model, examples, limit)
        out = []
        for example, generation, how in zip(examples, made, listeners, strict=True):
            cut = len(generation.tokens) > how.max_new_tokens or (
                len(generation.tokens) == how.max_new_tokens and how.max_new_tokens < limit
            )
            tokens = generation.tokens[: how.max_new_tokens]
            pieces = self.running(example, tokens) if tokens else [generation.text]
            out.append(how.taken(pieces, generation.ended and not cut))
        return out

    def running(self, example: Example, tokens: Sequence[int]) -> list[str]:
        """Text that each of the tokens adds which follow an example's prompt; joined it is what they say."""
        return [self.decode(tokens)]

    def drawn(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int, draws: Draws) -> list[Generation]:
        """Continuations of the examples' prompts whose tokens are drawn by given numbers, batched by the caller.

        Args:
            model: this adapter's model or a copy of it.
            examples: whose prompts are continued (B).
            max_new_tokens: longest continuation.
            draws: numbers and temperature, a row per example.

        Raises:
            InputError: what this adapter generates is no text.
        """
        raise InputError(f"A {self.modality} model does not write text.", "Use metrics that need no generated text.")

    def sample(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int, temperature: float) -> list[Generation]:
        """Continuations drawn token by token from ``softmax(scores / temperature)``, as :meth:`generate` otherwise.

        They follow from torch's random state and the batch.

        Raises:
            InputError: what this adapter generates is no text.
        """
        raise InputError(f"A {self.modality} model does not write text.", "Use a method that reads losses.")

    def opened(self, example: Example) -> Example:
        """An example with no target, to be continued: its prompt; of plain text, all of it.

        Raises:
            InputError: what this adapter encodes is no text.
        """
        raise InputError(f"A {self.modality} model does not write text.", "Use a method that reads losses.")

    def written(
        self, example: Example, tokens: Sequence[int], *, ended: bool, suffix: str = "", marked: Sequence[bool] = (),
        favoured: Sequence[bool] = (),
    ) -> Example:  # fmt: skip
        """The prompt of an example with ids that a model has written as its answer, which become the targets.

        Args:
            example: whose prompt it is.
            tokens: without an end token.
            ended: whether the model ended there; then the end token is a target too.
            suffix: marks the new id.
            marked: which of the tokens are; none: no token.
            favoured: which are to be said; none: no token.

        Raises:
            InputError: what this adapter encodes is no text.
        """
        raise InputError(f"A {self.modality} model does not write text.", "Use a method that reads losses.")

    def pieces(self, example: Example) -> tuple[str, list[str]]:
        """Text of the prompt, and of each target with the white space around it; joined they are the whole text.

        A character that several tokens make up belongs to the last of them.

        Raises:
            InputError: what this adapter encodes is no text.
        """
        raise InputError(f"A {self.modality} model does not read text.", "Use a method that reads losses.")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated ids, as :attr:`Generation.text` has it.

        Raises:
            InputError: what this adapter generates is no text.
        """
        raise InputError(f"A {self.modality} model does not write text.", "Use metrics that need no generated text.")

    def text(self, example: Example) -> str:
        """Prompt and answer of an example as text, without special tokens.

        Raises:
            InputError: what this adapter encodes is no text.
        """
        raise InputError(f"A {self.modality} model does not read text.", "Use a method that reads losses.")

    def spoken(self, example: Example) -> list[int]:
        """Ids of an example's targets as :meth:`generate` would give them: without an end token.

        Raises:
            InputError: what this adapter encodes is no text.
        """
        raise InputError(f"A {self.modality} model does not write text.", "Use a method that reads losses.")

    def resumed(self, example: Example, given: int) -> Example:
        """An example whose first ``given`` targets (less than all) belong to the prompt.

        Raises:
            InputError: what this adapter encodes is no text.
        """
        raise InputError(f"A {self.modality} model does not write text.", "Use a method that reads losses.")

    def prefixed(self, example: Example, prefix: str | Sequence[int], suffix: str = "#prefixed") -> Example:
        """An example whose input begins with a text, or with token ids, before everything else but a start token.

        Args:
            example: as :meth:`encode` made it.
            prefix: what is put first.
            suffix: marks the new id.

        Raises:
            InputError: this adapter's examples are no text, or the context is too short.
        """
        raise InputError(f"The examples of a {self.modality} model are no text.", "Use a method that reads losses.")

    def translate(self, examples: Sequence[Example], terms: Mapping[str, str]) -> list[tuple[Example, Any]]:
        """Examples with terms of their text replaced, each with a :class:`~expunge.adapters.translate.Translation`.

        Args:
            examples: as :meth:`encode` made them.
            terms: term to counterpart, as text.

        Raises:
            InputError: this adapter's examples are no text, or an answer is cut away because the text has become too long.
        """
        raise InputError(f"The examples of a {self.modality} model are no text.", "Use a method that reads no terms.")

    def scores(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Outputs ``[B, C]`` of a batch's input tensors; only where rows are offered.

        Raises:
            InputError: this adapter offers none.
        """
        raise InputError(f"A model for {self.modality} has no rows.", "Use a method that reads losses.")

    def row_losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Loss of each row ``[B]`` from :meth:`scores` and the targets, differentiable; only where rows are offered.

        Raises:
            InputError: this adapter offers none.
        """
        raise InputError(f"A model for {self.modality} has no rows.", "Use a method that reads losses.")

    def replace(self, example: Example, *, inputs: Any = None, answer: Any = None, suffix: str = "") -> Example:
        """An example with other inputs or another answer (what is not given stays); only where rows or text are offered.

        Args:
            example: as :meth:`encode` made it.
            inputs: what the model reads, in the shape of one row.
            answer: the class or number it should answer; of text, a text or an example whose answer is taken.
            suffix: marks the new id.

        Raises:
            InputError: this adapter offers neither, or the answer does not fit the model.
        """
        raise InputError(f"A model for {self.modality} has no rows.", "Use a method that reads losses.")

    @abc.abstractmethod
    def layers(self) -> list[str]:
        """Names of the blocks whose features can be asked for, from the input to the output."""

    def parts(self) -> dict[str, Adapter]:
        """What lies inside a model that is more than the weights of one network, each part as a model of its own, by its name.

        Whoever has the files can take them out and ask each of them. Parts may share the model's weights, so they are to be read
        and not changed, and may have parts themselves. Most models have none.
        """
        return {}

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Content hash of weights, configuration and preprocessing: the identity under which results are cached."""

    @abc.abstractmethod
    def save(self, folder: Path, model: nn.Module | None = None) -> None:
        """Write the model (or ``model``) in its library's own layout, safetensors only, into an empty folder."""

    @abc.abstractmethod
    def copy(self) -> Adapter:
        """An independent copy: same preprocessing, own weights."""
