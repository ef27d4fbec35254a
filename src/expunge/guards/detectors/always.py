"""Every request, whatever it says."""

from __future__ import annotations

from typing import ClassVar

from expunge.guards.conversation import Conversation
from expunge.guards.parts import Detector, Hit, Hook, Material, Watcher, detector
from expunge.guards.target import Target


@detector
class Always(Detector):
    """Fires on every request: for actions that are always on."""

    name: ClassVar[str] = "always"
    title: ClassVar[str] = "Every request"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.REQUEST})

    def fit(self, material: Material) -> Watcher:
        """Nothing is learnt but which targets there are."""
        return AlwaysWatcher({t.id for t in material.targets})


class AlwaysWatcher(Watcher):
    """Fires once for each target, and once without one where there is none.

    Args:
        targets: ids.
    """

    def __init__(self, targets: set[str]) -> None:
        self.targets = frozenset(targets)

    def add(self, target: Target) -> None:
        """One more."""
        self.targets |= {target.id}

    def drop(self, target: str) -> None:
        """One less."""
        self.targets -= {target}

    def request(self, conversation: Conversation) -> list[Hit]:
        """One hit, of no target in particular: it is about the request, not about what it says."""
        return [Hit("", 1.0)]
