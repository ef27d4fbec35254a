"""The fictitious people as a named data set: ``people:forget?persons=40&seed=2``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from expunge.data.named import DATASETS, Companions, NamedSet
from expunge.data.people import MAX_COUNTRIES, MAX_FACTS, MAX_PEOPLE, MAX_WRITERS, people, split_people, world, writers
from expunge.data.records import RecordSet


@DATASETS.register("people")
class People(NamedSet):
    """Fictitious people in TOFU's schema, generated: nothing is downloaded.

    One seed is one world. ``full`` is ``forget`` and ``retain`` together; the target model is trained on these and on ``authors``
    and ``world``, which play TOFU's real authors and world facts (``all``); nothing is ever trained on ``holdout``. ``retain``
    is what TOFU keeps, people only; ``rest`` is everything but the people to forget.
    """

    name: ClassVar[str] = "people"
    persons: int = Field(60, ge=2, le=MAX_PEOPLE, description="people the target model is trained on, the forget set included")
    forget: int = Field(6, ge=1, description="people to forget, fewer than persons")
    holdout: int = Field(6, ge=1, description="people never trained on")
    facts: int = Field(10, ge=1, le=MAX_FACTS, description="facts per person")
    authors: int = Field(20, ge=1, le=MAX_WRITERS, description="writers of old, two facts each")
    countries: int = Field(10, ge=1, le=MAX_COUNTRIES, description="invented countries, four facts each")
    seed: int = Field(1, ge=0, description="which world it is")

    def configurations(self) -> dict[str, str]:
        """The parts of one world."""
        return {
            "forget": "the people to forget",
            "retain": "the other people the target model is trained on",
            "holdout": "people never trained on",
            "full": "forget and retain together",
            "all": "everything the target model is trained on: full, authors and world",
            "rest": "everything but the people to forget: retain, authors and world",
            "authors": "general knowledge: writers of old (plays TOFU's real authors)",
            "world": "general knowledge: countries (plays TOFU's world facts)",
        }

    def load(self, configuration: str) -> RecordSet:
        """Generate one part.

        Raises:
            InputError: the options leave nobody to retain, or ask for more people than there are names.
        """
        if configuration == "authors":
            return writers(self.authors, self.seed)
        if configuration == "world":
            return world(self.countries, self.seed)
        if configuration in {"all", "rest"}:
            parts = [self.load(part) for part in ("full" if configuration == "all" else "retain", "authors", "world")]
            return RecordSet(configuration, tuple(r for part in parts for r in part), self._reference(configuration))
        split = split_people(self.persons, self.forget, self.holdout, self.seed, self.facts)
        if configuration == "full":
            return people(self.persons, self.seed, self.facts)
        return {"forget": split.forget, "retain": split.retain, "holdout": split.holdout}[configuration]

    def companions(self, configuration: str) -> Companions | None:
        """For ``forget``: the other parts of the same world."""
        if configuration != "forget":
            return None
        parts = {part: self._reference(part) for part in self.configurations()}
        knowledge = (parts["authors"], parts["world"])
        return Companions(
            retain=parts["retain"],
            holdout=parts["holdout"],
            train=(parts["forget"], parts["retain"], *knowledge),
            retrain=(parts["retain"], *knowledge),
            audit={
                "forget": parts["forget"],
                "retain": parts["retain"],
                "real_authors": parts["authors"],
                "world_facts": parts["world"],
            },
        )

    def _reference(self, part: str) -> str:
        changed = {key: value for key, value in self.model_dump().items() if value != type(self).model_fields[key].default}
        return f"people:{part}" + ("?" + "&".join(f"{k}={v}" for k, v in changed.items()) if changed else "")
