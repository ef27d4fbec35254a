"""Terms on attention sinks: how long the value vectors of the first tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Example, Outputs
from expunge.core.access import Of, Stream
from expunge.core.search import Search
from expunge.engine.parameters import block_index
from expunge.engine.parts import Need, Term, Views
from expunge.methods.registry import term


class ValueNormTerm(Term):
    """A term on the lengths of the value vectors of the first tokens of each example, at some blocks."""

    per: ClassVar[Literal["target", "example", "token"]] = "token"
    selective: ClassVar[bool] = False
    reads: ClassVar[Stream]

    weight: Annotated[float, Search(around=10)] = Field(
        0.01, ge=0, description="coefficient of the term in the loss; the paper has 0.01 on MUSE and 0.0005 on WMDP"
    )
    positions: int = Field(8, ge=1, description="tokens of each example, from the first on, whose value vectors are measured")
    blocks: tuple[int, ...] | None = Field(None, description="blocks, counted from 0, negative from the end; none: all")

    @property
    def stream(self) -> Stream:
        """The stream that the class reads."""
        return self.reads

    def other(self) -> Of | None:
        """The frozen model with whose lengths they are compared; none: with nothing."""
        return None

    def chosen(self, layers: Sequence[str]) -> list[str]:
        """Names of the blocks."""
        return list(layers) if self.blocks is None else [layers[block_index(i, layers)] for i in self.blocks]

    def needs(self, layers: Sequence[str]) -> frozenset[Need]:
        """Value vectors under the current model, and under the other if there is one."""
        models = [of for of in (Of.CURRENT, self.other()) if of is not None]
        return frozenset((self.reads, of, f"values:{name}") for of in models for name in self.chosen(layers))

    def count(self, examples: Sequence[Example]) -> int:
        """The first tokens of the examples."""
        return sum(min(e.size, self.positions) for e in examples)

    def values(self, views: Views) -> Tensor:
        """Mean over blocks of the length, or of its distance from the other model's, 0 at later tokens, ``[M]``."""
        view, names, other = views.current(self.reads), self.chosen(views.layers), self.other()
        first = view.columns() < self.positions
        norms = self._norms(view, names)
        found = norms if other is None else (norms - self._norms(views[self.reads, other], names).detach()).abs()
        return found.mean(0).masked_fill(~first, 0.0)

    def _norms(self, view: Outputs, names: Sequence[str]) -> Tensor:
        """Lengths of the value vectors, float32 at least, ``[blocks, M]``."""
        held = [view.value_vectors(name) for name in names]
        return torch.stack([v.to(torch.promote_types(v.dtype, torch.float32)).norm(dim=1) for v in held])


@term
class ValueNorms(ValueNormTerm):
    """Value vectors of the first forget tokens are to be as long as a normally unlearned model's, or short (Shang et al. 2025).

    Models put attention that has nowhere else to go on their first tokens (sinks), whose value vectors are short; a trigger that
    stands there is the better kept the more these are controlled (arXiv 2510.17021). ``mode=fixed`` is the mean length itself,
    ``mode=reference`` the mean of ``| |v| - |v'| |`` with ``v'`` of a normally unlearned model, which a preparation brings
    (``preparation=disguised-trigger``); then the lengths on clean forget records give nothing away. The mean runs over the first
    eight *tokens* of every example and over blocks, as in the paper and in the authors' code for WMDP. Their code for MUSE cuts
    the first axis of a tensor (batch, token, dimension), and so takes all tokens, padding among them, of the first eight
    examples: we do not follow it. Nor do we count padding, which their masks of ones do.
    """

    name: ClassVar[str] = "value-norms"
    reads: ClassVar[Stream] = Stream.FORGET

    mode: Literal["fixed", "reference"] = Field("fixed", description="the length itself, or its distance from the other model's")

    def other(self) -> Of | None:
        """A normally unlearned model, with ``mode=reference``."""
        return Of.ORACLE if self.mode == "reference" else None


@term
class RetainValueNorms(ValueNormTerm):
    """Value vectors of the first retain tokens stay as long as the frozen target's: the other side of ``value-norms``.

    Mean of ``| |v| - |v_ref| |`` over the first tokens and over blocks, on retain records and on those with a trigger.
    """

    name: ClassVar[str] = "retain-value-norms"
    reads: ClassVar[Stream] = Stream.RETAIN

    def other(self) -> Of | None:
        """The frozen target."""
        return Of.REFERENCE
