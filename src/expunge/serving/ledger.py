"""Where the record of each request goes."""

from __future__ import annotations

from typing import Protocol

from expunge.guards.decoding import Answer
from expunge.guards.policy import Plan, Policy


class Ledger(Protocol):
    """Keeps one record for each request; it must never see to it that an answer is late by more than its write."""

    def of(self, policy: Policy) -> None:
        """Keep records of this policy's decisions; called before anything else."""

    def note(self) -> object:
        """Note which targets are hidden from here on, if that has changed; called at the start and after each change.

        Raises:
            ExpungeError: it could not be written.
        """

    async def answered(self, client: str, plan: Plan, answer: Answer, seconds: float) -> None:
        """A request was answered."""

    async def given_up(self, client: str, plan: Plan, why: str, seconds: float) -> None:
        """A request got no answer."""


class NoLedger:
    """Keeps nothing."""

    def of(self, policy: Policy) -> None:
        """Nothing is kept."""

    def note(self) -> None:
        """Nothing is kept."""

    async def answered(self, client: str, plan: Plan, answer: Answer, seconds: float) -> None:
        """Nothing is kept."""

    async def given_up(self, client: str, plan: Plan, why: str, seconds: float) -> None:
        """Nothing is kept."""
