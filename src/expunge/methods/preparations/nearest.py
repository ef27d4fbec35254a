"""The class that lies nearest to each forget row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from expunge.adapters.base import Adapter
from expunge.core.access import Offer, Stream
from expunge.core.errors import InputError
from expunge.core.search import Search
from expunge.engine.adversarial import classes_under_attack
from expunge.engine.options import Engine
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation


@preparation
class NearestClasses(Preparation):
    """Each forget row with the class that the target sees in it after a small adversarial step (Chen et al. 2023).

    The step is ``bound * sign(d loss / d x)`` from the row itself. Where it does not suffice, the target still sees the row's own
    class, and the row keeps it: the run's notes say how many. What a useful bound is depends on the scale of the inputs.
    """

    name: ClassVar[str] = "nearest-classes"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET,)
    makes: ClassVar[frozenset[str]] = frozenset({Stream.ALTERNATIVE})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.ROWS, Offer.CLASSES})

    bound: Annotated[float, Search(around=10)] = Field(0.1, ge=0, description="largest change of an input number")
    clamp: tuple[float, float] | None = Field(None, description="smallest and largest input number; none: not limited")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Attack and relabel.

        Raises:
            InputError: the inputs are no real numbers, or the step changes the class of no row.
        """
        forget = examples[Stream.FORGET]
        found = classes_under_attack(adapter, forget, bound=self.bound, max_units=engine.max_tokens, clamp=self.clamp)
        made = [adapter.replace(e, answer=found[e.id], suffix="#nearest") for e in forget]
        own, other = (adapter.collate(held).targets for held in (forget, made))
        moved = int((own != other).sum())
        if not moved:
            raise InputError(
                f"A step of {self.bound:g} takes no forget row to another class, so there is nothing to teach.",
                "Raise preparation.bound to the scale of the inputs.",
            )
        note = f"The adversarial step took {moved} of {len(forget)} forget rows to another class; the others keep theirs."
        return Prepared({Stream.ALTERNATIVE: made}, notes=() if moved == len(forget) else (note,))
