"""A guarded model as an audit asks it: through its guards, with answers in words and log-probabilities, and no weights.

An audit reads log-probabilities of answers. What a served model says with its guards is taken for them:

- Where a guard answers in place of the model, nothing of the answer can be learnt: every token of it is scored as a guess among
  the whole vocabulary (loss ``log V``). So a guard that refuses stands out against a retrained model, which answers as well as it
  can; that is how it is, and an audit says so.
- Where an answer would be stopped, the tokens that are never sent are scored like that; so is a token that cannot be chosen.
- What no longer fits the model's context with what a guard puts before it has no answer, and counts as refused.
- Where guards change embeddings of the prompt, states or scores, the answer is scored under what they make of them. Embeddings of
  the *answer* are left alone (published evaluations of ECO corrupt those too, which overstates what it hides).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from expunge.adapters.answers import Generation, Listener, Taken
from expunge.adapters.base import Adapter, Batch, Example, Outputs
from expunge.adapters.generation import Draws
from expunge.adapters.head import base
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import evaluating
from expunge.core.access import OF_WEIGHTS, Offer
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.guards.conversation import Conversation
from expunge.guards.decoding import Ask, Hooks, Sampling
from expunge.guards.guarded import Guarded
from expunge.guards.parts import Hook
from expunge.guards.policy import Noticed, Plan, scored
from expunge.guards.prompts import Prompt, Reader, cleaned, described, put
from expunge.guards.reading import read_states

WITHOUT_GUARDS = "the model without its guards"
_REMEMBERED = 4096  #: prompts of which is remembered what detectors noticed


class GuardedAdapter(LanguageAdapter):
    """A language model behind guards. It cannot be trained, and gives no features: who only asks has neither.

    Args:
        guarded: the model and its guards.
    """

    offers: ClassVar[frozenset[Offer]] = LanguageAdapter.offers - OF_WEIGHTS
    fronted: ClassVar[bool] = True

    def __init__(self, guarded: Guarded) -> None:
        vars(self).update(vars(guarded.adapter))
        self.guarded = guarded
        self._asked: dict[bytes, Conversation] = {}
        self._seen: dict[bytes, _Seen] = {}
        self._version = guarded.policy.version

    # ---- what is asked

    def encode(self, record: Record, *, answer: str | None = None, suffix: str = "", prompt: str | None = None) -> Example:
        """See :meth:`LanguageAdapter.encode`; the guards see the words of the prompt and not those of the template."""
        made = super().encode(record, answer=answer, suffix=suffix, prompt=prompt)
        self._asked[_key(made.data.ids[: made.data.start])] = _conversation(record, prompt)
        return made

    def plan(self, ids: NDArray[Any], *, known: bool = True) -> tuple[Plan, Prompt]:
        """What the guards decide about a prompt, and the prompt as the model is given it.

        An audit asks the same prompt again and again; detectors look at it once, and at its states.

        Args:
            ids: of the prompt.
            known: whether what was noticed before holds: it does for this adapter's own model.
        """
        held = np.asarray(ids, dtype=np.int64)
        asked = self._asked.get(_key(held))
        if asked is None:  # an attack has made a prompt of tokens: the guards see its text
            asked = Conversation.text_to_continue(self.tokenizer.decode(held.tolist(), skip_special_tokens=True))
        if self._version != self.guarded.policy.version or len(self._seen) >= _REMEMBERED:
            self._version, self._seen = self.guarded.policy.version, {}
        seen = self._seen.get(_key(held))
        if seen is None or seen.asked != asked:
            seen = self._seen[_key(held)] = _Seen(asked, cleaned(asked, self.tokenizer))
        plan = self.guarded.policy.open(seen.cleaned, seen.noticed if known else {})
        if plan.say is None and not plan.readings:
            plan.read({})  # what was noticed of the states before
        if plan.say is not None or plan.conversation is seen.cleaned:
            seen.own = seen.own or described(self.tokenizer, held, [m.content for m in seen.cleaned.messages])
            return plan, seen.own
        if seen.other is None or seen.other[0] != plan.conversation:
            try:
                seen.other = (plan.conversation, put(self, plan.conversation))
            except InputError:  # with what a guard adds it does not fit the context: a server has no answer to it
                plan.give_up("prompt", "NoRoom")
                seen.own = seen.own or described(self.tokenizer, held, [m.content for m in seen.cleaned.messages])
                return plan, seen.own
        return plan, seen.other[1]

    # ---- log-probabilities

    def forward(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """See :meth:`LanguageAdapter.forward`; without gradients and features.

        Raises:
            InputError: features are asked for.
        """
        if extra := sorted(want - {"losses", "logits"}):
            raise InputError(f"A guarded model gives no {extra[0]}.", "Audit the model without its guards to look inside.")
        logits = torch.cat([block for _, block in self.logit_blocks(model, batch)])
        values = {"logits": logits, "losses": functional.cross_entropy(logits, batch.targets, reduction="none")}
        return Outputs.of(batch, {name: values[name] for name in want})

    def logit_blocks(self, model: nn.Module, batch: Batch, rows: int = 512) -> Iterator[tuple[int, Tensor]]:
        """See :meth:`LanguageAdapter.logit_blocks`; rows of answers that guards touch are exchanged for what is then said."""
        changed = self._changed(model, batch)
        starts = np.cumsum([0, *batch.counts]).tolist()
        for first, block in super().logit_blocks(model, batch, rows):
            made = block
            for number, change in changed.items():
                low, high = max(starts[number], first), min(starts[number + 1], first + len(block))
                if low < high:
                    made = made.clone() if made is block else made
                    own = change.said(block[low - first : high - first], low - starts[number])
                    made[low - first : high - first] = own.to(made)
            yield first, made

    @torch.no_grad()
    def _changed(self, model: nn.Module, batch: Batch) -> dict[int, _Change]:
        """What becomes of answers of a batch that guards touch, by number of the example."""
        texts = any(Hook.TEXT in r.detector.sees for r in self.guarded.policy.rows)
        whole = [batch.tensors["input_ids"][at, :size].cpu().numpy() for at, size in enumerate(batch.token_counts)]
        own = model is self.model
        opened = [self.plan(ids[: len(ids) - n], known=own) for ids, n in zip(whole, batch.counts, strict=True)]
        if own:
            self._read(opened)
        found = {}
        for number, (ids, count, (plan, prompt)) in enumerate(zip(whole, batch.counts, opened, strict=True)):
            start, answer = len(ids) - count, ids[len(ids) - count :]
            logits: Tensor | None = None
            same = np.array_equal(prompt.ids, ids[:start])
            if plan.say is None and (not same or plan.embeddings or plan.hidden or plan.readings):
                logits = self._under(model, plan, prompt, answer)
            refused = plan.say is not None
            sent = 0 if refused else self._unsent(plan, answer) if texts else count
            if logits is not None or sent < count or plan.scores:
                found[number] = _Change(plan, prompt, answer, sent, logits)
        return found

    @torch.no_grad()
    def _read(self, opened: Sequence[tuple[Plan, Prompt]]) -> None:
        """Show watchers the states that they want to see, of all prompts whose states no guard changes, as one batch."""
        plain = [(p, q) for p, q in opened if p.say is None and p.readings and not (p.embeddings or p.hidden)]
        wanted = sorted({r for p, _ in plain for r in p.readings}, key=str)
        for (plan, _), states in zip(plain, read_states(self.guarded.adapter, [q for _, q in plain], wanted), strict=True):
            plan.read(states)

    def _under(self, model: nn.Module, plan: Plan, prompt: Prompt, answer: NDArray[Any]) -> Tensor:
        """Logits ``[n, V]`` of an answer under a plan's edits of embeddings and states."""
        inner: Any = base(model)
        ids = torch.from_numpy(np.concatenate([prompt.ids, answer]).astype(np.int64))
        start = len(prompt.ids)
        hooks = Hooks(inner, [Ask(plan, prompt)], start)
        device = next(inner.parameters()).device
        with evaluating(model), hooks.installed():
            out = model(input_ids=ids[None, :-1].to(device))
        hooks.told()
        logits: Tensor = out["logits"][0, start - 1 :].float().cpu()
        return logits

    def _unsent(self, plan: Plan, answer: NDArray[Any]) -> int:
        """From which token on an answer would not be sent; its length if all of it is."""
        reader, ends = Reader(self.tokenizer), []
        passed = 0
        for token in answer.tolist():
            text = reader.add(token) if token not in self.end_ids else reader.text
            ends.append(len(text))
            passed = max(passed, plan.release(text, False))
            if plan.say is not None:
                break
        if plan.say is None:
            plan.release(reader.text, True)
        return len(answer) if plan.say is None else sum(end <= passed for end in ends)

    # ---- answers in words

    def generate(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int) -> list[Generation]:
        """See :meth:`LanguageAdapter.generate`; what a guard says in place of the model is the answer."""
        return self._answers(examples, [Sampling(max_tokens=max_new_tokens)] * len(examples), None)

    def streamed(self, model: nn.Module, examples: Sequence[Example], listeners: Sequence[Listener]) -> list[Taken]:
        """What a client gets that reads the stream: pieces that were sent before a guard decides are among it."""
        out: dict[int, Taken] = {}
        asks, places, got = [], [], []
        for at, (example, how) in enumerate(zip(examples, listeners, strict=True)):
            plan, prompt = self.plan(example.data.ids[: example.data.start])
            if plan.say is not None:
                out[at] = Taken(plan.say, "guard")
                continue
            held: list[str] = []
            ask = Ask(plan, prompt, Sampling(max_tokens=how.max_new_tokens, stop=how.stops), held.append)
            if how.leaves:
                ask.cancelled = partial(_has, held, how.leaves)
            asks.append(ask)
            places.append(at)
            got.append(held)
        for at, held, answer in zip(places, got, self.guarded.decoder.answer(asks), strict=True):
            out[at] = Taken("".join(held), "left" if answer.finish == "cancelled" else answer.finish)
        return [out[at] for at in range(len(examples))]

    def drawn(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int, draws: Draws) -> list[Generation]:
        """See :meth:`LanguageAdapter.drawn`."""
        how = Sampling(max_tokens=max_new_tokens, temperature=draws.temperature)
        return self._answers(examples, [how] * len(examples), draws.uniforms)

    def sample(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int, temperature: float) -> list[Generation]:
        """See :meth:`LanguageAdapter.sample`; seeds come from torch's random state."""
        seeds = torch.randint(2**31, (len(examples),)).tolist()
        return self._answers(
            examples, [Sampling(max_tokens=max_new_tokens, temperature=temperature, seed=s) for s in seeds], None
        )

    def _answers(
        self, examples: Sequence[Example], sampling: Sequence[Sampling], numbers: NDArray[np.float64] | None
    ) -> list[Generation]:
        texts: dict[int, tuple[tuple[int, ...], str, bool, bool]] = {}
        asks, places = [], []
        for at, (example, how) in enumerate(zip(examples, sampling, strict=True)):
            plan, prompt = self.plan(example.data.ids[: example.data.start])
            if plan.say is not None:
                texts[at] = (tuple(self._spelt(plan.say)), plan.say, True, True)
                continue
            asks.append(Ask(plan, prompt, how, numbers=None if numbers is None else numbers[at]))
            places.append(at)
        for at, answer in zip(places, self.guarded.decoder.answer(asks), strict=True):
            ids = answer.ids or tuple(self._spelt(answer.text))
            texts[at] = (ids, answer.text.strip(), answer.finish != "length", answer.finish == "guard")
        return [Generation(e.id, *texts[at]) for at, e in enumerate(examples)]

    def _spelt(self, text: str) -> list[int]:
        return self._encoder.spell(text)

    # ---- identity

    def fingerprint(self) -> str:
        """SHA-256 over the model's and what its guards were made of."""
        policy = self.guarded.policy
        said = [r.described() for r in policy.rows], [t.model_dump(mode="json") for t in policy.targets.values()]
        made = hashlib.sha256(json.dumps([*said, *policy.material.read()], sort_keys=True).encode())
        made.update(hashlib.sha256(policy.material.key).digest())
        made.update(self.guarded.adapter.fingerprint().encode())
        return made.hexdigest()

    def parts(self) -> dict[str, Adapter]:
        """The model itself: its weights are as they were."""
        return {WITHOUT_GUARDS: self.guarded.adapter}

    def copy(self) -> LanguageAdapter:
        """A copy of the model behind the same guards."""
        return GuardedAdapter(Guarded(self.guarded.adapter.copy(), self.guarded.policy))

    def sharing(self) -> LanguageAdapter:
        """Another one of the same model and guards."""
        return GuardedAdapter(Guarded(self.guarded.adapter.sharing(), self.guarded.policy))

    def save(
        self, folder: Path, model: nn.Module | None = None, *, merge: bool = False, state: dict[str, Tensor] | None = None
    ) -> NoReturn:
        """A guard is no part of a model's folder.

        Raises:
            InputError: always.
        """
        raise InputError(
            "A guarded model is not saved as a model: its weights are as they were.", "Keep the guard file beside it."
        )


@dataclass
class _Seen:
    """What is known of a prompt.

    Attributes:
        asked, cleaned: as it came, and without special tokens.
        noticed: by detectors.
        own: as the model reads it.
        other: what the model is asked instead, and how it reads that.
    """

    asked: Conversation
    cleaned: Conversation
    noticed: Noticed = field(default_factory=dict)
    own: Prompt | None = None
    other: tuple[Conversation, Prompt] | None = None


@dataclass(frozen=True)
class _Change:
    """What becomes of the logits of an answer.

    Attributes:
        plan, prompt: of the request.
        answer: tokens of it.
        sent: how many of these are sent.
        logits: ``[n, V]``, where embeddings or states are changed; none: those of the model.
    """

    plan: Plan
    prompt: Prompt
    answer: NDArray[Any]
    sent: int
    logits: Tensor | None

    def said(self, logits: Tensor, first: int) -> Tensor:
        """Logits ``[m, V]`` with the guards, from the model's own, from a token of the answer on; zero: a guess."""
        count = min(len(logits), max(0, self.sent - first))
        made = torch.zeros_like(logits, dtype=torch.float32)
        if not count:
            return made
        given = logits if self.logits is None else self.logits[first : first + count].to(logits.device)
        made[:count] = given[:count].float()
        if self.plan.scores:
            start = len(self.prompt.ids)
            ids = torch.from_numpy(np.concatenate([self.prompt.ids, self.answer]).astype(np.int64)).to(logits.device)
            rows = [(self.plan, ids[: start + first + at], start, made[at]) for at in range(count)]
            failed = len(self.plan.failed)
            made[:count] = torch.stack(scored(rows))
            if self.plan.say is not None and len(self.plan.failed) > failed:
                return torch.zeros_like(made)
            barred = made[torch.arange(count), ids[start + first : start + first + count]].isneginf()
            made[:count][barred] = 0  # what cannot be said
        return made


def _has(held: Sequence[str], characters: int) -> bool:
    return sum(map(len, held)) >= characters


def _key(ids: NDArray[Any]) -> bytes:
    return np.asarray(ids, dtype=np.int64).tobytes()


def _conversation(record: Record, prompt: str | None) -> Conversation:
    if record.is_text and prompt is None:
        return Conversation.text_to_continue("")
    if record.verbatim:
        return Conversation.text_to_continue(record.prompt if prompt is None else prompt)
    made = Conversation.of(list(record.messages) or record.prompt)
    return made if prompt is None else made.asking(prompt)
