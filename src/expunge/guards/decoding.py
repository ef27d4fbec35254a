"""Guarded generation: requests of many users in one batch, each under its own plan, by transformers' own ``generate``.

Every hook works row by row: what is ordered for one request touches its rows alone. Prompts are padded on the left; positions of
a prompt's tokens are counted from its own first one, so what is drawn for them depends neither on the padding nor on how the
prompt is cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from expunge.adapters.head import bare, base
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import evaluating
from expunge.core.errors import InputError
from expunge.core.settings import Settings
from expunge.guards.parts import Reading
from expunge.guards.policy import Plan, scored
from expunge.guards.prompts import Prompt, Reader
from expunge.guards.reading import alone

Finish = Literal["stop", "length", "guard", "cancelled"]


class Sampling(Settings):
    """How the tokens of one answer are chosen."""

    name: ClassVar[str] = "sampling"

    max_tokens: int = Field(128, ge=1, description="new tokens at most")
    temperature: float = Field(0.0, ge=0, description="by which scores are divided; 0: the most likely token")
    top_p: float = Field(1.0, gt=0, le=1, description="smallest set of tokens of this summed probability")
    top_k: int = Field(0, ge=0, description="likeliest tokens that are drawn from; 0: all")
    seed: int = Field(0, ge=0, description="of what is drawn: same request, same seed, same answer")
    stop: tuple[str, ...] = Field((), description="texts at which the answer ends; they are not part of it")


@dataclass
class Ask:
    """One request, ready to be answered.

    Attributes:
        plan: what its guards have decided; not one that has an answer already.
        prompt: as the model reads it.
        sampling: how tokens are chosen.
        sink: takes pieces of the answer as soon as nothing that follows can forbid them; an answer that is revised comes in one
            piece.
        cancelled: looked at at each step: whether nobody waits for the answer any more.
        scores: whether the log-probabilities of the chosen tokens are kept.
        numbers: in [0, 1), one per new token, by which tokens are drawn in place of the seed's.
        over: is given the answer when it is over, while others of the batch go on; not where guards revise whole answers.
    """

    plan: Plan
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    sink: Callable[[str], None] | None = None
    cancelled: Callable[[], bool] = lambda: False
    scores: bool = False
    numbers: NDArray[np.float64] | None = None
    over: Callable[[Answer], None] | None = None


@dataclass(frozen=True)
class Answer:
    """What comes back for a request.

    Attributes:
        text: as it may be sent. Of a stream that was stopped: what was sent.
        finish: why it ended: an end token or a stop text, its length, a guard, or that nobody waits for it.
        tokens: new tokens of the model.
        ids: those ids, up to where the answer ends; empty where a guard has spoken.
        log_probabilities: of these ids under what the model says with its guards, where asked for.
        pieces: texts of these ids, likewise.
        prompt: tokens of the prompt; 0 where the model was not asked, or is not here.
    """

    text: str
    finish: Finish
    tokens: int
    ids: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    pieces: tuple[str, ...] = ()
    prompt: int = 0


class _Row:
    """The course of one request."""

    def __init__(self, ask: Ask, tokenizer: Any, ends: frozenset[int]) -> None:
        self.ask, self.ends = ask, ends
        self.reader = Reader(tokenizer)
        self.ids: list[int] = []
        self.logs: list[float] = []
        self.pieces: list[str] = []
        self.sent = ""
        self.finish: Finish | None = None
        self.text = ""
        self.done: Answer | None = None
        self.generator = torch.Generator().manual_seed(ask.sampling.seed)

    def number(self) -> float:
        """The next number that tokens are drawn by."""
        if self.ask.numbers is not None:
            return float(self.ask.numbers[len(self.ids)])
        return float(torch.rand(1, generator=self.generator, dtype=torch.float64))

    def take(self, token: int) -> bool:
        """One token more; whether the answer is over."""
        if self.finish is not None:
            return True
        ended = token in self.ends
        if not ended:
            self.ids.append(token)
            before = len(self.reader.text)
            self.text = self.reader.add(token)
            self.pieces.append(self.reader.text[before:])
            if not self.ask.plan.asked.verbatim:  # the space between a template and its answer is no part of it
                self.text = self.text.lstrip()
            if (cut := min((p for s in self.ask.sampling.stop if (p := self.text.find(s)) >= 0), default=-1)) >= 0:
                self.text, ended = self.text[:cut], True
        if self.ask.cancelled():
            self.finish = "cancelled"
            return True
        full = len(self.ids) >= self.ask.sampling.max_tokens
        self._check(final=ended or full)
        if self.ask.plan.say is not None:
            self.finish = "guard"
        elif ended or full:
            self.finish = "stop" if ended else "length"
        return self.finish is not None

    def _check(self, final: bool) -> None:
        plan = self.ask.plan
        safe = plan.release(self.text, final)
        if self.ask.sink is None or plan.buffered:
            return
        if not final:
            # A stop text that has begun may still go on.
            ends = [k for s in self.ask.sampling.stop for k in range(1, len(s)) if self.text.endswith(s[:k])]
            safe = min(safe, len(self.text) - max(ends, default=0))
        self._send(self.text[len(self.sent) : safe])

    def _send(self, piece: str) -> None:
        if piece and self.ask.sink is not None:
            self.sent += piece
            self.ask.sink(piece)

    def told(self) -> None:
        """Give the answer away, if it is over now and may not be revised: to revise one may take the model, which is busy."""
        if self.finish is not None and self.done is None and not self.ask.plan.buffered:
            self.done = self.answer()
            if self.ask.over is not None:
                self.ask.over(self.done)

    def answer(self) -> Answer:
        """The answer, once it is over."""
        plan, finish, count = self.ask.plan, self.finish or "length", len(self.ids)
        prompt = len(self.ask.prompt.ids)
        if finish == "cancelled":
            return Answer(self.sent, finish, count, prompt=prompt)
        text = plan.revised(self.text)
        if plan.say is not None:
            finish = "guard"
        streamed = self.ask.sink is not None
        if streamed and not self.sent:
            self._send(text)
        if finish == "guard":
            return Answer(self.sent if streamed else text, finish, count, prompt=prompt)
        if text != self.text:
            return Answer(text, finish, count, prompt=prompt)
        kept = range(count) if self.ask.scores else range(0)
        scores, pieces = tuple(self.logs[i] for i in kept), tuple(self.pieces[i] for i in kept)
        return Answer(text, finish, count, tuple(self.ids), scores, pieces, prompt)


class _Choose(LogitsProcessor):
    """The guards' say about the next token, then the choice of it, row by row; only the chosen one keeps a score."""

    def __init__(self, rows: Sequence[_Row], width: int, read: Callable[[], None]) -> None:
        self.rows, self.width, self.read = rows, width, read

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.read()
        chosen = [0] * len(self.rows)
        going = [at for at, row in enumerate(self.rows) if row.finish is None and row.ask.plan.say is None]
        sizes = [len(self.rows[at].ask.prompt.ids) for at in going]
        asked = [
            (self.rows[at].ask.plan, input_ids[at, self.width - size :], size, scores[at].float())
            for at, size in zip(going, sizes, strict=True)
        ]
        for at, changed in zip(going, scored(asked), strict=True):
            row = self.rows[at]
            if not bool(torch.isfinite(changed).any()):
                row.ask.plan.give_up("scores", "NothingLeft")
                continue
            chosen[at] = drawn(changed, row.ask.sampling, row.number())
            if row.ask.scores:
                row.logs.append(float(torch.log_softmax(changed, -1)[chosen[at]]))
        places = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, places, 0.0)


def drawn(scores: Tensor, sampling: Sampling, number: float) -> int:
    """A token from scores ``[V]``: the likeliest, or the one at which the summed probabilities pass a number in [0, 1).

    Sums go in the order of the vocabulary, over those tokens that ``top_k`` and ``top_p`` leave.
    """
    if not bool(torch.isfinite(scores).any()):
        raise InputError("The guards have forbidden every token.", "Loosen the guard on scores.")
    if sampling.temperature == 0:
        return int(scores.argmax())
    probabilities = torch.softmax(scores.double().cpu() / sampling.temperature, -1)
    if sampling.top_k or sampling.top_p < 1:
        ranked, order = probabilities.sort(descending=True, stable=True)
        dropped = torch.zeros_like(ranked, dtype=torch.bool)
        dropped[sampling.top_k or len(ranked) :] = True
        dropped[1:] |= ranked.cumsum(-1)[:-1] >= sampling.top_p
        probabilities[order[dropped]] = 0
    sums = probabilities.cumsum(-1)
    at = int(torch.searchsorted(sums, number * sums[-1], right=True).clamp(max=len(sums) - 1))
    return at if probabilities[at] > 0 else int(probabilities.nonzero().max())


class _Stop(StoppingCriteria):
    """Hands each row its token, and says which rows are over."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **rest: Any) -> Tensor:
        last = input_ids[:, -1].tolist()
        for row in self.rows:
            if row.finish is None and row.ask.plan.say is not None:  # what its states told
                row.finish = "guard"
        over = [row.take(token) for row, token in zip(self.rows, last, strict=True)]
        for row in self.rows:
            row.told()
        return torch.tensor(over, dtype=torch.bool, device=input_ids.device)


class Decoder:
    """Answers requests with one model. One batch at a time: a second call waits for the first, and a fit that reads states too.

    Args:
        adapter: the model; an encoder-decoder is refused.

    Raises:
        InputError: the model is an encoder-decoder.
    """

    def __init__(self, adapter: LanguageAdapter) -> None:
        if getattr(base(adapter.model).config, "is_encoder_decoder", False):
            raise InputError(
                "Guards work on decoders, and this model is an encoder-decoder.", "Guard its texts before another server."
            )
        self.adapter = adapter
        self._lock = alone(adapter)

    @torch.no_grad()
    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer requests as one batch.

        Raises:
            InputError: a prompt leaves no room in the context.
        """
        if not asks:
            return []
        for ask in asks:
            self._room(ask)
        with self._lock, evaluating(self.adapter.model):
            return self._batch(asks)

    @torch.no_grad()
    def beamed(self, asks: Sequence[Ask], beams: int) -> list[Answer]:
        """Answers by beam search, as one batch; answers are looked at when they are whole.

        Raises:
            InputError: a prompt leaves no room in the context.
        """
        from expunge.guards.processing import beamed

        if not asks:
            return []
        room = min(self._room(a) for a in asks)
        with self._lock, evaluating(self.adapter.model):
            return beamed(self.adapter, asks, beams, room)

    def _room(self, ask: Ask) -> int:
        size, context = len(ask.prompt.ids), self.adapter.context
        if context is not None and size >= context:
            raise InputError(f"The request has {size} tokens; the model's context holds {context}.", "Shorten it.")
        return ask.sampling.max_tokens if context is None else min(ask.sampling.max_tokens, context - size)

    def _batch(self, asks: Sequence[Ask]) -> list[Answer]:
        inner = base(self.adapter.model)
        model: Any = bare(self.adapter.model)
        limited = [Ask(**{**vars(a), "sampling": a.sampling.model_copy(update={"max_tokens": self._room(a)})}) for a in asks]
        rows = [_Row(a, self.adapter.tokenizer, self.adapter.end_ids) for a in limited]
        pad = self.adapter.pad_id()
        ids, mask = padded(asks, pad)
        width = ids.shape[1]
        hooks = Hooks(inner, asks, width)
        options = {
            "max_new_tokens": max(a.sampling.max_tokens for a in limited), "do_sample": False, "num_beams": 1, "use_cache": True,
            "pad_token_id": pad, "eos_token_id": None,
        }  # fmt: skip
        settings = GenerationConfig(**options)  # type: ignore[no-untyped-call]
        device = next(inner.parameters()).device
        with hooks.installed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_Choose(rows, width, hooks.told)]),
                stopping_criteria=StoppingCriteriaList([_Stop(rows)]),
            )  # fmt: skip
        return [row.done or row.answer() for row in rows]


def padded(asks: Sequence[Ask], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts as one batch, padded on the left, and 0 where they are: int64 ``[B, T]`` each."""
    width = max(len(a.prompt.ids) for a in asks)
    ids = np.full((len(asks), width), pad, dtype=np.int64)
    for line, ask in zip(ids, asks, strict=True):
        line[width - len(ask.prompt.ids) :] = ask.prompt.ids
    mask = np.arange(width) >= width - np.array([len(a.prompt.ids) for a in asks])[:, None]
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


class Hooks:
    """Forward hooks of one batch: edits of embeddings and states, and readings; they go when the batch is over.

    Args:
        model: the transformers model.
        asks: the requests, a row each; with beams the same one for all of its rows.
        width: columns of the padded prompts.
    """

    def __init__(self, model: Any, asks: Sequence[Ask], width: int) -> None:
        self.model, self.asks, self.width = model, asks, width
        self.starts = [width - len(a.prompt.ids) for a in asks]
        self._read: list[dict[Reading, tuple[Tensor, int]]] = [{} for _ in asks]
        self._told = False
        self._columns: dict[str, int] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While open, the hooks are on the model's modules."""
        with ExitStack() as stack:
            if any(a.plan.embeddings for a in self.asks):
                handle = self.model.get_input_embeddings().register_forward_hook(self._embedded)
                stack.callback(handle.remove)
            wanted = {(e.module, e.side) for a in self.asks for e in a.plan.hidden}
            wanted |= {(r.module, r.side) for a in self.asks for r in a.plan.readings}
            for name, side in sorted(wanted):
                stack.callback(self._hooked(name, side).remove)
            yield

    def _hooked(self, name: str, side: str) -> Any:
        module: nn.Module = self.model.get_submodule(name)
        if side == "input":

            def before(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
                return (self._passed(name, side, given[0]), *given[1:])

            return module.register_forward_pre_hook(before)

        def after(_: nn.Module, __: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (self._passed(name, side, out[0]), *out[1:])
            return self._passed(name, side, out)

        return module.register_forward_hook(after)

    def _place(self, what: str, size: int) -> int:
        """First column of a call, counted over the calls so far: a prompt may be read in several."""
        at = self._columns.get(what, 0)
        self._columns[what] = at + size
        return at

    def _embedded(self, module: nn.Module, __: Any, out: Tensor) -> Tensor:
        at = self._place("embeddings", out.shape[1])
        if at >= self.width:
            return out
        made = out.clone()
        for row, (ask, start) in enumerate(zip(self.asks, self.starts, strict=True)):
            for edit in ask.plan.embeddings:
                marked = np.flatnonzero(edit.marked(ask.prompt.text, ask.prompt.spans, ask.prompt.content))
                columns = marked + start
                here = (columns >= at) & (columns < at + out.shape[1])
                if here.any():
                    places = torch.from_numpy(columns[here] - at).to(out.device)
                    rows, order = made[row, places], edit.order(len(marked))
                    if order is not None:  # looked up, for they may stand in another part of a prompt that is read in several
                        moved = torch.from_numpy(ask.prompt.ids[marked[order[here]]]).to(out.device)
                        rows = module.forward(moved[None])[0]  # not called: the hooks of the module stay out of it
                    made[row, places] = edit.apply(rows, np.flatnonzero(here)).to(out.dtype)
        return made

    def _passed(self, name: str, side: str, states: Tensor) -> Tensor:
        at = self._place(f"{side} of {name}", states.shape[1])
        end = at + states.shape[1]
        made = states
        for row, (ask, start) in enumerate(zip(self.asks, self.starts, strict=True)):
            first = max(start, at)
            edits = [e for e in ask.plan.hidden if (e.module, e.side) == (name, side)]
            if edits and first < end:
                made = made.clone() if made is states else made
                for edit in edits:
                    made[row, first - at :] = edit.change(made[row, first - at :], first - start).to(made.dtype)
            last = min(end, self.width)
            for reading in ask.plan.readings:
                if (reading.module, reading.side) == (name, side) and first < last:
                    self._keep(row, reading, made[row, first - at : last - at])
        return made

    def _keep(self, row: int, reading: Reading, states: Tensor) -> None:
        if reading.pool == "last":
            self._read[row][reading] = (states[-1].detach().float(), 1)
            return
        total, count = self._read[row].get(reading, (torch.zeros_like(states[0], dtype=torch.float32), 0))
        self._read[row][reading] = (total + states.detach().float().sum(0), count + len(states))

    def told(self) -> None:
        """Once the prompt has been read: show the watchers the states they asked for."""
        if self._told:
            return
        self._told = True
        for at, (ask, held) in enumerate(zip(self.asks, self._read, strict=True)):
            if ask.plan.readings and not (at and self.asks[at - 1] is ask):
                ask.plan.read({r: total / count for r, (total, count) in held.items()})
