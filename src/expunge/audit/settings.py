"""What an audit measures and how sure it must be: one typed object for Python, YAML and the command line."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from expunge.audit.arrays import Thresholds
from expunge.audit.attacks.registry import ATTACKS, Access, Attack, fitting
from expunge.audit.attacks.relearn import RelearnSettings
from expunge.audit.evidence import Protocol
from expunge.audit.metrics.registry import METRICS, Metric
from expunge.audit.protocol import AuditProtocol, load_protocol
from expunge.core.access import OF_WEIGHTS, Offer
from expunge.core.errors import InputError, unknown
from expunge.core.settings import Settings

_HARMLESS = ("protocol", "batch_tokens", "shard_examples", "samples_forget", "samples_retain")
QUICK_ATTACKS = ("loss", "zlib", "min-k", "min-k-plus-plus", "reference")


class AuditSettings(Settings):
    """Options of :func:`expunge.audit.run.audit`."""

    name: ClassVar[str] = "audit"

    metrics: tuple[str, ...] = Field((), description="metrics to compute; none given: all that fit any records")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings of metrics by name, such as truth-ratio: {mean: arithmetic}"
    )
    attacks: tuple[str, ...] = Field((), description="attacks beyond relearning and rounding, by name; all: those that fit")
    attack_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings of attacks by name, such as prefix-injection: {max_new_tokens: 32}"
    )
    budget: int | None = Field(None, ge=1, description="records per set at most, dropped by whole clusters; none: all")
    batch_tokens: int = Field(8192, ge=1, description="padded tokens per batch")
    shard_examples: int = Field(512, ge=1, description="examples per cache file: what is held in memory at a time")
    draws: int = Field(2000, ge=100, description="draws of the bootstrap")
    level: float = Field(0.95, gt=0.5, lt=1, description="level of the confidence intervals")
    seed: int = Field(0, ge=0, description="seed of bootstrap, budgets and samples")
    relearn: RelearnSettings | None = Field(
        default_factory=RelearnSettings, description="relearning attack on a copy; none: not tried"
    )
    quantise: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field(
        (8, 4), description="bits to which the weights of a copy are rounded; none: not tried"
    )
    quantise_group: int | None = Field(None, ge=1, description="inputs that share a scale when rounding; none: a whole row")
    read_out: bool = Field(
        True, description="of classifiers: fit a last layer anew on the model's features, and see what it says"
    )
    usual: bool = Field(True, description="try the attacks that cost next to nothing unasked (taken-apart)")
    thresholds: Thresholds = Field(default_factory=Thresholds, description="what a verdict takes for the same, lost and sure")
    samples_forget: int = Field(6, ge=0, description="forget prompts whose answers are shown")
    samples_retain: int = Field(3, ge=0, description="retain prompts whose answers are shown")

    protocol: AuditProtocol | None = Field(
        None, description="the declared protocol that these settings come from (expunge audit --protocol)"
    )

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            METRICS.get(name)
        return value

    @field_validator("options")
    @classmethod
    def _buildable(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, options in value.items():
            METRICS.get(name)(**options)
        return value

    @field_validator("attacks", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return tuple(w.strip() for w in value.split(",") if w.strip()) if isinstance(value, str) else value

    @field_validator("quantise", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return () if value is None else value

    @field_validator("attacks")
    @classmethod
    def _attacks_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name != "all":
                ATTACKS.get(name)
        return value

    @field_validator("attack_options")
    @classmethod
    def _attacks_buildable(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, options in value.items():
            ATTACKS.get(name)(**options)
        return value

    @classmethod
    def quick(cls, **changes: Any) -> AuditSettings:
        """Scores and generations only: no attack that trains, rounds or differentiates, and so no verdict "forgotten"."""
        asked = changes.get("metrics") or METRICS.names()
        options = {n: {"attacks": QUICK_ATTACKS} for n in ("membership", "privleak") if n in asked}
        return cls(**{"relearn": None, "quantise": (), "read_out": False, "usual": False, "options": options, **changes})

    def as_asked(self) -> AuditSettings:
        """The same for models that can only be asked: without all that acts on weights or looks inside."""
        usable = [
            n for n, kind in ATTACKS.items() if kind.access in (Access.TEXT, Access.SCORES) and not kind.offers & OF_WEIGHTS
        ]
        named = ATTACKS.names() if "all" in self.attacks else self.attacks
        attacks = tuple(n for n in named if n in usable)
        kept = {k: v for k, v in self.attack_options.items() if k in attacks or not attacks}
        return self.model_copy(
            update={"relearn": None, "quantise": (), "read_out": False, "attacks": attacks, "attack_options": kept}
        )  # fmt: skip

    @classmethod
    def under(cls, protocol: AuditProtocol | str, **changes: Any) -> AuditSettings:
        """The settings of a protocol, by name, file or as an object, with changes; what is changed is said beside its name.

        Raises:
            InputError: there is no such protocol, or a setting is wrong.
        """
        held = load_protocol(protocol) if isinstance(protocol, str) else protocol
        given = {"attacks": held.attacks, **held.settings}
        for key, value in changes.items():
            both = isinstance(value, dict) and isinstance(given.get(key), dict)
            given[key] = {**given[key], **value} if both else value
        return cls(**given, protocol=held)

    def protocol_label(self) -> str:
        """``removal-v1``, and in brackets what was changed of it that a verdict could depend on; empty without a protocol."""
        if self.protocol is None:
            return ""
        declared = AuditSettings.under(self.protocol)
        changed = [k for k in type(self).model_fields if k not in _HARMLESS and getattr(self, k) != getattr(declared, k)]
        return self.protocol.label + (f" (changed: {', '.join(changed)})" if changed else "")

    def chosen(self, offers: frozenset[Offer] | None = None) -> list[Metric]:
        """The metrics with their settings, in the order asked for.

        Args:
            offers: what the modality offers; metrics that need more are left out where none were named. None: of any modality.

        Raises:
            InputError: settings are given for a metric that was not asked for, or a metric was named that needs more.
        """
        for name in self.metrics:
            missing = sorted(METRICS.get(name).offers - offers) if offers is not None else []
            if missing:
                raise InputError(
                    f"The metric {name!r} needs {', '.join(missing)}, which these models do not offer.",
                    "See `expunge metrics`, or name no metrics: then all that fit are computed.",
                )
        usual = [n for n, kind in METRICS.items() if not kind.on_request]
        names = self.metrics or tuple(n for n in usual if offers is None or METRICS.get(n).offers <= offers)
        for name in self.options:
            if name not in (self.metrics or usual):
                raise unknown("metric of this audit", name, names)
        return [METRICS.get(n)(**self.options.get(n, {})) for n in names]

    def chosen_attacks(self, offers: frozenset[Offer] | None = None) -> list[Attack]:
        """The attacks with their settings, in the order asked for; see :meth:`chosen` for ``offers``.

        Raises:
            InputError: settings are given for an attack that was not asked for, or an attack was named that needs more.
        """
        every = ATTACKS.names() if offers is None else fitting(offers)
        names = tuple(every) if "all" in self.attacks else self.attacks
        for name in names:
            missing = sorted(ATTACKS.get(name).offers - offers) if offers is not None else []
            if missing:
                raise InputError(
                    f"The attack {name!r} needs {', '.join(missing)}, which these models do not offer.",
                    f"Attacks that fit: {', '.join(every) or 'none'}.",
                )
        if self.usual:
            names = (*names, *(n for n in every if ATTACKS.get(n).usual))
        for name in self.attack_options:
            if name not in (names or every):
                raise unknown("attack of this audit", name, names)
        return [ATTACKS.get(n)(**self.attack_options.get(n, {})) for n in dict.fromkeys(names)]

    def evidence_protocol(self) -> Protocol:
        """How evidence is gathered; generations are as long as the longest that any metric reads."""
        asking = (*self.chosen(), *self.chosen_attacks())
        limits = [int(m.max_new_tokens) for m in asking if "max_new_tokens" in type(m).model_fields]  # type: ignore[attr-defined]
        return Protocol(
            batch_tokens=self.batch_tokens, shard_examples=self.shard_examples, max_new_tokens=max(limits, default=1),
            draws=self.draws, level=self.level, seed=self.seed,
        )  # fmt: skip
