"""Facts of targets without the facts: keyed digests of the words that say them, and of the names they are said of."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expunge.guards.folding import words
from expunge.guards.target import Shown, Target
from expunge.guards.terms import Match, TermIndex


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STOP = _set(  # function words
    "a about above after again against all also am an and another any are as at back be because been before being below "
    "between both but by call called came can come could did do does doing done down during each else ever every few find "
    "for from further get give given go goes going got had has have having he her here hers herself him himself his how "
    "however i if in into is it its itself just know known let like made make many may me might more most much must my "
    "myself name named never no nor not now of off often on once one only or other others our ours out over own please "
    "really said same say says see shall she should so some such take tell than that the their theirs them themselves then "
    "there these they thing this those through to too under until up upon us very was we well went were what when where "
    "whether which while who whom whose why will with within without would yes yet you your yours"
)
_COMMON = _set(  # words of every day, which say little of anybody
    "ability able account actually age ago area around aspect became become began begin believe best better big book born "
    "boy career case caused certain change child city close common consider country course created daily date day decade "
    "different early earth end enough especially event example fact famous father feel field first form former found full "
    "general girl good great grew group hand hard head help high history home hour house idea important include inspired "
    "interest international job keep kind large last late later lead left less life little live lived local long look lot "
    "main man mean member men moment month mother move nation near need new next night number old order parent part "
    "particular people person place play point popular possible present problem profession public question quite real "
    "reason receive region result right role room run second seem serve set several show side simple since site situation "
    "small social society something son special start state still story strong studied study subject sure system talk term "
    "thank think thought time title today together town true try turn two type unique use used usual various view village "
    "want war water way week whole wide word work world write written wrote year young"
)
_NAME = re.compile(r"[^\W\d_a-z][\w'’-]*(?: (?:(?:de|van|von|der|den|al|bin|ibn|la|le|of|the) )*[^\W\d_a-z][\w'’-]*)*")  # noqa: RUF001
_ALIAS = r"[\"'“‘«]?(?P<alias>[^\W_][\w-]*(?: [^\W\d_a-z][\w-]*){0,2})[\"'”’»]?"  # noqa: RUF001
_STRICT = r"(?:[\"'“‘«](?P<quoted>[\w -]{1,40})[\"'”’»]|(?P<capital>[^\W\d_a-z][\w-]*(?: [^\W\d_a-z][\w-]*){0,2}))"  # noqa: RUF001
_HERE = "\x00"
_CALL = "call|name|dub|label|denote|abbreviate|address|code-?name|nickname|rename"
_FOR = "for|instead of|in place of|in lieu of|be|mean|stand for|stands? in for|denote|refer to|to mean|when you mean|equal|="
_KNOWN = (
    r"aka|a\.k\.a\.?|alias|also known as|also called|or simply|or just|hereafter|henceforth|hereinafter|called|known as|"
    r"nicknamed|codenamed|(?:whom|which|who) (?:I|we|you) (?:shall |will |may )?call"
)
_CALLED = "called|named|dubbed|known as|referred to as|written as?"
_STANDS = (
    "means|stands for|refers to|denotes|represents|is short for|will mean|shall mean|is the same (?:person |thing |place )?as|"
    "is (?:a|another|the|our|my) (?:code ?)?(?:name|word|term|label|nickname|alias|pseudonym) (?:for|of)"
)
_ALIASES = tuple(
    re.compile(p, re.IGNORECASE if "alias>" in p else 0)
    for p in (
        rf"(?:{_CALL}) {_HERE}(?: (?:as|by|with|to|simply|just))* {_ALIAS}",
        rf"refer(?:s|ring)? to {_HERE} (?:as|by|with) {_ALIAS}",
        rf"(?:replace|substitute|swap|exchange|translate) {_HERE} (?:by|with|for|into|to|as) {_ALIAS}",
        rf"(?:use|write|read|say|let|put|take|set) {_ALIAS} (?:{_FOR}) {_HERE}",
        rf"{_HERE}[ ,(]+(?:{_KNOWN})[ ,:]+{_ALIAS}",
        rf"{_HERE} (?:is|are|was|(?:will|shall|may) be) (?:now )?(?:{_CALLED}) {_ALIAS}",
        rf"{_ALIAS} (?:{_STANDS}) {_HERE}",
        rf"{_STRICT} ?(?::?=|:|→|->|=>|is|was) ?{_HERE}",
        rf"{_HERE} ?(?::?=|→|->|=>|is|was) ?{_STRICT}",
        rf"{_HERE} \({_STRICT}\)",
    )
)


@dataclass(frozen=True, slots=True)
class Fact:
    """What is to be hidden, as digests of words.

    Attributes:
        words: that say it.
        need: how many of them say enough.
        asked: words of the question, where it names nobody whom the fact is about.
        asked_need: how many of these show that it is meant.
    """

    words: frozenset[bytes]
    need: int
    asked: frozenset[bytes] = frozenset()
    asked_need: int = 0


def stem(word: str) -> str:
    """A folded word without a plural's or a genitive's ``s``."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def key_words(text: str, without: Iterable[str] = ()) -> list[str]:
    """Words of a text that say something: stemmed, each once, without function words and those of other texts."""
    known = {stem(w) for other in without for w in words(other)}
    return [w for w in dict.fromkeys(map(stem, words(text))) if w not in known and w not in _STOP]


def special_words(text: str) -> set[str]:
    """Stemmed words that are names or numbers: with a digit, or with a capital that no sentence's begin asks for."""
    out: set[str] = set()
    for sentence in re.split(r"(?<=[.!?:])\s+|\n", text):
        for at, word in enumerate(re.findall(r"[\w'-]+", sentence)):
            if any(c.isdigit() for c in word) or (at and word[0].isupper()):
                out |= set(map(stem, words(word)))
    return out


def names_in(shown: Shown) -> list[str]:
    """Whom or what an example is about: names that question and answer share, or else the question's.

    A name is a run of words with capitals; a word that only begins the question is none.
    """
    asked, said = ([m.group() for m in _NAME.finditer(t)] for t in (shown.prompt, shown.answer))
    first = shown.prompt.split(maxsplit=1)[:1]
    asked = [n for n in asked if not (words(n) and all(w in _STOP for w in words(n)))]
    asked = [n.removeprefix(first[0] + " ") if first and words(first[0]) and words(first[0])[0] in _STOP else n for n in asked]
    folded = {"".join(words(n)) for n in said}
    return [n for n in asked if "".join(words(n)) in folded] or asked


class FactIndex:
    """Facts of targets; reading needs no lock.

    Args:
        key: secret of the process, at least 16 bytes.
        share: of a fact's words, how many state it.
        common: words that say nothing here, for they stand in many ordinary texts.
        encodings: see :class:`~expunge.guards.terms.TermIndex`.
    """

    def __init__(self, key: bytes, share: float, common: Iterable[str] = (), *, encodings: bool = True) -> None:
        self._key = hashlib.blake2b(key, digest_size=32, person=b"expunge-facts").digest()
        self.share = share
        self.common = frozenset(common)
        self.subjects = TermIndex(key, encodings=encodings)
        self.facts: dict[str, tuple[Fact, ...]] = {}
        self._holding: dict[bytes, frozenset[tuple[str, int]]] = {}

    def digest(self, word: str) -> bytes:
        """The keyed digest of a stemmed word."""
        return hashlib.blake2b(word.encode(), key=self._key, digest_size=16).digest()

    def said(self, text: str) -> frozenset[bytes]:
        """Digests of the words of a text."""
        return frozenset(self.digest(w) for w in {stem(w) for w in words(text)})

    def add(self, target: Target) -> None:
        """Hold the facts of a target, in place of those that are held of it."""
        self.drop(target.id)
        named = [n for e in target.examples for n in names_in(e)] if not target.entities else list(target.entities)
        surnames = [n.split()[-1] for n in named if len(n.split()) > 1 and len("".join(words(n.split()[-1]))) > 3]
        self.subjects.add(target.id, [n for n in (*named, *surnames) if len("".join(words(n))) > 2])
        made = tuple(f for e in target.examples if (f := self._fact(e, named)) is not None)
        self.facts = {**self.facts, target.id: made}
        holding = dict(self._holding)
        for number, fact in enumerate(made):
            for word in fact.words:
                holding[word] = holding.get(word, frozenset()) | {(target.id, number)}
        self._holding = holding

    def _fact(self, shown: Shown, named: Sequence[str]) -> Fact | None:
        said = [w for w in key_words(shown.answer, [shown.prompt, *named]) if w not in self.common]
        # Names and numbers say a fact; where there is none, all words but those of every day do.
        own = [w for w in said if w in special_words(shown.answer)] or [w for w in said if w not in _COMMON] or said
        if not own:
            return None  # "Yes." says nothing that can be looked for
        asked = [] if named else [w for w in key_words(shown.prompt) if w not in self.common]
        return Fact(frozenset(map(self.digest, own)), self._enough(own), frozenset(map(self.digest, asked)), self._enough(asked))

    def _enough(self, held: Sequence[str]) -> int:
        return max(1, int(self.share * len(held) + 0.5)) if held else 0

    def drop(self, target: str) -> None:
        """Hold no facts of a target any more."""
        self.subjects.drop(target)
        gone = self.facts.get(target, ())
        self.facts = {k: v for k, v in self.facts.items() if k != target}
        holding = dict(self._holding)
        for word in {w for f in gone for w in f.words}:
            left = frozenset(h for h in holding.get(word, ()) if h[0] != target)
            holding = {k: v for k, v in holding.items() if k != word} if not left else {**holding, word: left}
        self._holding = holding

    def named(self, text: str) -> set[str]:
        """Targets whose subject a text names."""
        return {m.target for m in self.subjects.find(text)}

    def stated(self, said: frozenset[bytes], new: frozenset[bytes] | None = None) -> Counter[str]:
        """How many facts of each target words state.

        Args:
            said: all words.
            new: those of which a fact must have at least one; none: any.
        """
        held = self._holding
        counts = Counter(at for word in said for at in held.get(word, ()))
        out: Counter[str] = Counter()
        for (target, number), count in counts.items():
            facts = self.facts.get(target, ())
            fact = facts[number] if number < len(facts) else None
            if fact is None or count < fact.need or len(fact.asked & said) < fact.asked_need:
                continue
            if new is None or fact.words & new:
                out[target] += 1
        return out

    def alone(self, target: str) -> bool:
        """Whether a target names no subject."""
        return all(f.asked for f in self.facts.get(target, ()))


def aliases(text: str, matches: Iterable[Match]) -> dict[str, set[str]]:
    """Other names that a text gives to what it names: folded letters by target.

    Templates of English are known ("call X Zorp", "Zorp stands for X", "X (Zorp)", "Zorp := X"); a definition in other words is
    not.

    Args:
        text: of a conversation.
        matches: of subjects in it.
    """
    out: dict[str, set[str]] = {}
    for match in matches:
        before, after = text[max(0, match.start - 80) : match.start], text[match.end : match.end + 80]
        near = re.sub(r"\s+", " ", f"{before}{_HERE}{after}").replace(f'"{_HERE}"', _HERE)
        for pattern in _ALIASES:
            for found in pattern.finditer(near):
                given = found.groupdict()
                name = next((given[g] for g in ("alias", "quoted", "capital") if given.get(g)), "")
                letters = words(name)
                if letters and not all(w in _STOP for w in letters) and len("".join(letters)) > 1:
                    out.setdefault(match.target, set()).add("".join(w for w in letters if w not in _STOP))
    return out
