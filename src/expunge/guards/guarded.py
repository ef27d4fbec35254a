"""A model with its guards, in one process: asked in words, by transformers' ``generate``, or by another engine's loop."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.data.sources import load as load_records
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Answer, Ask, Decoder, Sampling
from expunge.guards.named import rows_of
from expunge.guards.parts import Material
from expunge.guards.policy import Plan, Policy
from expunge.guards.processing import GuardScores, processor
from expunge.guards.prompts import Prompt, cleaned, described, put
from expunge.guards.target import Target


class Guarded:
    """A language model that its guards stand before. The weights are as they were: who has them has what is hidden.

    Args:
        adapter: the model.
        policy: fitted guards.

    Attributes:
        decoder: writes answers.
    """

    def __init__(self, adapter: LanguageAdapter, policy: Policy) -> None:
        self.adapter, self.policy = adapter, policy
        self.decoder = Decoder(adapter)

    @property
    def targets(self) -> Mapping[str, Target]:
        """What is hidden now, by id."""
        return self.policy.targets

    def add(self, target: Target | Mapping[str, Any]) -> str:
        """Hide one target more; its id.

        Raises:
            InputError: it hides nothing or nearly everything, or a detector cannot take it in while it runs.
        """
        made = named(target)
        self.policy.add(made)
        return made.id

    def drop(self, target: str) -> None:
        """Hide a target no more."""
        self.policy.drop(target)

    def answers(
        self,
        conversations: Sequence[str | Conversation | Sequence[Mapping[str, Any]]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        sinks: Sequence[Callable[[str], None] | None] | None = None,
        *,
        scores: bool = False,
    ) -> list[Answer]:
        """Answers to questions or conversations, as one batch.

        Args:
            conversations: what is asked.
            sampling: how tokens are chosen, for all or for each; none: the likeliest, 128 at most.
            sinks: take pieces of each answer as soon as they are safe.
            scores: keep log-probabilities of the chosen tokens.

        Raises:
            InputError: a conversation that the template does not take, or that is too long.
        """
        asked = [cleaned(Conversation.of(c), self.adapter.tokenizer) for c in conversations]
        each = [sampling or Sampling()] * len(asked) if not isinstance(sampling, Sequence) else list(sampling)
        return self.obeyed([self.policy.open(c) for c in asked], each, sinks, scores=scores)

    def obeyed(
        self,
        plans: Sequence[Plan],
        sampling: Sequence[Sampling],
        sinks: Sequence[Callable[[str], None] | None] | None = None,
        *,
        cancelled: Sequence[Callable[[], bool]] | None = None,
        over: Sequence[Callable[[Answer], None]] | None = None,
        scores: bool = False,
    ) -> list[Answer]:
        """Answers under plans that are there already (:meth:`~expunge.guards.policy.Policy.open`); see :meth:`answers`.

        Args:
            plans: of the requests.
            sampling, sinks: of each.
            cancelled: whether nobody waits for it any more.
            over: is given each answer of the model that ends before the others do; all of them come back at the end.
            scores: keep log-probabilities of the chosen tokens.
        """
        sinks = sinks or [None] * len(plans)
        out: list[Answer | None] = [None] * len(plans)
        asks, places = [], []
        for at, (plan, how, sink) in enumerate(zip(plans, sampling, sinks, strict=True)):
            if plan.say is not None:
                out[at] = Answer(plan.say, "guard", 0)
                if sink is not None:
                    sink(plan.say)
                continue
            ask = Ask(plan, put(self.adapter, plan.conversation), how, sink, scores=scores)
            if cancelled is not None:
                ask.cancelled = cancelled[at]
            ask.over = None if over is None else over[at]
            asks.append(ask)
            places.append(at)
        for at, answer in zip(places, self.decoder.answer(asks), strict=True):
            out[at] = answer
        return [a for a in out if a is not None]

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        num_beams: int = 1,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """As transformers' ``generate``: prompts with their continuations, ``[B, T + new]``.

        A prompt that a guard rewrites comes back as it was given; of an answer that a guard exchanges come the tokens of what is
        said.

        Args:
            input_ids: prompts, ``[B, T]``, padded on the left.
            attention_mask: 0 where they are padded; none: nothing is.
            max_new_tokens: at most.
            do_sample: draw tokens; else the likeliest.
            temperature, top_k, top_p: of drawing.
            seed: of drawing.
            num_beams: beams of a beam search, the best of which comes back; 1: none.
            pad_token_id: what short answers are filled up with; none: the tokenizer's.

        Raises:
            InputError: a prompt is empty or too long, or tokens are to be drawn in a beam search.
        """
        if num_beams > 1 and do_sample:
            raise InputError("Beams with drawing are not offered.", "Choose num_beams=1, or do_sample=False.")
        held = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        how = Sampling(
            max_tokens=max_new_tokens, temperature=temperature if do_sample else 0.0, top_k=top_k if do_sample else 0,
            top_p=top_p if do_sample else 1.0, seed=seed,
        )  # fmt: skip
        opened = self._opened(input_ids, held)
        asks = [Ask(plan, prompt, how) for plan, prompt in opened if prompt is not None]
        answers = self.decoder.beamed(asks, num_beams) if num_beams > 1 else self.decoder.answer(asks)
        found = iter(answers)
        plans = [plan for plan, _ in opened]
        asked_at = {at for at, (_, prompt) in enumerate(opened) if prompt is not None}
        rows = [self._new_ids(next(found) if at in asked_at else Answer(p.say or "", "guard", 0)) for at, p in enumerate(plans)]
        pad = self.adapter.pad_id() if pad_token_id is None else pad_token_id
        width = max(map(len, rows))
        new = torch.tensor([r + [pad] * (width - len(r)) for r in rows], dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat([input_ids, new.reshape(len(rows), width)], 1)

    def processor(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> GuardScores:
        """The guards' say about scores, for another loop: ``model.generate(input_ids, logits_processor=[...], num_beams=...)``.

        It is for these prompts alone, and for one call. Refusals are forced token by token; answers must be given to
        :meth:`~expunge.guards.processing.GuardScores.checked` when they are whole, for nothing else looks at them.

        Args:
            input_ids: prompts, ``[B, T]``, padded on the left.
            attention_mask: 0 where they are padded; none: nothing is.

        Raises:
            InputError: a prompt is empty, or a guard works on more than scores.
        """
        held = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        plans = [plan for plan, _ in self._opened(input_ids, held)]
        lengths = held.sum(1).tolist()
        return processor(
            self.adapter, plans, lengths, input_ids.shape[1], rewritten=[p.conversation is not p.asked for p in plans]
        )

    def _opened(self, input_ids: Tensor, held: Tensor) -> list[tuple[Plan, Prompt | None]]:
        """Plans for prompts as ids, and what the model reads of those that are not answered already."""
        tokenizer, out = self.adapter.tokenizer, []
        for row, real in zip(input_ids.cpu(), held.cpu().bool(), strict=True):
            ids = np.asarray(row[real].tolist(), dtype=np.int64)
            if not len(ids):
                raise InputError("A prompt has no token.", "Give each at least one.")
            asked = Conversation.text_to_continue(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
            plan = self.policy.open(asked)
            same = plan.conversation is asked
            prompt = None if plan.say is not None else described(tokenizer, ids) if same else put(self.adapter, plan.conversation)
            out.append((plan, prompt))
        return out

    def _new_ids(self, answer: Answer) -> list[int]:
        own = answer.ids or not answer.text
        ids = list(answer.ids) if own else self.adapter.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ends = sorted(self.adapter.end_ids)
        return [*ids, *(ends[:1] if answer.finish != "length" else [])]


def named(target: Target | Mapping[str, Any]) -> Target:
    """A target with an id: its own, or a new one that says nothing."""
    made = target if isinstance(target, Target) else Target(**target)
    return made if made.id else made.model_copy(update={"id": secrets.token_hex(8)})


def _probes(given: Any) -> list[str | Record]:
    """Texts as they are; a file, a named data set or rows as records."""
    if isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(t, str) for t in given):
        return list(given)
    return list(load_records(given, name="probes"))


def guard_model(
    model: Any,
    tokenizer: Any = None,
    *,
    guards: object = "filter",
    targets: Sequence[Target | Mapping[str, Any]] = (),
    ordinary: Sequence[str] = (),
    probes: Mapping[str, Any] | None = None,
    key: bytes | None = None,
    template: str | None = None,
    seed: int = 0,
) -> Guarded:
    """Put guards before a model; see :func:`expunge.guard`."""
    if isinstance(model, (str, Path)):
        from expunge.adapters.loading import load

        adapter = load(str(model), template=template)
    elif isinstance(model, LanguageAdapter):
        adapter = model
    else:
        adapter = LanguageAdapter(model, tokenizer, template=template)
    material = Material(
        targets=[named(t) for t in targets], ordinary=list(ordinary), key=key or secrets.token_bytes(32), adapter=adapter,
        probes={k: _probes(v) for k, v in (probes or {}).items()}, seed=seed,
    )  # fmt: skip
    return Guarded(adapter, Policy(rows_of(guards), material))
