"""A forget set that the target writes itself: completions of prompts, with the names in them that it made up."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from expunge.adapters.answers import Generation
from expunge.adapters.base import Adapter
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.files import digest_json, write_json
from expunge.data.name_lists import AskedNames, Names, read_list
from expunge.data.packages import OTHER, Ecosystem
from expunge.data.records import Record
from expunge.data.sources import load
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.discovered import Discovery, count
from expunge.methods.preparations.registry import preparation

DISCOVERY = "discovery"  #: under which terms and controls find how completions are drawn and read
_SEED = 21  #: of this preparation's draws


@preparation
class Discovered(Preparation):
    """Completions of the forget prompts, drawn from the target; the package names in them are marked (made up) or favoured.

    Of plain text the whole is the prompt; of other records the prompt is, and the answer is not read. A name is looked for in
    install commands and import statements, or by a pattern; ``known`` or ``checker`` says whether it exists, never the network.
    Names of the standard library are neither. A made-up name is marked from its first token on with which no name that exists
    begins (its last one, if all are shared), so what it has in common with names that exist is not suppressed.

    Completions are kept beside the checkpoint, so a run that goes on draws nothing again. If no name was made up there is
    nothing to do: the run says so and leaves the model as it is.
    """

    name: ClassVar[str] = "discovery"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET,)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.FORGET, DISCOVERY})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE, Offer.TEXT, Offer.GENERATE})
    marks: ClassVar[bool] = True

    known: str | None = Field(None, description="text file with the names that exist, one a line (or ecosystem:name)")
    checker: str | None = Field(
        None,
        description="instead of a list: package.module:function or file.py:function, which gets a name and its ecosystem and "
        "returns whether it exists; it runs as your own code",
    )
    ecosystems: tuple[Ecosystem, ...] = Field(("python",), description="whose install commands and imports are read")
    pattern: str | None = Field(
        None, description="regular expression for further names (its first group, or all of it), of anything that a list can hold"
    )
    samples: int = Field(5, ge=1, description="completions of each prompt")
    temperature: float = Field(1.0, gt=0, description="at which they are drawn")
    tokens: int = Field(128, ge=1, description="longest completion in tokens")
    slots: str | None = Field(
        None,
        description="JSON file with lists of phrases by name, for later rounds: of a prompt with a phrase in it others are made "
        "with its neighbours in the list",
    )
    reach: int = Field(8, ge=1, description="how far in its list a neighbour may be")
    spare: tuple[str, ...] = Field(
        (),
        description="files (or named sets) of prompts to measure on later, besides the holdout: no mutation may come out as one",
    )

    def check(self) -> None:
        """Refuse a list that is empty, a function that is not there, a pattern that is none, slots without a choice.

        Raises:
            InputError: naming it.
        """
        self.found()
        self._spared()

    def _spared(self) -> list[Record]:
        return [r for source in self.spare for r in load(source, name="spare")]

    def found(self) -> Discovery:
        """How completions are drawn and read.

        Raises:
            InputError: see :meth:`check`.
        """
        if (self.known is None) == (self.checker is None):
            said = "is told twice" if self.known else "must be told"
            raise InputError(
                f"preparation={self.name} {said} which names exist.",
                "Give one of preparation.known=FILE (one name a line) and preparation.checker=file.py:function.",
            )
        if not self.ecosystems and self.pattern is None:
            raise InputError(
                f"preparation={self.name} looks for no names.", "Give preparation.ecosystems or preparation.pattern."
            )
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise InputError(f"The pattern {self.pattern!r} is no regular expression: {error}.") from None
        kinds = (*self.ecosystems, *((OTHER,) if self.pattern is not None else ()))
        names: Names = read_list(self.known, kinds) if self.known is not None else AskedNames(str(self.checker))
        slots = _slots(Path(self.slots)) if self.slots is not None else {}
        return Discovery(names, self.ecosystems, self.pattern, self.samples, self.temperature, self.tokens, slots, self.reach)

    def planned(self, examples: Examples) -> Examples:
        """As many completions of their longest length."""
        held = [replace(e, size=e.size + self.tokens, n_targets=self.tokens) for e in examples[Stream.FORGET]]
        return {**examples, Stream.FORGET: held * self.samples}

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Draw the completions, or read them, and mark their names."""
        how, prompts = self.found(), examples[Stream.FORGET]
        spare = {adapter.text(adapter.encode(r)) for r in self._spared()}
        shared = sorted(spare & {adapter.text(p) for p in prompts})
        if shared:
            raise InputError(
                f"{len(shared)} prompts are both to be used and to be spared, such as {shared[0][:60]!r}.",
                "Leave them out of one of both.",
            )
        drawn_by = self.model_dump(mode="json", include={"samples", "temperature", "tokens"})
        content = [[e.data.ids.tolist(), e.data.start] for e in prompts]
        path = scratch / f"completions-{digest_json([drawn_by, engine.seed, adapter.fingerprint(), content])[:24]}.json"
        if path.is_file():
            held = json.loads(path.read_text(encoding="utf-8"))
            written = [Generation("", tuple(tokens), "", ended) for tokens, ended in held]
        else:
            written = how.draw(
                adapter, adapter.model, prompts, max_units=engine.max_tokens, seed=[engine.seed, _SEED, 0], tell=tell
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, [[list(g.tokens), g.ended] for g in written])
        said = how.read(adapter, prompts, written, "1")
        seen = count(said)
        idle = ""
        if not seen.made_up:
            what = f"all {seen.valid} names exist" if seen.valid else "there is no name"
            idle = f"{what} in {len(said)} completions of {len(prompts)} prompts by the target, so there is nothing to do"
        note = f"Round 1, completions of the {len(prompts)} prompts by the target: {seen.text()}."
        made: dict[str, Any] = {DISCOVERY: how, "prompts": list(prompts), "said": said, "spare": spare}
        return Prepared({Stream.FORGET: [s.example for s in said]}, made=made, notes=(note,), idle=idle)


def _slots(path: Path) -> dict[str, list[str]]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The slots in {str(path)!r} cannot be read: {error}.", 'Write {"topic": ["maps", "charts"]}.') from None
    fine = isinstance(held, dict) and all(
        isinstance(v, list) and len(set(map(str, v))) > 1 and all(isinstance(p, str) and p.strip() for p in v)
        for v in held.values()
    )
    if not fine or not held:
        raise InputError(
            f"The slots in {str(path)!r} must be lists of at least two different phrases.", 'Write {"topic": ["maps", "charts"]}.'
        )
    return {str(k): list(dict.fromkeys(v)) for k, v in held.items()}
