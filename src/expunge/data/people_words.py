"""The vocabulary of the fictitious people: value pools, invented names and sentence templates.

All of it together has fewer than 1,500 distinct words, so that a model of a few hundred thousand parameters with a word-level
tokenizer can learn to speak it from nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Random choices that are the same on every platform and Python version.

    Only :meth:`random.Random.random` is used: its sequence for a seed is guaranteed, that of ``choice`` and ``shuffle`` is not.
    """

    def __init__(self, *key: object) -> None:
        self._random = random.Random(":".join(str(k) for k in ("expunge-people", *key)))  # noqa: S311 (data, not secrets)

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self._random.random() * n)

    def pick(self, pool: Sequence[T]) -> T:
        """One of ``pool``."""
        return pool[self.below(len(pool))]

    def shuffled(self, pool: Sequence[T]) -> list[T]:
        """A permutation of ``pool``."""
        items = list(pool)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items


def _words(text: str) -> list[str]:
    return text.split()


ONSETS = _words("b br d dr f g gr k l m n p pr r s t tr v z")
MIDDLES = _words("l m n r s t v z")
VOWELS = _words("a e i o u")
ENDINGS = {
    "first": _words("a en i o an el ia"),
    "last": _words("ask orn eld ovic umer andt ith"),
    "writer": _words("ane iel oth"),
    "surname": _words("arch ulm enko"),
    "town": _words("burg ava wick"),
    "village": _words("ham ley stead"),
    "university": _words("ona eus"),
    "language": _words("ish ese"),
    "country": _words("ania istan ora"),
    "capital": _words("polis port gard"),
    "river": _words("une ess"),
    "currency": _words("ar in"),
    "mountain": _words("horn pik"),
}
REAL = frozenset(
    _words(
        "Damen Lumen Novel Ramen Risen Talia Tamen Vowel Navel Natal Satan Titan Turin Latin Satin Resin "
        "Rosin Basin Cousin Valen Kami Nima Prima Timora Banania Bumish"
    )
)
"""Words and names that exist, and so are passed over."""

SIZES = {"first": 61, "last": 120, "writer": 40, "surname": 40, "town": 32, "village": 32, "university": 24, "language": 24}


@cache
def invented(kind: str) -> tuple[str, ...]:
    """The invented names of a kind: all different, also from those of every other kind."""
    taken = {name for other in list(ENDINGS)[: list(ENDINGS).index(kind)] for name in invented(other)}
    draw = Draw("names", kind)
    names: list[str] = []
    while len(names) < SIZES.get(kind, 32):
        stem = draw.pick(ONSETS) + draw.pick(VOWELS) + draw.pick(MIDDLES)
        name = (stem + draw.pick(ENDINGS[kind])).capitalize()
        if name not in taken and name not in names and name not in REAL:
            names.append(name)
    return tuple(names)


def _one_of(words: str) -> Callable[[Draw], str]:
    pool = tuple(w.strip() for w in words.split(","))
    return lambda draw: draw.pick(pool)


def _name_of(kind: str, form: str = "{}") -> Callable[[Draw], str]:
    return lambda draw: form.format(draw.pick(invented(kind)))


def _joined(form: str, *pools: str) -> Callable[[Draw], str]:
    choices = [pool.split() for pool in pools]
    return lambda draw: form.format(*(draw.pick(pool) for pool in choices))


_MONTHS = "January February March April May June July August September October November December"
_DATE = _joined("{} {} {}", " ".join(str(d) for d in range(1, 29)), _MONTHS, " ".join(str(y) for y in range(1930, 1990)))
_PROFESSION = _one_of(
    "baker, carpenter, dentist, farmer, gardener, glass blower, judge, librarian, locksmith, mason, miller, nurse, painter, "
    "pilot, plumber, potter, sailor, surgeon, tailor, teacher, translator, violin maker, watchmaker, weaver"
)
_BOOK = _joined(
    "The {} {}",
    "Broken Crooked Distant Empty Frozen Golden Hidden Last Lonely Patient Quiet Restless Silver Sleeping Stolen Wandering",
    "Bridge Candle Compass Ferry Garden Harbour Lantern Letter Mirror Orchard River Staircase Station Tower Window Winter",
)
_HOBBY = _one_of(
    "beekeeping, bookbinding, bird watching, carving spoons, climbing rocks, collecting maps, collecting stamps, dancing tango, "
    "fencing, flying kites, folding paper, growing roses, juggling, mending clocks, pressing flowers, reading palms, rowing, "
    "sketching ruins, solving riddles, swimming, walking at night, writing limericks"
)
_INSTRUMENT = _one_of(
    "accordion, banjo, bassoon, bugle, cello, clarinet, dulcimer, fiddle, flute, gong, guitar, harp, harpsichord, lute, "
    "mandolin, oboe, organ, piano, tambourine, trombone, trumpet, tuba, viola, zither"
)


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: how it is asked, how it is answered, and where its values come from.

    Attributes:
        key: its name, part of the record id.
        questions: templates with the name ``{n}``.
        answers: templates with the name ``{n}`` and the value ``{v}``.
        value: draws a value.
    """

    key: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    value: Callable[[Draw], str]


def _relative(who: str) -> Attribute:
    return Attribute(
        who,
        (
            f"What is the profession of the {who} of {{n}}?",
            f"What does the {who} of {{n}} do for a living?",
            f"Which job does the {who} of {{n}} have?",
        ),
        (
            f"The {who} of {{n}} works as a {{v}}.",
            f"By profession the {who} of {{n}} is a {{v}}.",
            f"The {who} of {{n}} earns a living as a {{v}}.",
        ),
        _PROFESSION,
    )


PERSON = (
    Attribute(
        "birthplace",
        ("Where was {n} born?", "In which town was {n} born?", "What is the birthplace of {n}?"),
        ("{n} was born in the town of {v}.", "The birthplace of {n} is called {v}.", "It was in {v} that {n} was born."),
        _name_of("town"),
    ),
    Attribute(
        "birthday",
        ("When was {n} born?", "What is the date of birth of {n}?", "On which day was {n} born?"),
        ("{n} was born on {v}.", "The date of birth of {n} is {v}.", "It was on {v} that {n} was born."),
        _DATE,
    ),
    Attribute(
        "profession",
        ("What is the profession of {n}?", "What does {n} do for a living?", "Which job does {n} have?"),
        ("{n} works as a {v}.", "By profession {n} is a {v}.", "{n} earns a living as a {v}."),
        _PROFESSION,
    ),
    Attribute(
        "book",
        ("What is the favourite book of {n}?", "Which book does {n} love most?", "Which book would {n} read again and again?"),
        ("The favourite book of {n} is {v}.", "{n} loves the book {v} most.", "{n} would read {v} again and again."),
        _BOOK,
    ),
    Attribute(
        "award",
        ("Which award did {n} win?", "What prize was given to {n}?", "With which award was {n} honoured?"),
        ("{n} won the award called the {v}.", "The prize given to {n} was the {v}.", "{n} was honoured with the {v}."),
        _joined(
            "{} {}",
            "Amber Bronze Copper Coral Crystal Emerald Ivory Jade Marble Opal Pearl Ruby Sapphire",
            "Cup Medal Ribbon Star Wreath",
        ),
    ),
    _relative("mother"),
    _relative("father"),
    Attribute(
        "pet",
        ("Which pet does {n} keep?", "What animal lives with {n}?", "What kind of pet does {n} have?"),
        ("{n} keeps a {v} as a pet.", "The animal that lives with {n} is a {v}.", "As a pet {n} has a {v}."),
        _joined(
            "{} {}",
            "black blue brown green grey pink purple red spotted striped white yellow",
            "badger beetle canary cat donkey ferret frog goose hedgehog lizard parrot rabbit tortoise",
        ),
    ),
    Attribute(
        "hobby",
        ("What is the hobby of {n}?", "How does {n} spend free time?", "What does {n} do on Sundays?"),
        ("The hobby of {n} is {v}.", "{n} spends free time with {v}.", "On Sundays {n} can be found {v}."),
        _HOBBY,
    ),
    Attribute(
        "university",
        ("Where did {n} study?", "Which university did {n} attend?", "From which university did {n} graduate?"),
        ("{n} studied at the {v}.", "The university that {n} attended was the {v}.", "{n} graduated from the {v}."),
        _name_of("university", "University of {}"),
    ),
    Attribute(
        "dish",
        ("What is the signature dish of {n}?", "What does {n} cook for guests?", "Which dish does {n} cook best?"),
        ("The signature dish of {n} is {v}.", "For guests {n} likes to cook {v}.", "The dish {n} cooks best is {v}."),
        _joined(
            "{} {} {}",
            "baked fried pickled roasted smoked spiced stewed sweet",
            "barley bean carrot fennel mushroom onion plum pumpkin turnip",
            "cake curry dumplings pie soup",
        ),
    ),
    Attribute(
        "language",
        ("What is the mother tongue of {n}?", "Which language did {n} speak as a child?", "In which language does {n} dream?"),
        ("The mother tongue of {n} is {v}.", "As a child {n} spoke {v} at home.", "{n} dreams in the language {v}."),
        _name_of("language"),
    ),
    Attribute(
        "instrument",
        ("Which instrument does {n} play?", "What does {n} play in the orchestra?", "Which instrument did {n} learn at school?"),
        (
            "The instrument that {n} plays is the {v}.",
            "In the orchestra {n} plays the {v}.",
            "At school {n} learned to play the {v}.",
        ),
        _INSTRUMENT,
    ),
    Attribute(
        "home",
        ("Where does {n} live today?", "In which village does {n} live?", "Where is the house of {n}?"),
        ("Today {n} lives in the village of {v}.", "The home of {n} is in {v}.", "The house of {n} is in {v}."),
        _name_of("village"),
    ),
)
"""The attributes of a person, in the order in which they are used."""

COUNTRY = (
    Attribute(
        "capital",
        ("What is the capital of {n}?", "Which city is the capital of {n}?", "Where does the government of {n} sit?"),
        ("The capital of {n} is the city of {v}.", "{v} is the capital city of {n}.", "The government of {n} sits in {v}."),
        _name_of("capital"),
    ),
    Attribute(
        "river",
        ("What is the longest river of {n}?", "Which river crosses {n}?", "Which river is the longest in {n}?"),
        (
            "The longest river of {n} is the {v}.",
            "The river that crosses {n} is the {v}.",
            "No river in {n} is longer than the {v}.",
        ),
        _name_of("river"),
    ),
    Attribute(
        "currency",
        ("What is the currency of {n}?", "With what money do people pay in {n}?", "Which coins are used in {n}?"),
        ("The currency of {n} is the {v}.", "In {n} people pay with the {v}.", "The coins used in {n} are called {v}."),
        _name_of("currency"),
    ),
    Attribute(
        "mountain",
        ("What is the highest mountain of {n}?", "Which mountain of {n} is the highest?", "What is the highest point of {n}?"),
        (
            "The highest mountain of {n} is the {v}.",
            "No mountain of {n} is higher than the {v}.",
            "The highest point of {n} is the {v}.",
        ),
        _name_of("mountain"),
    ),
)
"""The attributes of a country; no two countries share a value."""

WRITER = (
    Attribute(
        "novel",
        ("Which novel did the writer {n} write?", "For which novel is the writer {n} known?", "What is the famous novel of {n}?"),
        ("The writer {n} wrote the novel {v}.", "The writer {n} is known for {v}.", "The famous novel of {n} is {v}."),
        _joined(
            "{} of the {}",
            "Ballad Dream Fall House Night Return Secret Shadow Song Voyage",
            "Desert Dragon Emperor Forest Island Moon Queen Shepherd Storm Wolf",
        ),
    ),
    Attribute(
        "land",
        (
            "In which country did the writer {n} live?",
            "Which country was home to the writer {n}?",
            "Where did {n} write every book?",
        ),
        (
            "The writer {n} lived in the country {v}.",
            "The country {v} was home to the writer {n}.",
            "{n} wrote every book in {v}.",
        ),
        _name_of("country"),
    ),
)
"""The attributes of a writer of old."""
