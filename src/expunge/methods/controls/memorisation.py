"""Stopping once what is to be forgotten is known no better than unseen text, by what the model says of it by heart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from expunge.adapters.base import Example, Targets
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.control import Control, Decision, Sight
from expunge.methods.controls.overlap import accuracy, extraction
from expunge.methods.controls.registry import control


@control
class Memorisation(Control):
    """Training ends when memorisation accuracy and extraction likelihood of the forget set are below those of unseen text.

    MA is the share of tokens that are the model's first choice given the true text before them, EL_n the share of n-grams of
    its greedy continuations that occur in the true text (Jang et al. 2022, arXiv 2210.01504). Both are means over the forget
    examples, of a recipe on marked spans over these alone. EL takes generations, so it is only computed once MA is within
    ``margin`` of its threshold; and EL that has not fallen for ``patience`` looks will do (the rule of CodeEraser, arXiv
    2509.13755).

    A threshold that is not given is measured on held-out records under the target: give ``--holdout``, with spans if spans are to
    be forgotten (without any, all its text counts).
    """

    name: ClassVar[str] = "memorisation"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOGITS, Offer.GENERATE, Offer.SEQUENCE, Offer.TEXT})

    ma: float | None = Field(None, ge=0, le=1, description="threshold of MA; none: that of held-out records under the target")
    el: float | None = Field(None, ge=0, le=1, description="threshold of EL; none: that of held-out records under the target")
    n: int = Field(10, ge=1, description="length of the n-grams of EL")
    margin: float = Field(0.3, ge=0, description="EL is computed once MA is at most so far above its threshold")
    patience: int | None = Field(5, ge=1, description="looks without a lower EL after which EL will do; none: it must be reached")
    points: int = Field(8, ge=1, description="places in each text, or span, from which it is continued for EL, at most")

    @property
    def reads(self) -> frozenset[Stream]:
        """Held-out records, if a threshold is to be measured."""
        return frozenset() if self.ma is not None and self.el is not None else frozenset({Stream.VALIDATION})

    def begin(self, sight: Sight, state: dict[str, Any]) -> None:
        """Measure the thresholds that were not given.

        Raises:
            InputError: there are no held-out records.
        """
        state |= {"ma": self.ma, "el": self.el, "best": None, "since": 0}
        if not self.reads:
            return
        unseen = sight.examples.get(Stream.VALIDATION, ())
        if not unseen:
            raise InputError(
                f"control={self.name} measures its thresholds on held-out records, and none were given.",
                "Give --holdout DATA, or control.ma and control.el.",
            )
        targets: Targets = sight.targets if any(e.n_marked for e in unseen) else "all"
        if self.ma is None:
            state["ma"] = _mean(accuracy(sight.adapter, sight.model, unseen, targets, sight.max_units))
        if self.el is None:
            state["el"] = self._el(sight, unseen, targets)

    def look(self, sight: Sight, state: dict[str, Any]) -> Decision:
        """Compare with the thresholds."""
        seen, stop = self.judge(sight, state)
        return Decision(stop=stop, seen=seen)

    def judge(self, sight: Sight, state: dict[str, Any]) -> tuple[dict[str, float], str]:
        """What was measured, and why it is enough (empty: it is not)."""
        forget = sight.examples[Stream.FORGET]
        ma = _mean(accuracy(sight.adapter, sight.model, forget, sight.targets, sight.max_units))
        seen = {"ma": ma}
        if ma - state["ma"] > self.margin:
            return seen, ""
        el = seen["el"] = self._el(sight, forget, sight.targets)
        better = state["best"] is None or el < state["best"]
        state["best"], state["since"] = (el, 0) if better else (state["best"], state["since"] + 1)
        settled = self.patience is not None and state["since"] >= self.patience
        if not ma < state["ma"] or not (el < state["el"] or settled):
            return seen, ""
        return seen, (
            f"the forget set is known no better than unseen text: memorisation accuracy {ma:.3f} below {state['ma']:.3f}, "
            f"extraction likelihood {el:.3f} " + (f"below {state['el']:.3f}" if el < state["el"] else "no longer falling")
        )

    def _el(self, sight: Sight, examples: Sequence[Example], targets: Targets) -> float:
        return _mean(extraction(sight.adapter, sight.model, examples, targets, sight.max_units, n=self.n, points=self.points))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
