"""Typed configurations of the stages: the same object from Python, a YAML file and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from expunge.core.errors import InputError
from expunge.core.settings import Settings, load_yaml, nest
from expunge.data.spans import Spans
from expunge.engine.options import Engine
from expunge.methods.tuned import beneath, chosen, folder
from expunge.pipeline.tuned import Tuned, shipped_origin


class TextConfig(Settings):
    """How text becomes tokens."""

    name: ClassVar[str] = "text"

    columns: dict[str, str] = Field(default_factory=dict, description="names of your columns, e.g. prompt=question_text")
    template: str | None = Field(
        None, description="prompt template where the tokenizer has no chat template, with {prompt} and {answer}"
    )
    max_length: int | None = Field(None, ge=8, description="longest input in tokens; none: the model's context")
    truncate: bool = Field(False, description="cut longer texts instead of refusing them")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision of the weights; auto keeps the file's")


class Allowances(Settings):
    """What a user insists on against the checks of a request."""

    allow_overlap: bool = Field(False, description="go on although forget and retain share records")
    drop_overlap: bool = Field(False, description="leave shared records out of the retain and holdout sets")
    allow_large_forget: bool = Field(False, description="go on although there is more to forget than to keep")


class UnlearnConfig(Allowances):
    """Everything that an unlearning run depends on."""

    name: ClassVar[str] = "unlearn"

    model: str = Field(description="hub id, local folder, or a run folder of `expunge train`: the target model")
    forget: str = Field(description="what to forget: a file or a named data set")
    retain: str | None = Field(None, description="what to keep: a file or a named data set")
    holdout: str | None = Field(None, description="records that the model was never trained on")
    method: str = Field("npo", description="a method's name, or 'custom' with all parts given")
    settings: str | None = Field(None, description="a shipped set of settings that sweeps found, put beneath the parts")
    parts: dict[str, Any] = Field(default_factory=dict, description="parts and parameters that differ from the method's own")
    alternatives: Literal["auto", "refusals", "given", "others", "passages", "template", "reasons"] = Field(
        "auto",
        description="answers put in the place of forgotten ones; auto: given ones if all have one, else as the method publishes",
    )
    alternative_template: str | None = Field(
        None, description="the text of alternatives=template, with {subject}, {prompt} and {refusal} where they belong"
    )
    base: str | None = Field(None, description="the untrained base of the model, for methods that start from it")
    text: TextConfig = Field(default_factory=TextConfig, description="how text becomes tokens")
    spans: Spans = Field(default_factory=Spans, description="which parts of the texts are marked")
    engine: Engine = Field(default_factory=Engine, description="how the machine is used")
    tuned: Tuned | None = Field(None, description="where the settings come from, if `expunge sweep` has chosen them")

    @model_validator(mode="before")
    @classmethod
    def _with_settings(cls, given: Any) -> Any:
        """A shipped set by its name: its parts beneath those given, and the records that it was chosen on."""
        if not isinstance(given, dict) or not given.get("settings"):
            return given
        name, method = given["settings"], given.get("method") or cls.model_fields["method"].default
        parts = beneath(chosen(name, method).parts, nest(dict(given.get("parts") or {})))
        return {**given, "parts": parts, "tuned": given.get("tuned") or shipped_origin(folder(name))}


class TrainConfig(Settings):
    """Everything that a training run depends on."""

    name: ClassVar[str] = "train"

    model: str = Field(description="hub id or local folder of the base model; with scratch: a preset such as llama-tiny")
    data: tuple[str, ...] = Field(min_length=1, description="files or named data sets to train on")
    scratch: bool = Field(False, description="start from random weights of the preset, with a tokenizer made from the data")
    vocabulary: tuple[str, ...] = Field(
        (), description="with scratch: further files whose words the tokenizer must know, such as the holdout; not trained on"
    )
    exclude: tuple[str, ...] = Field((), description="content keys of records to leave out (used for retrained models)")
    parts: dict[str, Any] = Field(default_factory=dict, description="schedule and parameters, e.g. schedule.epochs=10")
    text: TextConfig = Field(default_factory=TextConfig, description="how text becomes tokens")
    engine: Engine = Field(default_factory=Engine, description="how the machine is used")


def from_file(path: Path) -> dict[str, Any]:
    """Read a YAML (or JSON) configuration file as a mapping.

    Raises:
        InputError: it is missing, not YAML, or no mapping.
    """
    if not path.is_file():
        raise InputError(f"There is no configuration file {str(path)!r}.", "Give a YAML or JSON file to --config.")
    try:
        held = load_yaml(path.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML and the decoder raise many kinds; all mean that the file is unreadable
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The configuration {str(path)!r}{where} cannot be read: {reason}.", "Write it as YAML or JSON."
        ) from None
    if not isinstance(held, dict):
        raise InputError(
            f"The configuration {str(path)!r} must be a mapping of settings, not {type(held).__name__}.",
            "Write lines such as 'method: npo'.",
        )
    return held


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Join mappings, later ones win; mappings inside are joined, everything else is replaced.

    None at the top is an option that was not given and overrides nothing; inside it is a value (``schedule.clip=none``).
    """
    out: dict[str, Any] = {}
    for layer in layers:
        out = _joined(out, {k: v for k, v in layer.items() if v is not None})
    return out


def _joined(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(under)
    for key, value in over.items():
        held = out.get(key)
        out[key] = _joined(held, value) if isinstance(value, dict) and isinstance(held, dict) else value
    return out
