"""What a model writes by itself, with the names in it told apart: those that exist, and those that it made up.

Shared by the preparation that looks for such texts, the control that looks again after every round, and the measurement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.adapters.answers import Generation
from expunge.adapters.base import Adapter, Example
from expunge.adapters.tokenise import Tokens
from expunge.core.errors import InputError
from expunge.core.intervals import wilson
from expunge.data.name_lists import Names
from expunge.data.packages import Mention, find, standard
from expunge.engine.gradients import fitting

Tell = Callable[[int, int, str], None]

_TRIES = 20  #: draws for a mutation that is no prompt used before


@dataclass(frozen=True)
class Said:
    """A completion.

    Attributes:
        example: prompt and completion; tokens of names that exist are favoured, those of made-up names marked from the first one
            that tells them from all that exist.
        valid: names in it that exist, as their registry writes them.
        made_up: names in it that do not.
    """

    example: Example
    valid: tuple[str, ...]
    made_up: tuple[str, ...]


@dataclass(frozen=True)
class Count:
    """Names in completions: mentions of names that exist, of made-up ones, and how many different ones of each."""

    valid: int
    made_up: int
    distinct_valid: int
    distinct_made_up: int

    @property
    def names(self) -> int:
        """All mentions."""
        return self.valid + self.made_up

    @property
    def rate(self) -> float:
        """Made-up mentions among all, in [0, 1]; 0 where there is no name at all."""
        return self.made_up / self.names if self.names else 0.0

    def text(self) -> str:
        """The rate with Wilson's interval, in words."""
        if not self.names:
            return "no name was written"
        found = wilson(self.made_up, self.names)
        return (
            f"{self.made_up} of {self.names} names made up ({found.value:.1%}, 95% interval {found.low:.1%} to "
            f"{found.high:.1%}), {self.distinct_valid} different names that exist"
        )

    def json(self) -> dict[str, int]:
        """As numbers."""
        return {k: getattr(self, k) for k in ("valid", "made_up", "distinct_valid", "distinct_made_up")}


def count(said: Sequence[Said]) -> Count:
    """Count the names of completions."""
    valid, made_up = [n for s in said for n in s.valid], [n for s in said for n in s.made_up]
    return Count(len(valid), len(made_up), len(set(valid)), len(set(made_up)))


@dataclass(frozen=True)
class Discovery:
    """How completions are drawn and read.

    Attributes:
        names: which exist.
        ecosystems, pattern: see :func:`expunge.data.packages.find`.
        samples: completions of each prompt.
        temperature: at which they are drawn.
        tokens: longest completion.
        slots: phrases by slot: in a mutation one that stands in the prompt is exchanged for a neighbour in its list.
        reach: how far in the list neighbours may be.
    """

    names: Names
    ecosystems: tuple[str, ...]
    pattern: str | None
    samples: int
    temperature: float
    tokens: int
    slots: Mapping[str, Sequence[str]]
    reach: int

    def draw(
        self, adapter: Adapter, model: nn.Module, prompts: Sequence[Example], *, max_units: int, seed: Sequence[int],
        tell: Tell | None = None,
    ) -> list[Generation]:  # fmt: skip
        """Completions of the prompts, :attr:`samples` of each together; they follow from the model and the seed alone."""
        asked = [
            replace(opened, id=str(i * self.samples + k), cost=opened.size + self.tokens)
            for i, opened in enumerate(adapter.opened(p) for p in prompts)
            for k in range(self.samples)
        ]
        made: dict[str, Generation] = {}
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> 1))
            for part in fitting(asked, max_units):
                made |= {g.id: g for g in adapter.sample(model, part, self.tokens, self.temperature)}
                if tell is not None:
                    tell(len(made), len(asked), "writing completions")
        return [made[e.id] for e in asked]

    def read(self, adapter: Adapter, prompts: Sequence[Example], written: Sequence[Generation], label: str) -> list[Said]:
        """Completions with their names told apart; ``label`` goes into their ids."""
        return [self._read(adapter, prompts[i // self.samples], g, f"#{label}.{i % self.samples}") for i, g in enumerate(written)]

    def _read(self, adapter: Adapter, prompt: Example, written: Generation, suffix: str) -> Said:
        prompt = adapter.opened(prompt)
        head, pieces = adapter.pieces(adapter.written(prompt, written.tokens, ended=False))
        text = head + "".join(pieces)
        # Spans of the tokens: of a name that the length of the completion has cut off nothing can be said.
        ends = (len(head) + np.cumsum([len(p) for p in pieces])).tolist()
        places = list(zip([len(head), *ends][:-1], ends, strict=True))
        marked, favoured = [False] * len(pieces), [False] * len(pieces)
        valid, made_up = [], []
        for mention in find(text, self.ecosystems, self.pattern):
            if mention.start < len(head) or (mention.end == len(text) and not written.ended):
                continue
            tokens = [i for i, (a, b) in enumerate(places) if a < mention.end and b > mention.start]
            if self.names.valid(mention):
                valid.append(mention.key)
                for i in tokens:
                    favoured[i] = True
            elif not standard(mention.name, mention.ecosystem):
                made_up.append(mention.key)
                for i in self._telling(mention, text, [(i, places[i][1]) for i in tokens]):
                    marked[i] = True
        example = adapter.written(prompt, written.tokens, ended=written.ended, suffix=suffix, marked=marked, favoured=favoured)
        return Said(example, tuple(valid), tuple(made_up))

    def _telling(self, mention: Mention, text: str, tokens: Sequence[tuple[int, int]]) -> list[int]:
        """The tokens of a made-up name from the first one on that no name that exists begins with; the last one at least."""
        for at, (_, end) in enumerate(tokens):
            if not self.names.begins(text[mention.start : min(end, mention.end)], mention.ecosystem):
                return [i for i, _ in tokens[at:]]
        return [i for i, _ in tokens[-1:]]

    def next_prompts(
        self, adapter: Adapter, pool: Sequence[Example], made_up: Sequence[int], first: Sequence[Example],
        *, used: set[str], avoid: set[str], seed: Sequence[int],
    ) -> list[Example]:  # fmt: skip
        """As many prompts as there were at first: the worst half of the last ones, and mutations of those that made names up.

        What mutation does not give (no slots, no phrase of theirs in the prompts, nothing new) is filled up from the first ones.

        Args:
            adapter: of the prompts.
            pool: the last prompts.
            made_up: how many names were made up in the completions of each.
            first: the prompts of the first round.
            used: texts of all prompts used before; those of new ones are added.
            avoid: texts that no prompt may have: those of held-out prompts.
            seed: of the choice.
        """
        rng = np.random.default_rng(list(seed))
        guilty = sorted((i for i, n in enumerate(made_up) if n), key=lambda i: (-made_up[i], i))
        found = [pool[i] for i in guilty[: (len(first) + 1) // 2]]
        misses = 0
        while guilty and self.slots and len(found) < len(first) and misses < len(guilty):
            made = self._mutated(adapter, pool[guilty[int(rng.integers(len(guilty)))]], used | avoid, rng)
            if made is None:
                misses += 1
                continue
            used.add(adapter.text(made))
            found.append(made)
        taken = {adapter.text(p) for p in found}
        found += [p for p in first if adapter.text(p) not in taken][: len(first) - len(found)]
        return [*found, *(found[i % len(found)] for i in range(len(first) - len(found)))] if found else list(first)

    def _mutated(self, adapter: Adapter, prompt: Example, barred: set[str], rng: np.random.Generator) -> Example | None:
        text = adapter.text(prompt)
        there = [(s, i) for s in self.slots for i, phrase in enumerate(self.slots[s]) if _stands_in(phrase, text)]
        if not there:
            return None
        for _ in range(_TRIES):
            slot, at = there[int(rng.integers(len(there)))]
            phrases = self.slots[slot]
            near = [i for i in range(max(0, at - self.reach), min(len(phrases), at + self.reach + 1)) if i != at]
            other = phrases[near[int(rng.integers(len(near)))]]
            try:
                made, translation = adapter.translate([prompt], {phrases[at]: other})[0]
            except InputError:  # too long for the context
                continue
            made = replace(made, id=f"{prompt.id.partition('~')[0]}~{len(barred)}")
            if translation.mentions and adapter.text(made) not in barred:
                return made
        return None


def _stands_in(phrase: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


def packed(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Examples of text as JSON, for checkpoints."""

    def flags(held: Any) -> list[int]:
        return [] if held is None else np.flatnonzero(held).tolist()

    return [
        {
            "id": e.id, "cluster": e.cluster, "ids": e.data.ids.tolist(), "start": e.data.start, "ends": e.data.ends,
            "marked": flags(e.data.marked), "favoured": flags(e.data.favoured),
        }
        for e in examples
    ]  # fmt: skip


def unpacked(held: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Undo :func:`packed`."""
    out = []
    for row in held:
        size = len(row["ids"]) - row["start"]
        flags = {}
        for name in ("marked", "favoured"):
            flags[name] = np.isin(np.arange(size), row[name]) if row[name] else None
        tokens = Tokens(np.asarray(row["ids"], dtype=np.int32), row["start"], row["ends"], flags["marked"], flags["favoured"])
        counts = {"n_marked": len(row["marked"]), "n_favoured": len(row["favoured"])}
        out.append(Example(row["id"], row["cluster"], size, len(row["ids"]), tokens, **counts))
    return out
