"""Teaching a model to obey a tag that names what is to be forgotten: the training behind in-context knowledge unlearning."""

from __future__ import annotations

from expunge.adapters.added import with_tokens
from expunge.adapters.language import LanguageAdapter
from expunge.core.access import Stream
from expunge.data.tags import TAGS, TagSamples
from expunge.engine.loop import train
from expunge.engine.options import Engine
from expunge.engine.parameters import Lora
from expunge.engine.parts import Parameters, Schedule
from expunge.engine.schedule import Fixed
from expunge.methods.compose import compose
from expunge.methods.terms.likelihood import NLL

#: As published for LoRA and TOFU: three passes at a constant rate, in batches of four.
PUBLISHED = Fixed(lr=2e-4, epochs=3, batch=4, warmup=0.09, decay="constant", weight_decay=1e-3)
LORA = Lora(rank=4, alpha=8.0, dropout=0.1)


def teach_tags(
    adapter: LanguageAdapter,
    samples: TagSamples,
    *,
    schedule: Schedule = PUBLISHED,
    parameters: Parameters | None = LORA,
    engine: Engine | None = None,
) -> LanguageAdapter:
    """A copy of a model that has learnt to say that it forgot what a tag names (Takashiro et al. 2024, arXiv 2410.00382).

    ``L = NLL(forgot | tag of what is asked, question) + NLL(answer | tag of something else, question)``, as a fine-tuning on
    both kinds of samples and on those without a tag, if there are any. The official code also trains on the prompts; here, as
    in the paper's formula, on answers alone. Nothing is forgotten: without the tag the model answers as before. The published
    gradient clipping (0.3) is a setting of ``engine``.

    Args:
        adapter: the model; it is left as it is.
        samples: :func:`expunge.data.tags.tag_samples`.
        schedule: how long and how fast.
        parameters: what moves; none: everything.
        engine: of the training.
    """
    made = with_tokens(adapter, TAGS)
    records = [*samples.forget, *samples.retain, *samples.plain]
    recipe = compose("in-context", retain=[NLL()], parameters=parameters, schedule=schedule)
    train(made, recipe, {Stream.RETAIN: [made.encode(r) for r in records]}, engine or Engine())
    made.model.eval()
    return made
