"""What the page shows, worked out of the documents: plain values for the template, no markup."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from expunge.audit.document import AuditDocument, ModelEntry, Sample
from expunge.audit.trusted import warning
from expunge.core.results import Check, Judgement, Number, Verdict
from expunge.report.compare import Comparison
from expunge.report.glossary import ARROWS, DIRECTIONS, SHORT_DIRECTIONS, term
from expunge.report.headline import ACTIVE, PRIVACY, family, pick
from expunge.report.text import DASH, amount, digits, interval_text, plural, signed, value_text
from expunge.report.weakest import weakest

SLUGS = {
    Verdict.FORGOTTEN: "forgotten",
    Verdict.SUPPRESSED: "suppressed",
    Verdict.NOT_FORGOTTEN: "not-forgotten",
    Verdict.DAMAGED: "damaged",
    Verdict.NO_GOLD: "no-gold",
    Verdict.UNDECIDED: "undecided",
}
COLUMNS = 5  #: numbers that fit beside one another; a table of more models has a row for each
_ROLES = {"target": 0, "retrained": 1, "base": 2, "unlearned": 3}
_ATTACKS = "Attacks on a copy"
_COSTS = {"seconds": "time", "peak_bytes": "peak memory", "steps": "steps", "tokens": "tokens"}


@dataclass(frozen=True)
class Cell:
    """One number of a table."""

    text: str = DASH
    interval: str = ""
    marks: str = ""  #: of its footnotes: numbers for warnings, letters for remarks
    flagged: bool = False
    sort: float | None = None


@dataclass
class Notes:
    """The footnotes of one table: warnings (flags, reasons for what is missing) and remarks; equal texts share a mark."""

    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def cell(self, number: Number | None, places: int | None = None, *, remark: bool = True) -> Cell:
        """The cell of ``number`` with ``places`` decimals; without its note if not ``remark``."""
        if number is None:
            return Cell()
        warnings = [*number.flags, *([number.note] if number.note and number.value is None else [])]
        marks = [self._mark(self.warnings, text) for text in dict.fromkeys(warnings)]
        if remark and number.note and number.value is not None:
            marks.append(self.remark(number.note))
        marks = ["!" * bool(number.flags) + marks[0], *marks[1:]] if marks else []
        shown = value_text(number, places), interval_text(number, places)
        return Cell(*shown, ",".join(marks), bool(number.flags), number.value)

    def remark(self, text: str) -> str:
        """The mark of a remark."""
        place = int(self._mark(self.remarks, text)) - 1
        return ("" if place < 26 else chr(96 + place // 26)) + chr(97 + place % 26)

    @staticmethod
    def _mark(texts: list[str], text: str) -> str:
        if text not in texts:
            texts.append(text)
        return str(texts.index(text) + 1)


@dataclass(frozen=True)
class Line:
    """One metric of a table of numbers: a cell per model."""

    key: str
    title: str
    arrow: str
    direction: str
    direction_text: str
    counts: str
    cells: tuple[Cell, ...]
    mark: str = ""  #: of the remark that holds for all its cells


@dataclass(frozen=True)
class Group:
    """One table of numbers."""

    title: str
    lead: str
    lines: tuple[Line, ...]
    notes: Notes
    absent: tuple[tuple[str, str], ...] = ()  #: metrics without any value: (names, why)


@dataclass(frozen=True)
class Judged:
    """One model with its verdict, for the top of the page."""

    model: ModelEntry
    judgement: Judgement
    slug: str
    weakest: Check | None

    @property
    def weakest_text(self) -> str:
        """Difference with interval of the weakest check."""
        return "" if self.weakest is None else check_text(self.weakest)


@dataclass(frozen=True)
class Answer:
    """What one or more models answered, cut into (words, also in the true answer) pieces."""

    labels: tuple[str, ...]
    pieces: tuple[tuple[str, bool], ...]


def ordered(models: Iterable[ModelEntry]) -> list[ModelEntry]:
    """Target, retrained, base, then the unlearned models, each in the document's order."""
    return sorted(models, key=lambda m: _ROLES[m.role])


def judged(document: AuditDocument, *, controls: bool) -> list[Judged]:
    """The models with a verdict: the controls (target, retrained) or all others."""
    models = [m for m in document.models if (m.role in ("target", "retrained")) is controls]
    return [Judged(m, m.judgement, SLUGS[m.judgement.verdict], weakest(m.judgement)) for m in models if m.judgement is not None]


def thresholds(document: AuditDocument) -> dict[str, float] | None:
    """The thresholds of the verdicts if all models were judged by the same ones, else None."""
    found = [m.judgement.thresholds for m in document.models if m.judgement is not None]
    return found[0] if found and all(t == found[0] for t in found) else None


def check_text(check: Check) -> str:
    """``+0.120 [+0.080, +0.160]``: unlearned minus retrained, as much of it as there is."""
    if check.difference is None:
        return ""
    text = signed(check.difference)
    if check.low is not None and check.high is not None:
        text += f" [{signed(check.low)}, {signed(check.high)}]"
    return text


def groups(document: AuditDocument) -> list[Group]:
    """The numbers of ``document``: a table per set, then what belongs to no single set, then privacy; not those of attacks."""
    return [g for g in _groups(document) if g.title != _ATTACKS]


def _groups(document: AuditDocument) -> list[Group]:
    models = ordered(document.models)
    keys = list(dict.fromkeys(k for m in models for k in m.numbers))
    names = [*document.data, "", "privacy", "attacks"]
    titles = {"": "Across sets", "privacy": "Privacy", "attacks": _ATTACKS}
    out = []
    for name in names:
        members = [k for k in keys if _group(document, k) == name]
        if members:
            out.append(_table(document, models, members, titles.get(name, f"{name[:1].upper()}{name[1:]} set")))
    return out


def attack_numbers(document: AuditDocument) -> Group | None:
    """The table of what attacks on a copy of the model measured; None if there were none."""
    return next((g for g in _groups(document) if g.title == _ATTACKS), None)


def glance(document: AuditDocument) -> Group:
    """The headline numbers of every model: a line per number that was picked."""
    models = ordered(document.models)
    keys = [pick(models, kind) for kind in ("forget", "utility", "privacy", "relearn")]
    return _table(document, models, list(dict.fromkeys(k for k in keys if k is not None)), "")


def is_count(document: AuditDocument, column: str) -> bool:
    """Whether a column of the table of sets holds numbers."""
    return all(isinstance(about.get(column), (int, float, type(None))) for about in document.data.values())


def column_places(comparison: Comparison) -> tuple[int, int, int]:
    """Decimals of the columns distance, forget and utility of a trade-off table."""
    rows = [r for r in (comparison.target, comparison.gold, *comparison.rows) if r is not None]
    columns = ([r.distance for r in rows], [r.forget for r in rows], [r.utility for r in rows])
    distance, forget, utility = (min(3, digits([n for n in column if n is not None])) for column in columns)
    return distance, forget, utility


def costs(document: AuditDocument) -> tuple[list[str], list[tuple[ModelEntry, list[tuple[str, float | None]]]]]:
    """Column titles and, per model with a cost, its entries as (text, value)."""
    models = [m for m in ordered(document.models) if m.cost]
    keys = sorted({k for m in models for k in m.cost}, key=lambda k: (list(_COSTS).index(k) if k in _COSTS else len(_COSTS), k))
    rows = [(m, [(amount(k, m.cost[k]) if k in m.cost else DASH, m.cost.get(k)) for k in keys]) for m in models]
    return [cost_name(k) for k in keys], rows


def cost_name(key: str) -> str:
    """A cost's name for people."""
    return _COSTS.get(key, key.replace("_", " "))


def about(model: ModelEntry) -> str:
    """Role, method and seed of a model, without what its label says already."""
    parts = [model.role if model.role not in model.label else "", f"method {model.method}" if model.method else ""]
    return ", ".join(p for p in (*parts, f"seed {model.seed}" if model.seed is not None else "") if p)


def sample_sets(document: AuditDocument) -> list[tuple[str, list[Sample]]]:
    """The samples by set, in the order of the document's sets."""
    names = [*document.data, *(s.set for s in document.samples)]
    found = [(name, [s for s in document.samples if s.set == name]) for name in dict.fromkeys(names)]
    return [(name, samples) for name, samples in found if samples]


def answers(document: AuditDocument, sample: Sample) -> list[Answer]:
    """The answers to one prompt in the order of the models, equal ones together; words shared with the true answer told apart."""
    known = [m.label for m in ordered(document.models) if m.label in sample.answers]
    labels: dict[str, list[str]] = {}
    for label in dict.fromkeys([*known, *sample.answers]):
        labels.setdefault(sample.answers[label], []).append(label)
    return [Answer(tuple(by), shared(text, sample.gold, sample.prompt)) for text, by in labels.items()]


def shared(answer: str, gold: str, prompt: str = "") -> tuple[tuple[str, bool], ...]:
    """``answer`` cut into pieces, each with whether its words stand in ``gold`` too, in the same order.

    Matched are runs of words (compared without case and punctuation) that hold at least one word of four letters or more
    that is not in ``prompt``: neither "is a", shared by chance, nor a name taken from the question is shown as a leak.
    """
    pieces = re.findall(r"\s*\S+", answer) or ([answer] if answer else [])
    words, true = [_word(p) for p in pieces], [_word(p) for p in gold.split()]
    given = {_word(p) for p in prompt.split()}
    same = [False] * len(pieces)
    for block in difflib.SequenceMatcher(None, words, true, autojunk=False).get_matching_blocks():
        run = range(block.a, block.a + block.size)
        if any(len(words[i]) >= 4 and words[i] not in given for i in run):
            for i in run:
                same[i] = True
    out: list[tuple[str, bool]] = []
    for piece, hit in zip(pieces, same, strict=True):
        gap = piece[: len(piece) - len(piece.lstrip())]
        if out and out[-1][1] == hit:
            out[-1] = (out[-1][0] + piece, hit)
        elif hit and gap:
            out += [(gap, False), (piece.lstrip(), True)] if not out else [(out.pop()[0] + gap, False), (piece.lstrip(), True)]
        else:
            out.append((piece, hit))
    return tuple(out)


def access(document: AuditDocument) -> str:
    """What was had of the models, in words; nothing where an older audit does not say."""
    return {
        "weights": "Access: the weights.",
        "scores": "Access: answers and log-probabilities, as somebody has who can only ask.",
        "text": "Access: answers in words, as somebody has who can only ask.",
    }.get(str(document.protocol.get("access")), "")


def headline(document: AuditDocument) -> str:
    """One sentence on all verdicts."""
    unlearned = [m for m in document.models if m.role == "unlearned"]
    found = [m.judgement.verdict for m in unlearned if m.judgement is not None]
    if not found:
        return "No unlearned model was judged."
    if len(found) == 1:
        return f"{next(m.label for m in unlearned if m.judgement is not None)} is judged: {found[0].value}."
    counts = [(v, found.count(v)) for v in Verdict if v in found]
    told = ", ".join(f"{n} {v.value}" for v, n in counts)
    return f"Of {plural(len(found), 'unlearned model')}: {told}."


def _group(document: AuditDocument, key: str) -> str:
    first = family(key)
    if first in document.data and "." in key:
        return first
    return "privacy" if first in PRIVACY else "attacks" if first in ACTIVE else ""


def _table(document: AuditDocument, models: Sequence[ModelEntry], keys: Sequence[str], title: str) -> Group:
    notes = Notes()
    lines = []
    absent: dict[str, list[str]] = {}
    for key in keys:
        numbers = [m.numbers.get(key) for m in models]
        known = [n for n in numbers if n is not None]
        if all(n.value is None for n in known):
            why = "; ".join(dict.fromkeys(t for n in known for t in (n.note, *n.flags) if t))
            absent.setdefault(why or "no reason was given", []).append(f"{term(document, key).title} ({key})")
        else:
            lines.append(_line(document, key, numbers, notes))
    lead = _lead([n for k in keys for m in models if (n := m.numbers.get(k)) is not None])
    return Group(title, lead, tuple(lines), notes, tuple((", ".join(names), why) for why, names in absent.items()))


def _line(document: AuditDocument, key: str, numbers: Sequence[Number | None], notes: Notes) -> Line:
    known = [n for n in numbers if n is not None]
    direction = known[0].direction
    common = known[0].note if len(known) > 1 and all(n.note == known[0].note and n.value is not None for n in known) else ""
    places = digits(known)
    marks = [notes.remark(t) for t in (common, warning(key) if document.modality == "language" else "") if t]
    return Line(
        key=key,
        title=term(document, key).title,
        arrow=ARROWS[direction],
        direction=SHORT_DIRECTIONS[direction],
        direction_text=DIRECTIONS[direction],
        counts=_counts(known),
        cells=tuple(notes.cell(n, places, remark=not common) for n in numbers),
        mark=",".join(marks),
    )


def _counts(numbers: Sequence[Number]) -> str:
    examples, clusters = _span([n.n for n in numbers if n.n]), _span([n.clusters for n in numbers if n.clusters])
    return f"{examples} / {clusters}" if clusters else examples


def _span(values: Sequence[int]) -> str:
    if not values:
        return ""
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}{DASH}{max(values):,}"


def _lead(numbers: Sequence[Number]) -> str:
    found = sorted({(n.level, n.over) for n in numbers if n.low is not None and n.high is not None})
    if not found:
        return ""
    told = " and ".join(f"{level:.0%} interval over {over}" for level, over in found)
    return f"In brackets: {told}."


def _word(text: str) -> str:
    return re.sub(r"\W", "", text).casefold()
