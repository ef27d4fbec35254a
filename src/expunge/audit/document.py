"""What an audit writes and every face reads: one self-describing document, with a published JSON schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from expunge.core.results import Judgement, Number

SCHEMA_VERSION: Literal["1"] = "1"

Role = Literal["target", "unlearned", "retrained", "base"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelEntry(_Part):
    """One audited model.

    ``numbers`` are keyed ``<set>.<metric>`` (``forget.probability``, ``retain.rouge-l-recall``) or ``<metric>`` where the
    number belongs to no single set (``model-utility``, ``forget-quality``, ``privleak.min-k``).
    """

    label: str  #: unique within the document ("target", "npo", "retrained seed 1")
    role: Role
    fingerprint: str
    path: str = ""
    method: str = ""
    seed: int | None = None
    numbers: dict[str, Number] = Field(default_factory=dict)
    judgement: Judgement | None = None
    cost: dict[str, float] = Field(default_factory=dict)  #: seconds, peak_bytes, steps, tokens
    stopped: str = ""  #: why training ended, in one sentence
    settings: dict[str, Any] = Field(default_factory=dict)  #: the recipe's spec and the engine's options
    guarded: bool = False  #: whether guards stand before weights that are those of the target


class Series(_Part):
    """One line of a plot; ``low``/``high`` bound its band where there is one."""

    label: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


class Curve(_Part):
    """A family of lines: relearning, ROC."""

    name: str  #: "relearn", "roc.loss"
    title: str
    x_label: str
    y_label: str
    series: list[Series]


class Distribution(_Part):
    """Per-example values of one quantity, for histograms: at most 2,000 per group, drawn with a fixed seed."""

    quantity: str  #: "loss"
    model: str  #: label of the model
    groups: dict[str, list[float]]  #: by set: forget, holdout, retain


class Sample(_Part):
    """A prompt with what each model answers."""

    id: str
    set: str
    prompt: str
    gold: str
    answers: dict[str, str]  #: by model label


class AuditDocument(_Part):
    """The whole audit of one or more models on one request."""

    schema_version: Literal["1"] = SCHEMA_VERSION
    created: str  #: ISO 8601, UTC
    title: str
    modality: str = "language"
    data: dict[str, dict[str, Any]]  #: by set name: records, clusters, digest, source
    models: list[ModelEntry]
    curves: list[Curve] = Field(default_factory=list)
    distributions: list[Distribution] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)
    not_shown: list[str] = Field(default_factory=list)  #: what this audit did not measure or cannot conclude, one sentence each
    protocol: dict[str, Any] = Field(default_factory=dict)  #: metrics, attacks, thresholds, levels, seeds
    signature: dict[str, str] = Field(default_factory=dict)  #: precision, attention kernel, library versions
    cost: dict[str, float] = Field(default_factory=dict)

    def entry(self, label: str) -> ModelEntry:
        """The model called ``label``; KeyError if there is none."""
        for model in self.models:
            if model.label == label:
                return model
        raise KeyError(label)
