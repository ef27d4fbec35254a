"""Guards' say about scores as a ``LogitsProcessor`` of transformers: for plain ``generate``, beams, and other engines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from expunge.adapters.head import bare, base
from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.guards.decoding import Answer, Ask, Hooks, padded
from expunge.guards.policy import Plan, scored


class GuardScores(LogitsProcessor):
    """Applies plans to scores, row by row; with beams, rows ``i * beams`` and those after it are of prompt ``i``.

    It holds no state of the decoding but the plans: rows may be reordered between steps. Of a request that is refused the tokens
    of the refusal are forced, so that an engine that knows nothing of guards says it.

    Args:
        plans: one for each prompt.
        lengths: tokens of each prompt.
        width: columns of the padded prompts.
        tokenizer: of the model.
        ends: end tokens.
        read: called before the first scores are changed.
    """

    def __init__(
        self, plans: Sequence[Plan], lengths: Sequence[int], width: int, *, tokenizer: Any, ends: frozenset[int],
        read: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.plans, self.lengths, self.width = list(plans), list(lengths), width
        self.tokenizer, self.ends, self.read = tokenizer, ends, read
        self._spelt: dict[str, list[int]] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B * beams, V]`` of the next tokens after ids ``[B * beams, T]``.

        Raises:
            InputError: there are no whole beams for each prompt.
        """
        self.read()
        beams, left = divmod(len(scores), len(self.plans))
        if left or not beams:
            raise InputError(f"{len(scores)} rows are no whole number of beams for {len(self.plans)} prompts.")
        made = scores.clone()
        each = [(self.plans[row // beams], self.lengths[row // beams]) for row in range(len(scores))]
        changed = [row for row, (plan, _) in enumerate(each) if plan.say is None and plan.scores]
        asked = [(each[r][0], input_ids[r, self.width - each[r][1] :], each[r][1], scores[r].float()) for r in changed]
        for row, found in zip(changed, scored(asked), strict=True):
            made[row] = found.to(scores.dtype)
        for row, (plan, _) in enumerate(each):
            if plan.say is not None:  # from the beginning, or since its scores were looked at
                made[row] = self._forced(plan.say, input_ids[row, self.width :].tolist(), scores[row])
        return made

    def _forced(self, say: str, said: list[int], scores: Tensor) -> Tensor:
        """All but the next token of a refusal at minus infinity; after another beginning, and after its end, an end token."""
        if say not in self._spelt:
            self._spelt[say] = self.tokenizer(say, add_special_tokens=False)["input_ids"]
        ids = self._spelt[say]
        token = ids[len(said)] if said == ids[: len(said)] and len(said) < len(ids) else None
        keep = sorted(self.ends) if token is None else [token]
        made = torch.full_like(scores, -torch.inf)
        made[keep] = 0.0 if token is not None else scores[keep].clamp(min=-1e4)
        return made

    def checked(self, at: int, text: str) -> str:
        """What may be sent of the whole answer to prompt ``at``: watchers of answers see it here, and only here."""
        plan = self.plans[at]
        plan.release(text, final=True)
        return plan.revised(text)


def processor(
    adapter: LanguageAdapter, plans: Sequence[Plan], lengths: Sequence[int], width: int, *, rewritten: Sequence[bool] = ()
) -> GuardScores:
    """A processor of plans for an engine that runs the model itself.

    Raises:
        InputError: a plan changes what a processor of scores cannot: the conversation, embeddings or states; or it reads states.
    """
    for at, plan in enumerate(plans):
        if plan.say is not None:
            continue
        more = {
            "the request": bool(rewritten) and rewritten[at], "embeddings": bool(plan.embeddings), "states": bool(plan.hidden),
            "states (to read them)": bool(plan.readings),
        }  # fmt: skip
        if found := [name for name, there in more.items() if there]:
            raise InputError(
                f"A guard works on {', '.join(found)}, and a processor of scores reaches scores alone.",
                "Ask the guarded model itself, or use guards of requests, scores and answers.",
            )
    return GuardScores(plans, lengths, width, tokenizer=adapter.tokenizer, ends=adapter.end_ids)


def beamed(adapter: LanguageAdapter, asks: Sequence[Ask], beams: int, limit: int) -> list[Answer]:
    """Answers by beam search, the best beam of each; see :meth:`expunge.guards.decoding.Decoder.beamed`.

    Embeddings and states are edited as in any other decoding, for all beams of a request alike.
    """
    inner = base(adapter.model)
    model: Any = bare(adapter.model)
    pad, ends = adapter.pad_id(), adapter.end_ids
    ids, mask = padded(asks, pad)
    width = ids.shape[1]
    hooks = Hooks(inner, [a for a in asks for _ in range(beams)], width)
    lengths = [len(a.prompt.ids) for a in asks]
    scores = GuardScores([a.plan for a in asks], lengths, width, tokenizer=adapter.tokenizer, ends=ends, read=hooks.told)
    options = {
        "max_new_tokens": limit, "do_sample": False, "num_beams": beams, "use_cache": True, "pad_token_id": pad,
        "eos_token_id": sorted(ends) or None,
    }  # fmt: skip
    device = next(inner.parameters()).device
    with hooks.installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(**options),  # type: ignore[no-untyped-call]
            logits_processor=LogitsProcessorList([scores]),
        )
    return [
        _answered(scores, at, ask, row, adapter)
        for at, (ask, row) in enumerate(zip(asks, found[:, width:].tolist(), strict=True))
    ]


def _answered(scores: GuardScores, at: int, ask: Ask, row: Sequence[int], adapter: LanguageAdapter) -> Answer:
    end = next((i for i, t in enumerate(row) if t in adapter.end_ids), None)
    ids = list(row[:end])
    text = adapter.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = text if ask.plan.asked.verbatim else text.lstrip()
    sent = scores.checked(at, text)
    if ask.plan.say is not None:
        return Answer(sent, "guard", len(ids), prompt=len(ask.prompt.ids))
    kept = tuple(ids) if sent == text else ()
    return Answer(sent, "length" if end is None else "stop", len(ids), kept, prompt=len(ask.prompt.ids))
