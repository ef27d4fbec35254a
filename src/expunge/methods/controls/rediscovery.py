"""Rounds of discovery: after every pass the model as it is now writes the next forget set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from expunge.adapters.base import Example
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.engine.control import Control, Decision, Sight
from expunge.methods.controls.registry import control
from expunge.methods.discovered import Count, Discovery, count, packed, unpacked
from expunge.methods.preparations.discovery import DISCOVERY

_HELD, _ROUND = 22, 23  #: of this control's draws


@control
class Rediscovery(Control):
    """After every pass names are looked for again, with the model as it is and with prompts that made it make names up.

    Half of the next prompts are the worst of the last ones; the others are mutations of those that made the model make names up
    (``preparation.slots``), or, where there are none, further ones of the first prompts. It ends after ``rounds`` rounds, when
    the share of made-up names in completions of held-out prompts no longer falls (for
    ``patience`` rounds: it is a share of a sample), or when none is made up any more.

    Held-out prompts (``--holdout``) are never used for discovery, nor are mutations that come out as one of those that set the
    stop (half of the holdout) or as one of ``preparation.spare``.
    """

    name: ClassVar[str] = "rediscovery"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.SEQUENCE, Offer.TEXT, Offer.GENERATE})
    uses: ClassVar[frozenset[str]] = frozenset({DISCOVERY})
    renews: ClassVar[bool] = True

    rounds: int = Field(5, ge=1, description="rounds at most, the first one included")
    patience: int = Field(2, ge=1, description="rounds in a row without a lower share of made-up names after which it ends")

    @property
    def reads(self) -> frozenset[Stream]:
        """Held-out prompts, on which the share of made-up names is measured."""
        return frozenset({Stream.VALIDATION})

    def begin(self, sight: Sight, state: dict[str, Any]) -> None:
        """Measure the target on held-out prompts.

        Raises:
            InputError: there are none, or one of them is among the prompts that are used.
        """
        held = sight.examples.get(Stream.VALIDATION, ())
        if not held:
            raise InputError(
                f"control={self.name} measures made-up names on held-out prompts, and none were given.",
                "Give --holdout DATA, or control=none for a single round.",
            )
        state["held_out"] = [sight.adapter.text(p) for p in held]
        state["used"] = [sight.adapter.text(p) for p in sight.made["prompts"]]
        shared = sorted(set(state["held_out"]) & set(state["used"]))
        if shared:
            raise InputError(
                f"{len(shared)} held-out prompts are among those used for discovery, such as {shared[0][:60]!r}.",
                "Leave them out of one of both.",
            )
        now = self._measured(sight, 0)
        state |= {"round": 1, "seen": [now.json()], "best": now.rate, "since": 0, "pool": None}
        how: Discovery = sight.made[DISCOVERY]
        state["made_up"] = _by_prompt([len(s.made_up) for s in sight.made["said"]], how.samples)

    def look(self, sight: Sight, state: dict[str, Any]) -> Decision:
        """Measure, and make the examples of the next round."""
        done, now = state["round"], self._measured(sight, state["round"])
        state["seen"].append(now.json())
        seen = {"round": done, "made_up": now.made_up, "names": now.names, "rate": now.rate, "distinct": now.distinct_valid}
        if done >= self.rounds:
            return Decision(stop=f"the {done} rounds are over", seen=seen)
        if now.rate < state["best"]:
            state |= {"best": now.rate, "since": 0}
        else:
            state["since"] += 1
        if state["since"] >= self.patience:
            said = f"the share of made-up names on held-out prompts no longer falls ({now.rate:.1%}, {state['best']:.1%} before)"
            return Decision(stop=said, seen=seen)
        how: Discovery = sight.made[DISCOVERY]
        first: Sequence[Example] = sight.made["prompts"]
        pool = first if state["pool"] is None else unpacked(state["pool"])
        used = set(state["used"])
        pool = how.next_prompts(
            sight.adapter, pool, state["made_up"], first,
            used=used, avoid=set(state["held_out"]) | sight.made["spare"], seed=[sight.seed, _ROUND, done],
        )  # fmt: skip
        written = how.draw(sight.adapter, sight.model, pool, max_units=sight.max_units, seed=[sight.seed, _ROUND, done])
        said_now = how.read(sight.adapter, pool, written, str(done + 1))
        found = count(said_now)
        if not found.made_up:
            return Decision(stop=f"no name was made up in {len(said_now)} completions of round {done + 1}", seen=seen)
        fresh = [s.example for s in said_now]
        state["used"] += sorted(used - set(state["used"]))
        state |= {"round": done + 1, "pool": packed(pool), "examples": packed(fresh)}
        state["made_up"] = _by_prompt([len(s.made_up) for s in said_now], how.samples)
        return Decision(seen=seen | {"found": found.made_up}, fresh=fresh)

    def renewed(self, sight: Sight, state: dict[str, Any]) -> Sequence[Example] | None:
        """The examples of the last round."""
        return unpacked(state["examples"]) if state.get("examples") else None

    def notes(self, state: dict[str, Any]) -> list[str]:
        """The held-out prompts before and after."""
        if "seen" not in state:
            return []
        seen = [Count(**c) for c in state["seen"]]
        out = [f"Held-out prompts, the target: {seen[0].text()}."]
        if len(seen) > 1:
            out.append(
                f"Held-out prompts, after {len(seen) - 1} rounds: {seen[-1].text()}. Training was stopped by these prompts; "
                "measure on others: expunge hallucinations."
            )
        return out

    def record(self, state: dict[str, Any]) -> dict[str, Any]:
        """The prompts, and what was measured after each round."""
        return {k: state[k] for k in ("seen", "used", "held_out") if k in state}

    def _measured(self, sight: Sight, done: int) -> Count:
        how: Discovery = sight.made[DISCOVERY]
        held = sight.examples[Stream.VALIDATION]
        written = how.draw(sight.adapter, sight.model, held, max_units=sight.max_units, seed=[sight.seed, _HELD, done])
        return count(how.read(sight.adapter, held, written, f"held-{done}"))


def _by_prompt(made_up: Sequence[int], samples: int) -> list[int]:
    return [sum(made_up[i : i + samples]) for i in range(0, len(made_up), samples)]
