"""Embeddings of the prompt, corrupted: the model answers, but not to what was asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from expunge.adapters.head import base
from expunge.core.errors import InputError
from expunge.guards.conversation import Conversation
from expunge.guards.folding import words
from expunge.guards.parts import Action, Doer, EmbeddingEdit, Hit, Hook, Material, Orders, action
from expunge.guards.target import Target
from expunge.guards.terms import TermIndex

Family = Literal[
    "noise-first", "noise-random", "noise-top", "zero-first", "zero-top", "flip-first", "flip-top", "reverse", "shuffle"
]  # fmt: skip


@action
class Corrupt(Action):
    """Embedding corruption (ECO, Liu et al. 2024, arXiv 2406.07933): ``e_t -> Corrupt(e_t; sigma)`` for marked tokens.

    Families, on the first ``dims`` dimensions, on as many drawn ones, or on those of the largest absolute value (*top*): noise
    ``N(0, sigma^2)`` is added (``sigma`` is the standard deviation), values are set to zero, or their sign is turned. *reverse*
    and *shuffle* give the marked tokens each other's embeddings. By default all dimensions get noise of the deviation ``D``, the
    model's width: the strongest of the published settings for TOFU. What a model needs is found beforehand by
    :mod:`expunge.guards.strength`.

    Marked are the tokens of the targets' names where the prompt says one (published: what a tagger calls a person; here no tagger
    is needed, names are found as keyed digests), else all that the turns say but the last token. The template is left alone. Only
    the prompt is corrupted; the published truth ratios and probabilities are those of answers that were corrupted too, and
    overstate.

    The noise of a token follows from the guard's key, the words of the conversation and the token's place among the marked ones:
    who asks again gets the same, and cannot average it away by asking often, or with other spacing, case or punctuation. It does
    not depend on the batch, nor on how the prompt is cut.
    """

    name: ClassVar[str] = "corrupt"
    title: ClassVar[str] = "Corrupted embeddings"
    acts: ClassVar[frozenset[Hook]] = frozenset({Hook.EMBEDDINGS})

    family: Family = Field("noise-first", description="what is done to an embedding")
    dims: int | None = Field(None, ge=1, description="dimensions that it is done to; none: all")
    sigma: float | tuple[float, ...] | None = Field(
        None, description="standard deviation of noise, for all its dimensions or for each; none: the model's width"
    )
    mask: Literal["names", "all"] = Field(
        "names", description="tokens that are corrupted: of names, where the prompt says one, or all but the last"
    )

    @model_validator(mode="after")
    def _fits(self) -> Corrupt:
        each = self.sigma if isinstance(self.sigma, tuple) else () if self.sigma is None else (self.sigma,)
        if any(not s >= 0 for s in each):
            raise ValueError("sigma must not be negative")
        if self.sigma is not None and not self.family.startswith("noise"):
            raise ValueError(f"sigma is of noise, and the family is {self.family!r}")
        if isinstance(self.sigma, tuple) and len(self.sigma) != self.dims:
            raise ValueError(f"sigma has {len(self.sigma)} values for {self.dims or 'all'} dimensions; give dims as many")
        return self

    def prepare(self, material: Material) -> Doer:
        """Hold the names.

        Raises:
            InputError: there is no model, or it has fewer dimensions.
        """
        adapter = material.model("The action 'corrupt'")
        width = _width(adapter.model)
        if (self.dims or 0) > width:
            raise InputError(f"Embeddings of this model have {width} dimensions, fewer than {self.dims}.", "Give fewer dims.")
        if len(material.key) < 16:
            raise InputError("Noise needs a key of at least 16 bytes.", "Give the guard a key.")
        made = _Corrupts(self, material.key, width)
        for target in material.targets:
            made.add(target)
        return made


class _Corrupts(Doer):
    def __init__(self, settings: Corrupt, key: bytes, width: int) -> None:
        self.settings, self.width = settings, width
        self.names = TermIndex(key)
        self._key = hashlib.blake2b(key, digest_size=32, person=b"expunge-noise").digest()

    def add(self, target: Target) -> None:
        self.names.add(target.id, target.entities)

    def drop(self, target: str) -> None:
        self.names.drop(target)

    def orders(self, conversation: Conversation, hits: Sequence[Hit]) -> Orders:
        said = "\n".join(f"{m.role}:{' '.join(words(m.content)) or m.content}" for m in conversation.messages)
        seed = hashlib.blake2b(said.encode(), key=self._key, digest_size=16).digest()
        return Orders(embeddings=Corruption(self.settings, self.names, seed, self.width))


class Corruption(EmbeddingEdit):
    """The corruption of one request.

    Args:
        settings: of the action.
        names: of the targets.
        seed: 16 bytes.
        width: dimensions of an embedding.
    """

    def __init__(self, settings: Corrupt, names: TermIndex, seed: bytes, width: int) -> None:
        self.settings, self.names, self.width = settings, names, width
        self._seed = int.from_bytes(seed, "big")
        self._dims = settings.dims or width

    def marked(self, text: str, spans: Sequence[tuple[int, int]], content: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """See the action."""
        if self.settings.mask == "names":
            found = np.zeros(len(spans), dtype=np.bool_)
            for match in self.names.find(text):
                found |= [start < match.end and end > match.start for start, end in spans]
            if (found & content).any():
                return found & content
        held = content.copy()
        if content.sum() > 1:
            held[np.flatnonzero(content)[-1]] = False
        return held

    def order(self, count: int) -> NDArray[np.int64] | None:
        """Turned round or drawn, for these families."""
        if self.settings.family == "reverse":
            return np.arange(count)[::-1].copy()
        return self._drawing(-1).permutation(count) if self.settings.family == "shuffle" else None

    def apply(self, rows: Tensor, places: NDArray[np.int64]) -> Tensor:
        """See the action."""
        what, _, which = self.settings.family.partition("-")
        if not which:
            return rows
        columns = self._columns(rows, which)
        held = rows.float().gather(1, columns)
        if what == "noise":
            drawn = np.stack([self._drawing(int(p)).standard_normal(self._dims) for p in places])
            sigma = self.width if self.settings.sigma is None else self.settings.sigma
            changed = held + torch.from_numpy(drawn * np.asarray(sigma)).to(held)
        else:
            changed = torch.zeros_like(held) if what == "zero" else -held
        return rows.scatter(1, columns, changed.to(rows.dtype))

    def _columns(self, rows: Tensor, which: str) -> Tensor:
        if which == "top":
            return rows.float().abs().topk(self._dims, dim=1).indices
        chosen = np.arange(self._dims) if which == "first" else self._drawing(-2).permutation(self.width)[: self._dims]
        return torch.from_numpy(chosen).to(rows.device).expand(len(rows), -1)

    def _drawing(self, place: int) -> np.random.Generator:
        """Numbers of one token; of the whole prompt for negative places."""
        return np.random.Generator(np.random.Philox(key=self._seed, counter=np.array([0, 0, 0, place % 2**64], dtype=np.uint64)))


def _width(model: torch.nn.Module) -> int:
    inner: Any = base(model)
    embeddings = inner.get_input_embeddings()
    size = getattr(embeddings, "embedding_dim", None)
    return int(embeddings.weight.shape[-1] if size is None else size)
