"""A guarded model as an audit asks it: through its guards, with answers in words and log-probabilities, and no weights.

An audit reads log-probabilities of answers. What a served model says with its guards is taken for them:

- Where a guard answers in place of the model, nothing of the answer can be learnt: every token of it is scored as a guess among
  the whole vocabulary (loss ``log V``). So a guard that refuses stands out against a retrained model, which answers as well as it
  can; that is how it is, and an audit says so.
- Where an answer would be stopped, the tokens that are never sent are scored like that; so is a token that cannot be chosen.
- Where guards change embeddings of the prompt, states or scores, the answer is scored under what they make of them. Embeddings of
  the *answer* are left alone (published evaluations of ECO corrupt those too, which overstates what it hides).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from expunge.adapters.base import Adapter, Batch, Example, Generation, Outputs
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
from expunge.guards.parts import TEXT_LEVEL, Hook
from expunge.guards.policy import Plan
from expunge.guards.prompts import Prompt, Reader, cleaned, described, put

WITHOUT_GUARDS = "the model without its guards"


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

    # ---- what is asked

    def encode(self, record: Record, *, answer: str | None = None, suffix: str = "", prompt: str | None = None) -> Example:
        """See :meth:`LanguageAdapter.encode`; the guards see the words of the prompt and not those of the template."""
        made = super().encode(record, answer=answer, suffix=suffix, prompt=prompt)
        self._asked[_key(made.data.ids[: made.data.start])] = _conversation(record, prompt)
        return made

    def plan(self, ids: NDArray[Any]) -> tuple[Plan, Prompt]:
        """What the guards decide about a prompt, and the prompt as the model is given it.

        Args:
            ids: of the prompt.
        """
        held = np.asarray(ids, dtype=np.int64)
        asked = self._asked.get(_key(held))
        if asked is None:  # an attack has made a prompt of tokens: the guards see its text
            asked = Conversation.text_to_continue(self.tokenizer.decode(held.tolist(), skip_special_tokens=True))
        asked = cleaned(asked, self.tokenizer)
        plan = self.guarded.policy.open(asked)
        if plan.say is not None or plan.conversation is asked:
            return plan, described(self.tokenizer, held, [m.content for m in asked.messages])
        return plan, put(self, plan.conversation)

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
        starts = np.cumsum([0, *batch.counts])
        for first, block in super().logit_blocks(model, batch, rows):
            made = block
            for number, logits in changed.items():
                low, high = max(int(starts[number]), first), min(int(starts[number + 1]), first + len(block))
                if low < high:
                    made = made.clone() if made is block else made
                    made[low - first : high - first] = logits[low - int(starts[number]) : high - int(starts[number])].to(made)
            yield first, made

    @torch.no_grad()
    def _changed(self, model: nn.Module, batch: Batch) -> dict[int, Tensor]:
        """Logits ``[n, V]`` of the answers of a batch that guards touch, by number of the example."""
        found, inner = {}, base(model)
        vocabulary = int(inner.config.vocab_size)  # type: ignore[union-attr, arg-type]
        texts = any(Hook.TEXT in r.detector.sees for r in self.guarded.policy.rows)
        inside = not self.guarded.policy.hooks <= TEXT_LEVEL
        for number, (size, count) in enumerate(zip(batch.token_counts, batch.counts, strict=True)):
            ids = batch.tensors["input_ids"][number, :size].cpu().numpy()
            plan, prompt = self.plan(ids[: size - count])
            answer = ids[size - count :]
            logits: Tensor | None = None
            same = np.array_equal(prompt.ids, ids[: size - count])
            if plan.say is None and (not same or (inside and _touches(plan))):
                logits = self._under(model, plan, prompt, answer)
            if plan.say is not None:
                found[number] = torch.zeros(count, vocabulary)
                continue
            unsent = self._unsent(plan, answer) if texts else count
            if unsent < count:
                if logits is None:
                    logits = self._under(model, plan, prompt, answer)
                logits[unsent:] = 0
            if logits is not None:
                found[number] = logits
        return found

    def _under(self, model: nn.Module, plan: Plan, prompt: Prompt, answer: NDArray[Any]) -> Tensor:
        """Logits ``[n, V]`` of an answer under a plan's edits."""
        inner: Any = base(model)
        ids = torch.from_numpy(np.concatenate([prompt.ids, answer]).astype(np.int64))
        start = len(prompt.ids)
        hooks = Hooks(inner, [Ask(plan, prompt)], start)
        device = next(inner.parameters()).device
        with evaluating(model), hooks.installed():
            out = model(input_ids=ids[None, :-1].to(device))
        hooks.told()
        logits: Tensor = out["logits"][0, start - 1 :].float().cpu().clone()
        if plan.scores and plan.say is None:
            for at in range(len(answer)):
                logits[at] = plan.scored(ids[: start + at], start, logits[at])
                if torch.isneginf(logits[at, int(answer[at])]):
                    logits[at] = 0  # what cannot be said: a guess
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


def _touches(plan: Plan) -> bool:
    return bool(plan.embeddings or plan.hidden or plan.scores or plan.readings)


def _key(ids: NDArray[Any]) -> bytes:
    return np.asarray(ids, dtype=np.int64).tobytes()


def _conversation(record: Record, prompt: str | None) -> Conversation:
    if record.is_text and prompt is None:
        return Conversation.text_to_continue("")
    if record.verbatim:
        return Conversation.text_to_continue(record.prompt if prompt is None else prompt)
    made = Conversation.of(list(record.messages) or record.prompt)
    return made if prompt is None else made.asking(prompt)
