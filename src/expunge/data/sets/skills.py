"""Generated skills as a named data set: ``skills:copy?n=200``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from expunge.data.named import DATASETS, NamedSet
from expunge.data.records import RecordSet
from expunge.data.skills import LONGEST, skill

_HELD_OUT = "-held-out"


@DATASETS.register("skills")
class Skills(NamedSet):
    """Strings of digits copied, reversed or said in two toy languages, and sums in two notations: generated, not downloaded.

    ``NAME-held-out`` holds questions that never stand in a ``NAME``, nor in its sister's.
    """

    name: ClassVar[str] = "skills"
    n: int = Field(60, ge=1, description="questions of a skill; of its held-out ones a fifth as many, and at least one")
    shortest: int = Field(3, ge=2, le=LONGEST, description="digits of a string at least")
    longest: int = Field(5, ge=2, le=LONGEST, description="digits of a string at most")
    seed: int = Field(1, ge=0, description="which questions are drawn")
    reworded: bool = Field(False, description="ask in the other wording")

    def configurations(self) -> dict[str, str]:
        """Each skill, and its questions that are never trained on."""
        what = {"copy": "copy a string", "reverse": "reverse a string", "digits": "sums in digits", "words": "sums in words"}
        what |= {"lumi": "strings in the toy language Lumi", "tarn": "strings in the toy language Tarn"}
        return {**what, **{name + _HELD_OUT: f"{text}: never trained on" for name, text in what.items()}}

    def load(self, configuration: str) -> RecordSet:
        """Generate one part.

        Raises:
            InputError: there are fewer such questions, or the lengths are the wrong way round.
        """
        name = configuration.removesuffix(_HELD_OUT)
        apart = name != configuration
        n, length = max(1, self.n // 5) if apart else self.n, (self.shortest, self.longest)
        return skill(name, n, self.seed, length, held_out=apart, reworded=self.reworded)
