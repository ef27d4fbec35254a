"""Per-example flags of ICU: a text that the model no longer continues truly rests, until it does so again."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from expunge.adapters.base import Adapter, Example, Targets
from expunge.core.access import Stream
from expunge.engine.control import Decision, Sight
from expunge.methods.controls.memorisation import Memorisation
from expunge.methods.controls.overlap import bleu, said, segments, token_f1
from expunge.methods.controls.registry import control


@control
class OverlapFlags(Memorisation):
    """Each forget example rests while its greedy continuation has little in common with the truth (ICU, arXiv 2407.20271).

    After every look an example whose BLEU is below ``bleu`` or whose F1 is below ``f1`` rests, with the retain example that is
    paired with it; it comes back if the model says it again. Training ends when all rest, or by the rule of
    ``control=memorisation`` with the published thresholds. The answer to a prompt is continued from its begin, plain text from
    its middle (the paper: the tokens 150 to 200 from those before), and of a recipe on marked spans each span is.

    BLEU is that of tokens, up to 4-grams, as published. In the place of BERTScore's F1 stands the F1 of the two bags of tokens:
    BERTScore needs a second language model, whose words the user would have to trust, and what is to be seen here is whether the
    very text is said, not its like. It is what BERTScore would be if each token were like itself alone, so it is the stricter of
    the two, and examples rest sooner. Continuations are greedy; the paper's have two beams.
    """

    name: ClassVar[str] = "overlap-flags"

    bleu: float = Field(0.01, ge=0, le=1, description="an example rests below this BLEU")
    f1: float = Field(0.3, ge=0, le=1, description="an example rests below this F1 of tokens")
    ma: float | None = Field(0.5994, ge=0, le=1, description="threshold of MA; none: that of held-out records under the target")
    el: float | None = Field(0.0499, ge=0, le=1, description="threshold of EL; none: that of held-out records under the target")
    margin: float = Field(0.0, ge=0, description="EL is computed once MA is at most so far above its threshold")
    patience: int | None = Field(None, ge=1, description="looks without a lower EL after which EL will do; none: never")

    def look(self, sight: Sight, state: dict[str, Any]) -> Decision:
        """Set the flags anew."""
        forget = sight.examples[Stream.FORGET]
        places = [(i, e, a, b) for i, e in enumerate(forget) for a, b in _asked(sight.adapter, e, sight.targets)]
        scores: dict[int, list[tuple[float, float]]] = {}
        found = said(sight.adapter, sight.model, [(e, a, b) for _, e, a, b in places], sight.max_units)
        for (number, _, _, _), (words, true) in zip(places, found, strict=True):
            scores.setdefault(number, []).append((bleu(words, true), token_f1(words, true)))
        # An example with nothing to say has nothing to forget.
        known = {i for i, held in scores.items() if any(b >= self.bleu and f >= self.f1 for b, f in held)}
        resting = frozenset(range(len(forget))) - known
        seen, stop = self.judge(sight, state)
        if not known:
            stop = f"the model continues none of the {len(forget)} forget examples truly"
        return Decision(resting, stop, seen)


def _asked(adapter: Adapter, example: Example, targets: Targets) -> list[tuple[int, int]]:
    """Which targets are to be said: the answer, the second half of a plain text, or the marked spans."""
    found = segments(adapter, example, targets)
    plain = example.size - example.n_targets <= 1
    return [((a + b) // 2, b) if targets == "all" and plain else (a, b) for a, b in found]
