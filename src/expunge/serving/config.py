"""What a server needs to know: one file for guards and targets, options for the rest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field, field_validator

from expunge.core.errors import InputError
from expunge.core.settings import Settings, load_yaml
from expunge.guards.guarded import named
from expunge.guards.named import rows_of
from expunge.guards.policy import Row
from expunge.guards.target import Target
from expunge.ledger.canaries import CanarySettings, seconds_of
from expunge.ledger.escrow import EscrowSettings
from expunge.ledger.log import Keeping

KEY_VARIABLE = "EXPUNGE_GUARD_KEY"
_LEAST_KEY = 16


class Guards(Settings):
    """A guard file.

    .. code-block:: yaml

        guards: [filter]                 # names (expunge guards), or detectors and actions
        targets:
          - entities: [Basil Mahfouz]
        ordinary: prompts.jsonl          # prompts that must pass: thresholds are set by them
        probes: {sums: sums.jsonl}       # texts of skills
        canaries: 1h                     # off, or {every: 1h, per_kind: 1, most: 200}; with --state alone
        retain: questions.jsonl          # prompts that canaries ask and that must pass
        escrow: {auditor: auditor.pem.pub, share: 0.001, keep_days: 7}
        log: {period: day, keep_days: 30}
    """

    name: ClassVar[str] = "guard file"

    guards: tuple[Row, ...] = Field(description="names of guards, or detectors and actions, in order")
    targets: tuple[Target, ...] = Field((), description="what is hidden from the start")
    ordinary: str | None = Field(None, description="prompts that must pass: a file or a named data set")
    probes: dict[str, str] = Field(
        default_factory=dict, description="texts by name of a skill, '' for what is to stay: files or data sets"
    )
    canaries: CanarySettings | None = Field(
        CanarySettings(), description="how the server tries itself out, where it keeps a log: off, a time, or settings"
    )
    retain: str | None = Field(None, description="prompts that canaries ask and that must pass: a file or a named data set")
    escrow: EscrowSettings | None = Field(None, description="requests that an auditor gets in full; none: none")
    log: Keeping = Field(Keeping(), description="how the log is kept")
    columns: dict[str, str] = Field(default_factory=dict, description="role to column name of these files")

    @field_validator("canaries", mode="before")
    @classmethod
    def _schedule(cls, value: object) -> object:
        if isinstance(value, (str, bool, int, float)):
            return canaries_of("off" if value is False else str(value))
        return value

    @field_validator("guards", mode="before")
    @classmethod
    def _rows(cls, value: object) -> object:
        return tuple(rows_of(value))

    @field_validator("targets", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)):
            raise InputError("targets must be a list.", "Write each target after a dash.")
        return tuple(named(v) for v in value if isinstance(v, (Target, Mapping)))


def canaries_of(text: str, given: CanarySettings | None = None) -> CanarySettings | None:
    """Settings of canaries from a word: ``off``, or how often they are asked.

    Args:
        text: ``off``, ``30m``, ``1h``...
        given: the other settings.

    Raises:
        InputError: it is neither.
    """
    if text == "off":
        return None
    return (given or CanarySettings()).model_copy(update={"every": seconds_of(text)})


def read_guards(path: Path) -> Guards:
    """A guard file; the paths in it are those from where it stands.

    Raises:
        InputError: it is not there, is no YAML, or says something that is not understood.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The guard file {str(path)!r} cannot be read: {type(error).__name__}.", "Name a YAML file.") from None
    try:
        held = load_yaml(text)
    except yaml.YAMLError as error:
        at = getattr(error, "problem_mark", None)
        where = f" (line {at.line + 1})" if at else ""
        raise InputError(f"The guard file {str(path)!r} is no YAML{where}.", "Mend it.") from None
    if not isinstance(held, dict):
        raise InputError(f"The guard file {str(path)!r} holds no mapping.", "Begin with 'guards: [filter]'.")
    given: dict[str, Any] = dict(held)

    def near(source: str) -> str:
        beside = path.parent / source
        return str(beside) if beside.exists() else source

    for name in ("ordinary", "retain"):
        if isinstance(given.get(name), str):
            given[name] = near(given[name])
    if isinstance(given.get("escrow"), dict) and isinstance(given["escrow"].get("auditor"), str):
        given["escrow"] = {**given["escrow"], "auditor": near(given["escrow"]["auditor"])}
    if isinstance(given.get("probes"), dict):
        given["probes"] = {k: near(str(v)) for k, v in given["probes"].items()}
    return Guards(**given)


class Limits(Settings):
    """What one client may ask for."""

    name: ClassVar[str] = "limits"

    body: int = Field(1_000_000, ge=1_000, description="bytes of a request at most")
    tokens: int = Field(1024, ge=1, description="new tokens of an answer at most; a request without a number gets this many")
    rate: float = Field(
        0.0, ge=0, description="requests a second for each key, over a burst of as many as in 10 seconds; 0: no limit"
    )
    waiting: int = Field(256, ge=1, description="requests that may wait at a time; more are turned away with 503")
    batch: int = Field(16, ge=1, description="requests that are answered together at most")
    seconds: float = Field(120.0, gt=0, description="time for one request; then it is given up with 504")


def guard_key(path: Path | None, *, required: bool = True) -> bytes | None:
    """The guard's secret: from a file, or from the environment.

    Args:
        path: of the file; none: the environment.
        required: whether there must be one; a server with a registry has that of the registry.

    Raises:
        InputError: there is none, others may read the file, or it is too short.
    """
    if path is not None:
        try:
            mode, key = path.stat().st_mode, path.read_bytes().strip()
        except OSError as error:
            raise InputError(
                f"The key file {str(path)!r} cannot be read: {type(error).__name__}.",
                f"Make one: head -c 32 /dev/urandom | base64 > {path}; chmod 600 {path}",
            ) from None
        if mode & 0o077:
            raise InputError(f"Others may read the key file {str(path)!r}.", f"Run: chmod 600 {path}")
    else:
        key = os.environ.get(KEY_VARIABLE, "").encode()
        if not key and not required:
            return None
        if not key:
            raise InputError(
                "The guard has no key.", f"Give --key FILE, or set {KEY_VARIABLE}: names are held as digests under it."
            )
    if len(key) < _LEAST_KEY:
        raise InputError(
            f"The guard's key has {len(key)} bytes; it needs {_LEAST_KEY}.", "Make one: head -c 32 /dev/urandom | base64"
        )
    return key
