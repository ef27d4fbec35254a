"""What a sweep writes and every face reads: ``sweep.json``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Literal["1"] = "1"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Trial(_Part):
    """One setting of a method, and what came of it on the validation records."""

    index: int  #: trial 0 is the method's own setting
    seed: int
    values: dict[str, Any]  #: by path of the parameter; empty: the method's own
    state: Literal["done", "diverged", "refused"]
    sentence: str  #: why training ended, or what was refused
    distance: float | None = None  #: 0: as unseen records, 1: as the target
    low: float | None = None  #: 90 % interval of the distance over subjects
    high: float | None = None
    lost: float | None = None  #: share of usefulness that is lost
    loss: float | None = None  #: mean loss of the records to forget
    utility: dict[str, float] = Field(default_factory=dict)
    front: bool = False  #: no other trial of the method beats it on both axes
    best_front: bool = False  #: no other trial of any method does
    cost: dict[str, float] = Field(default_factory=dict)


class MethodSweep(_Part):
    """All trials of one method."""

    method: str
    ranges: dict[str, str]  #: what was searched
    own: dict[str, Any]  #: the method's own values of it
    trials: list[Trial]
    chosen: int | None  #: index of the chosen trial; none: no trial was within the bound
    tied: int = 0  #: other trials within the bound whose interval holds the distance of the chosen one
    settings: str = ""  #: file of the chosen settings, in the folder of the sweep


class SweepDocument(_Part):
    """A whole sweep."""

    schema_version: Literal["1"] = SCHEMA_VERSION
    title: str
    model: str
    rows: bool
    sampler: str
    seed: int
    budget: int  #: trials of each method
    rule: str
    rule_text: str
    bound: float
    counts: dict[str, int]  #: records of each part of the request
    used: dict[str, dict[str, Any]]  #: by set, number and digest of the records that the choice rests on
    reference: dict[str, Any]  #: what trials are compared with
    methods: list[MethodSweep]
    best: str | None  #: the method whose chosen trial the rule puts first
    settings: str = ""  #: file of its settings
    notes: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
