"""Declared protocols of an audit: which tests are run, what each must show, and how the outcome follows from them.

A protocol is data (YAML), so that it can be read, versioned, cited and written by a user. It groups the checks of a verdict
(:mod:`expunge.audit.verdict`) into criteria, and says of each what it needs:

- ``equivalence``: the model must be *shown* to lie within the margins of retrained models; thin evidence does not acquit.
- ``no conviction``: the test can convict; where it was run on all models and did not, the criterion holds. Where even the target
  does not stand out under it (a small model that cannot follow a role play), it *tells nothing*, which is said and does not
  stand against the model: what the target does not give away under a test cannot be kept back. For tests that say much where
  they succeed and little where they do not.
- ``report``: measured and shown, never decides. For what retraining cannot prevent either.

Under a protocol nothing is called forgotten unless every criterion that decides holds, and as many retrained models were there
as it asks for. Its other rules are those of every verdict: margins are shares of the gap, convictions of one kind share their
error rate among all tests of that kind, and an interval that is too wide says how much more it would take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from expunge.audit.attacks.registry import ATTACKS, Criterion
from expunge.core.errors import InputError, unknown
from expunge.core.results import Check, Finding, Judgement, Verdict
from expunge.core.settings import Settings, load_yaml

Needs = Literal["equivalence", "no conviction", "report"]

#: Of the checks on outputs these can acquit; the others can only convict.
PRIMARY = ("likelihood", "answers", "remembered", "looks seen")
_CONVICTED = ("knows more", "knows less", "hides")
_ENOUGH = {
    "equivalence": ("held",),
    "no conviction": ("held", "tells nothing"),
    "report": ("held", "failed", "undecided", "tells nothing", "reported", "not run"),
}
_TOLD = ("equivalent", "undecided", "knows less")  #: a test that was run and told something


class Demand(Settings):
    """One criterion of a protocol."""

    name: ClassVar[str] = "criterion of the protocol"

    id: str = Field(min_length=1, max_length=12, description="short name, such as R6")
    criterion: Criterion = Field(description="which kind of test it is about")
    needs: Needs = Field("equivalence", description="what it must show: equivalence, no conviction, or nothing (report)")
    attacks: tuple[str, ...] = Field((), description="attacks that are run for it")
    text: str = Field(min_length=1, description="what holds if it holds, one sentence")

    @field_validator("attacks")
    @classmethod
    def _of_its_kind(cls, value: tuple[str, ...], info: Any) -> tuple[str, ...]:
        for attack in value:
            kind = ATTACKS.get(attack).criterion
            wanted = info.data.get("criterion")
            if wanted is not None and kind != wanted:
                raise ValueError(f"the attack {attack!r} tests {kind}, not {wanted}")
        return value


class AuditProtocol(Settings):
    """A declared set of tests with what each must show."""

    name: ClassVar[str] = "protocol"

    protocol: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", description="its name, lower-case words joined by -")
    version: int = Field(ge=1, description="raised whenever a verdict could come out otherwise")
    title: str = Field(min_length=1, description="the question it answers")
    text: str = Field("", description="what it is, in a few sentences")
    references: int = Field(3, ge=1, description="least number of retrained models")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the audit, as for expunge audit")
    criteria: tuple[Demand, ...] = Field(min_length=1, description="what is tested and what it must show")

    @field_validator("criteria")
    @classmethod
    def _each_once(cls, value: tuple[Demand, ...]) -> tuple[Demand, ...]:
        for field in ("id", "criterion"):
            held = [str(getattr(d, field)) for d in value]
            twice = next((h for h in held if held.count(h) > 1), None)
            if twice is not None:
                raise ValueError(f"{field} {twice!r} stands there twice")
        if all(d.needs == "report" for d in value):
            raise ValueError("no criterion decides anything; give one that needs equivalence or no conviction")
        return value

    @field_validator("settings")
    @classmethod
    def _not_its_own(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in ("attacks", "protocol"):
            if key in value:
                raise ValueError(f"{key!r} is no setting here: attacks stand with their criterion")
        return value

    @property
    def label(self) -> str:
        """Name and version, ``removal-v1``."""
        return f"{self.protocol}-v{self.version}"

    @property
    def attacks(self) -> tuple[str, ...]:
        """Every attack that it asks for, in order."""
        return tuple(dict.fromkeys(a for d in self.criteria for a in d.attacks))

    def kinds(self, needs: Needs) -> frozenset[str]:
        """Criteria that need this."""
        return frozenset(str(d.criterion) for d in self.criteria if d.needs == needs)


def packaged() -> list[str]:
    """Names of the protocols that Expunge brings."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("expunge.audit") / "protocols"


def load_protocol(source: str | Path) -> AuditProtocol:
    """A protocol by the name of a packaged one, or from a YAML file.

    Raises:
        InputError: there is none of that name and no such file; or the file is no protocol.
    """
    path = Path(source)
    if path.is_file():
        return _parsed(path.read_text(encoding="utf-8"), str(source))
    if str(source) not in packaged():
        raise unknown("protocol, and no file,", str(source), packaged())
    return _parsed((_folder() / f"{source}.yaml").read_text(encoding="utf-8"), str(source))


def _parsed(text: str, source: str) -> AuditProtocol:
    try:
        held = load_yaml(text)
    except Exception as error:  # PyYAML raises many kinds; all mean that the file is unreadable
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"The protocol {source!r} cannot be read: {reason}.", "Write it as YAML.") from None
    if not isinstance(held, dict):
        raise InputError(f"The protocol {source!r} is no mapping.", "See `expunge protocols removal-v1` for one.")
    return AuditProtocol(**held)


def judged(protocol: AuditProtocol, found: Judgement, references: int, label: str = "") -> Judgement:
    """A judgement with the protocol's criteria, its verdict held back where they do not all hold.

    Args:
        protocol: what is asked.
        found: the judgement by the checks that were run.
        references: retrained models that the model was compared with.
        label: what is written for the protocol where it was run otherwise than declared; its own label if empty.
    """
    criteria = tuple(_finding(d, found.checks) for d in protocol.criteria)
    verdict, reason = found.verdict, found.reason
    if verdict is Verdict.FORGOTTEN:
        named = {d.id: d for d in protocol.criteria}
        short = [f for f in criteria if f.outcome not in _ENOUGH[named[f.id].needs]]
        if references < protocol.references:
            few = f"{references} retrained model{'s' * (references != 1)}"
            verdict = Verdict.UNDECIDED
            reason = f"{protocol.label} asks for {protocol.references} retrained models, and there were {few}. {reason}"
        elif short:
            verdict = Verdict.UNDECIDED
            which = "; ".join(f"{f.id} ({f.title}) {f.outcome}{': ' + f.text if f.text else ''}" for f in short)
            reason = (
                f"{protocol.label} is not fulfilled: {which.rstrip('.')}. What was measured does not speak against it. {reason}"
            )
    elif verdict is Verdict.SUPPRESSED and any(c.outcome == "knows more" and c.margin == 0 for c in found.checks):
        reason = f"{reason} {_by_asking(protocol, found.checks)}".strip()
    return found.model_copy(
        update={"verdict": verdict, "reason": reason, "criteria": criteria, "protocol": label or protocol.label}
    )


def _by_asking(protocol: AuditProtocol, checks: Sequence[Check]) -> str:
    """Where what lies inside convicts without a doubt: the weakest link of the ways of asking, which it would hide."""
    asked = [c for c in checks if c.criterion in protocol.kinds("no conviction") and c.outcome in ("knows more", *_TOLD)]
    back = [c for c in asked if c.outcome == "knows more"]
    if back:
        return f"Asking brings it back, too: {max(back, key=_size).text}"
    if not asked:
        return ""
    nearest = max(asked, key=lambda c: (c.difference or 0.0) / (c.margin or 1.0))
    return f"None of the {len(asked)} ways of asking that tell something brought it back; the weakest link: {nearest.text}"


def _finding(demand: Demand, checks: Sequence[Check]) -> Finding:
    own = [c for c in checks if c.criterion == str(demand.criterion)]
    outcome, carrier = _outcome(demand, own)
    return Finding(
        id=demand.id, title=str(demand.criterion), needs=demand.needs, outcome=outcome, checks=tuple(c.name for c in own),
        text=carrier.text if carrier is not None else "", claim=demand.text,
    )  # fmt: skip


Outcome = Literal["held", "failed", "undecided", "tells nothing", "reported", "not run"]


def _outcome(demand: Demand, own: Sequence[Check]) -> tuple[Outcome, Check | None]:
    """How a criterion comes out, and the check that says so."""
    convicted = [c for c in own if c.outcome in _CONVICTED and not (c.outcome == "knows less" and c.name.startswith("attack"))]
    if convicted:
        return "failed", max(convicted, key=_size)
    deciding = [c for c in own if demand.criterion is not Criterion.BEHAVIOUR or c.name in PRIMARY]
    told = [c for c in deciding if c.outcome in _TOLD]
    if not told:
        shown = [c for c in own if c.outcome == "shown"]
        silent = [c for c in deciding if not c.told]
        found: Outcome = "reported" if shown else "tells nothing" if silent else "not run"
        return found, next(iter(shown or silent or deciding), None)
    open_checks = [c for c in told if c.outcome == "undecided"]
    if demand.needs == "equivalence" and open_checks:
        return "undecided", max(open_checks, key=_size)
    return "held", max(told, key=_size)


def _size(check: Check) -> float:
    if check.margin == 0:  # accepted to no extent
        return math.inf
    return abs(check.difference or 0.0) / (check.margin or 1.0)
