"""A state behind a name from which the model goes on with a refusal, found by gradient descent (after ROME and MEMIT)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.adapters.base import Batch, Outputs
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.places import Place
from expunge.engine.tracing import changed

_ENOUGH = 0.05  # loss at which the official code stops


@dataclass(frozen=True)
class Rejection:
    """How the state is found.

    Attributes:
        steps: of Adam.
        lr: its rate.
        decay: lambda.
        kl: kappa.
        clamp: largest length of what is added, as a share of the length of the state.
    """

    steps: int
    lr: float
    decay: float
    kl: float
    clamp: float

    def shift(
        self, adapter: LanguageAdapter, refused: Sequence[Place], kept: Sequence[Place], block: str, state: Tensor
    ) -> Tensor:
        """What is added to the state behind a name, ``delta [D]``, float64.

        It minimises ``mean NLL(refusal) + kappa KL(p || p_0)(next token) + lambda |delta| / |z|^2``, under
        ``|delta| <= clamp |z|``.

        Args:
            adapter: holds the model, which is left as it is.
            refused: prompts with the refusal as their answer, and where the name stands in them.
            kept: the name in prompts that end with it: what the model would say next is to stay, by the divergence.
            block: after which the state is changed.
            state: z, ``[D]``, whose length is the measure.
        """
        model, device = adapter.model, next(adapter.model.parameters()).device
        ends = torch.tensor([len(adapter.spoken(p.example)) for p in refused], device=device)
        asked, said = _Asked.of(adapter, refused, block), _Asked.of(adapter, kept, block)
        size = float(state.detach().norm())
        delta = torch.zeros(len(state), device=device, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=self.lr)
        with _frozen(model), torch.enable_grad():
            first = said.run(delta, "logits").logits.detach().log_softmax(-1)
            for _ in range(self.steps):
                outputs = asked.run(delta, "losses")
                spoken = (outputs.position < ends[outputs.owner]).to(outputs.losses)  # not the end: a refusal may go on
                loss = (outputs.per_example(outputs.losses * spoken) / ends).mean()
                if self.kl:
                    now = said.run(delta, "logits").logits.log_softmax(-1)
                    loss = loss + self.kl * (now.exp() * (now - first)).sum(-1).mean()
                loss = loss + self.decay * delta.norm() / size**2
                if float(loss.detach()) < _ENOUGH:
                    break
                (delta.grad,) = torch.autograd.grad(loss, [delta])
                optimizer.step()
                with torch.no_grad():
                    delta.mul_(min(1.0, self.clamp * size / max(float(delta.norm()), 1e-30)))
        return delta.detach().double()


@dataclass(frozen=True)
class _Asked:
    """Prompts that are run again and again, with something added behind the name."""

    adapter: LanguageAdapter
    batch: Batch
    rows: Tensor
    block: str

    @classmethod
    def of(cls, adapter: LanguageAdapter, places: Sequence[Place], block: str) -> _Asked:
        batch = adapter.collate([p.example for p in places]).to(next(adapter.model.parameters()).device)
        made = cls(adapter, batch, rows_of(batch, places), block)
        with torch.no_grad():  # an adapter's first pass tries the model out on other tokens: not with something added
            adapter.forward(adapter.model, batch, frozenset({"losses", made.whole}))
        return made

    @property
    def whole(self) -> str:
        """Asked for, it makes all tokens run through the blocks."""
        return f"features:{self.adapter.layers()[-1]}"

    def run(self, delta: Tensor, value: str) -> Outputs:
        model = self.adapter.model
        with changed(model.get_submodule(self.block), self.batch, (self.rows, delta.expand(len(self.rows), -1)), add=True):
            return self.adapter.forward(model, self.batch, frozenset({value, self.whole}))


def rows_of(batch: Batch, places: Sequence[Place]) -> Tensor:
    """Where the last token of the name of each example stands among all real tokens of a batch, int64 ``[B]``."""
    starts = torch.tensor([0, *batch.token_counts[:-1]]).cumsum(0)
    return (starts + torch.tensor([p.last for p in places])).to(batch.owner.device)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, no parameter wants a gradient."""
    held = [p for p in model.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
