"""Ragged synthetic examples as a model would describe them, in float64 so that identities can be tested tightly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.adapters.base import Example, Outputs
from expunge.core.access import Of, Stream
from expunge.engine.parts import Term, Views
from expunge.methods.preparations.autoencoders import Autoencoder

LAYERS = ("block0", "block1", "block2", "block3")
CLASSES = 11
WIDTH = 6
torch.manual_seed(0)
AUTOENCODERS = {s: Autoencoder(WIDTH, 2, "linear") for s in (Stream.FORGET, Stream.RETAIN)}

EXTRA = torch.nn.Linear(WIDTH, 1).double()


@dataclass
class One:
    """An example: logits of its targets under both models, targets, features of its tokens (prompt of 2, then the targets)."""

    logits: Tensor
    reference: Tensor
    targets: Tensor
    states: Tensor
    reference_states: Tensor
    marked: Tensor | None = None
    favoured: Tensor | None = None

    @property
    def size(self) -> int:
        return self.states.shape[0]


FLAGS = (lambda i: i.marked, lambda i: i.favoured)  #: which targets of an example are marked, and which are favoured


def one(length: int, seed: int, scale: float = 2.0) -> One:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    targets = torch.randint(CLASSES, (length,), generator=g)
    return One(rand(length, CLASSES), rand(length, CLASSES), targets, rand(length + 2, WIDTH), rand(length + 2, WIDTH))


def many(lengths: Sequence[int], seed: int, scale: float = 2.0) -> list[One]:
    return [one(n, seed * 1000 + i, scale) for i, n in enumerate(lengths)]


def outputs(items: Sequence[One], logits: Tensor | None, states: Tensor | None) -> Outputs:
    counts = tuple(len(i.targets) for i in items)
    sizes = tuple(i.size for i in items)
    targets = torch.cat([i.targets for i in items])
    values: dict[str, Tensor] = {}
    if logits is not None:
        values["logits"] = logits
        values["numbers"] = logits[:, 0]
        values |= {f"maps:{name}": logits.square() for name in LAYERS}
        values["losses"] = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    if states is not None:
        values |= {f"{kind}:{name}": states for name in LAYERS for kind in ("features", "values")}
    return Outputs(
        tuple(str(i) for i in range(len(items))),
        targets,
        torch.tensor([i for i, c in enumerate(counts) for _ in range(c)], dtype=torch.int64),
        torch.tensor([p for c in counts for p in range(c)], dtype=torch.int64),
        counts,
        torch.tensor([i for i, s in enumerate(sizes) for _ in range(s)], dtype=torch.int64),
        torch.tensor([t >= 2 for s in sizes for t in range(s)], dtype=torch.bool),
        sizes,
        values,
        *(torch.cat([torch.zeros(len(i.targets), dtype=torch.bool) if f(i) is None else f(i) for i in items]) for f in FLAGS),
    )


@dataclass
class Step:
    """Examples of all streams with leaf tensors for everything that has a gradient."""

    items: dict[Stream, list[One]]

    def __post_init__(self) -> None:
        self.logits = {s: torch.cat([i.logits for i in x]).clone().requires_grad_() for s, x in self.items.items()}
        self.states = {s: torch.cat([i.states for i in x]).clone().requires_grad_() for s, x in self.items.items()}

    def views(self) -> Views:
        found: dict[tuple[Stream, Of], Outputs] = {}
        for stream, items in self.items.items():
            found[stream, Of.CURRENT] = outputs(items, self.logits[stream], self.states[stream])
            reference = torch.cat([i.reference for i in items]), torch.cat([i.reference_states for i in items])
            found[stream, Of.REFERENCE] = outputs(items, *reference)
            found[stream, Of.INCOMPETENT] = outputs(items, reference[0].flip(-1), None)
            found[stream, Of.ORACLE] = outputs(items, reference[0].flip(-1), None)
        generic = {str(n): (i.targets + 1) % CLASSES for n, i in enumerate(self.items[Stream.FORGET])}
        return Views(found, LAYERS, {"autoencoders": AUTOENCODERS, "extra-class": EXTRA, "generic-labels": generic})

    def examples(self, stream: Stream) -> list[Example]:
        marks, favours = ([0 if f(i) is None else int(f(i).sum()) for i in self.items[stream]] for f in FLAGS)
        rows = enumerate(zip(self.items[stream], marks, favours, strict=True))
        return [Example(str(n), str(n), len(i.targets), i.size, None, n_marked=m, n_favoured=f) for n, (i, m, f) in rows]

    def mean(self, term: Term) -> Tensor:
        return term.values(self.views()).sum() / max(1, term.count(self.examples(term.stream)))

    def gradient(self, term: Term | Callable[[Views], Tensor], stream: Stream | None = None) -> Tensor:
        """Gradient of a term's mean with respect to the logits of its stream, ``[N, V]``."""
        loss = self.mean(term) if isinstance(term, Term) else term(self.views())
        where = stream or (term.stream if isinstance(term, Term) else Stream.FORGET)
        (found,) = torch.autograd.grad(loss, self.logits[where])
        return found


def step(forget: Sequence[int] = (3, 1, 5), retain: Sequence[int] = (2, 4), seed: int = 0, scale: float = 2.0) -> Step:
    """A step with the given lengths; the alternatives have one target more than their forget examples."""
    return Step(
        {
            Stream.FORGET: many(forget, seed + 1, scale),
            Stream.RETAIN: many(retain, seed + 2, scale),
            Stream.ALTERNATIVE: many([n + 1 for n in forget], seed + 3, scale),
        }
    )


def at_reference(made: Step) -> Step:
    """The same step with the current model equal to the reference."""
    for items in made.items.values():
        for item in items:
            item.logits, item.states = item.reference.clone(), item.reference_states.clone()
    return Step(made.items)
