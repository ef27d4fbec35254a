"""How a benchmark is run: one typed object for Python, YAML and the command line."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.audit.settings import AuditSettings
from expunge.benchmarks.registry import BENCHMARKS, Benchmark
from expunge.core.errors import InputError, unknown
from expunge.core.runs import cache_folder
from expunge.core.settings import Settings
from expunge.engine.options import Engine
from expunge.pipeline.config import TextConfig
from expunge.pipeline.models import is_preset

SMOKE_MODEL = "llama-tiny"
#: of models trained from scratch: small ones learn nothing at the rates that are published for billions of weights
SMALL_TRAINING: dict[str, Any] = {
    "schedule": {"name": "fixed", "lr": 5e-3, "epochs": 30, "batch": 16, "warmup": 1, "decay": "linear", "weight_decay": 0.01}
}


class BenchmarkConfig(Settings):
    """Everything that a benchmark run depends on."""

    name: ClassVar[str] = "benchmark"

    benchmark: str = Field(description="a benchmark's name")
    options: dict[str, Any] = Field(default_factory=dict, description="the benchmark's own options, such as split=forget05")
    model: str | None = Field(
        None, description="base model to train the target from: hub id, folder, or a preset such as llama-tiny (from scratch)"
    )
    target: str | None = Field(None, description="a target that is trained already: hub id, folder or run folder")
    retrained: tuple[str, ...] = Field((), description="models trained without the forget set, if you have them")
    retrain: int = Field(1, ge=0, le=50, description="models to retrain here without the forget set, with seeds 1, 2, ...")
    methods: tuple[str, ...] = Field((), description="methods to run; none: target and reference models are measured")
    train: dict[str, Any] = Field(default_factory=dict, description="parts of the training that differ from the published ones")
    unlearn: dict[str, Any] = Field(default_factory=dict, description="parts of the unlearning that differ, for all methods")
    settings: Literal["auto", "published", "own"] = Field(
        "auto", description="schedule of unlearning: as the benchmark published it, or each method's own; auto: own for presets"
    )
    courses: tuple[str, ...] = Field((), description="courses over several requests to run, such as scalability")
    checkpoint: Literal["last", "oracle"] = Field(
        "last", description="last: the end of training; oracle: the first that reaches the reference on a test metric"
    )
    verdict: bool = Field(True, description="also audit the models, for the verdict")
    audit: AuditSettings = Field(default_factory=AuditSettings, description="of the audit; its budget holds for the axes too")
    text: TextConfig = Field(default_factory=TextConfig, description="how text becomes tokens")
    engine: Engine = Field(default_factory=Engine, description="how the machine is used")
    smoke: bool = Field(False, description="generated data of the published schema and a tiny model: minutes, no download")

    @property
    def scratch(self) -> bool:
        """Whether the target is a preset, trained from random weights."""
        return self.target is None and self.model is not None and is_preset(self.model)

    @property
    def own(self) -> bool:
        """Whether methods keep their own schedule."""
        return self.settings == "own" or (self.settings == "auto" and self.scratch)

    def opened(self) -> Benchmark:
        """The benchmark with its options; for a smoke run its generated data are made, once.

        Raises:
            InputError: no such benchmark or option.
        """
        kind = BENCHMARKS.get(self.benchmark)
        if not self.smoke:
            return kind(**self.options)
        if "data" in self.options:
            raise InputError("A smoke run brings its own data.", "Leave --data out, or --smoke.")
        given = {**kind().small(), **self.options}
        folder = cache_folder() / "benchmarks" / f"{kind.name}-{self.engine.seed}"
        if not (folder / ".done").is_file():
            kind(**given).sample(folder, self.engine.seed)
            (folder / ".done").touch()
        return kind(**{**given, "data": str(folder)})

    def checked(self) -> BenchmarkConfig:
        """The same after all checks that need no data.

        Raises:
            InputError: there is no model, a name that is not there, or what does not go together.
        """
        if self.smoke and self.model is None and self.target is None:
            return self.model_copy(update={"model": SMOKE_MODEL}).checked()
        held = self.opened()
        if self.model is None and self.target is None:
            raise InputError(
                "No model was given.", "Give --model BASE to train the target from, or --target MODEL if you have it."
            )
        if not held.trainings() and self.target is None and not self.scratch:
            raise InputError(
                f"{held.name} measures a model as it is; it trains no target.", f"Give it as the target: --target {self.model}."
            )
        for name in self.courses:
            if name not in {c.name for c in held.courses()}:
                raise unknown(f"{held.name} course", name, [c.name for c in held.courses()])
        if self.courses and not self.methods:
            raise InputError("A course needs a method.", "Add --method NAME.")
        if self.methods and held.roles() is None:
            raise InputError(f"{held.name} has nothing to unlearn: it measures general ability.", "Leave --method out.")
        if self.checkpoint == "oracle" and held.oracle() is None:
            raise InputError(f"{held.name} has no rule for choosing a checkpoint.", "Leave --checkpoint out.")
        return self
