"""Causal language models: every decoder that transformers loads, with full weights or with a peft adapter."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from expunge.adapters import apart, generation, identity, storage
from expunge.adapters.answers import Generation
from expunge.adapters.attending import KINDS
from expunge.adapters.base import Adapter, Batch, Example, Outputs
from expunge.adapters.head import bare, base
from expunge.adapters.passes import Runner, evaluating
from expunge.adapters.registry import adapter
from expunge.adapters.tokenise import Encoder, Tokens
from expunge.adapters.translate import Dictionary, Translation
from expunge.core.access import Offer
from expunge.core.errors import InputError, unknown
from expunge.data.records import Record

_BEFORE = 4  #: tokens that are decoded with one to see which text it adds


@adapter
class LanguageAdapter(Adapter):
    """A causal language model and its tokenizer.

    Dropout of the given model is switched off in place (its configuration is left alone): unlearning compares
    probabilities of the same tokens before and after, and noise in them is noise in the loss. LoRA dropout, which a recipe
    asks for by name, stays.

    Args:
        model: a transformers model with a language-modelling head, or a peft model around one.
        tokenizer: its tokenizer; padding is not needed, an end token is (for records with a prompt).
        template: text with ``{prompt}`` and ``{answer}``; none: the tokenizer's chat template, or a question-answer template.
        max_length: longest sequence in tokens; none: the model's context.
        truncate: cut longer records instead of refusing them.
        dropout: leave the model's dropout as it is.
        fused: allow losses to be computed without a graph over the scores; to be switched off where the head's weight is sharded,
            or where second derivatives are needed.
        packed: allow ragged batches to run without their padding; to be switched off for second derivatives.

    Attributes:
        end_ids: tokens that end a generation.
        context: longest sequence in tokens, or none.

    Raises:
        InputError: no causal language model, a bad template, or a tokenizer with more tokens than the model.
    """

    modality: ClassVar[str] = "language"
    offers: ClassVar[frozenset[Offer]] = frozenset(
        {
            Offer.LOSSES, Offer.LOGITS, Offer.FEATURES, Offer.VALUES, Offer.RECEIVED, Offer.GENERATE, Offer.TEXT, Offer.SEQUENCE,
            Offer.ASSISTANT, Offer.EACH,
        }
    )  # fmt: skip

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: str | None = None,
        max_length: int | None = None,
        truncate: bool = False,
        dropout: bool = False,
        fused: bool = True,
        packed: bool = True,
    ) -> None:
        self._check(model, tokenizer)
        self.model: Any = model
        self.tokenizer = tokenizer
        self.template = template
        self.fused = fused
        limit = self._limit(model)
        if max_length is not None and (max_length < 2 or (limit is not None and max_length > limit)):
            raise InputError(
                f"max_length must be an int in [2, {limit or 'inf'}] (the model's context); got {max_length}.",
                "Leave it out to use the whole context.",
            )
        self.context = max_length or limit
        self._encoder = self._coder(tokenizer, template, self.context, truncate)
        self.end_ids = frozenset(self._encoder.end_ids() + storage.generation_ends(base(model)))
        self._runner = self._passes(fused=fused, packed=packed)
        if not dropout:
            storage.silence_dropout(model)

    # What a relative of this class does in another way.

    def _check(self, model: Any, tokenizer: Any) -> None:
        storage.check_model(model, tokenizer)

    def _limit(self, model: Any) -> int | None:
        return storage.context_of(base(model))

    def _coder(self, tokenizer: Any, template: str | None, limit: int | None, truncate: bool) -> Encoder:
        return Encoder(tokenizer, template, limit, truncate)

    def _passes(self, *, fused: bool, packed: bool) -> Runner:
        return Runner(fused=fused, packed=packed)

    @property
    def templated(self) -> bool:
        """Whether conversations of several turns go through the tokenizer's chat template."""
        return self._encoder.chat

    @property
    def boundary_repairs(self) -> int:
        """How many encoded records had a token across the boundary of prompt and answer, and got their answer's own ids."""
        return self._encoder.repairs

    # ---- data ------------------------------------------------------------------------------------------------------

    def encode(self, record: Record, *, answer: str | None = None, suffix: str = "", prompt: str | None = None) -> Example:
        """Turn a record into token ids; see :class:`~expunge.adapters.tokenise.Encoder`.

        Raises:
            InputError: too long for the context, nothing to supervise, no end token, or a chat that cannot be rendered.
        """
        tokens = self._encoder.encode(record, answer, prompt)
        return _example(record.id + suffix, record.cluster, tokens)

    def replace(self, example: Example, *, inputs: Any = None, answer: Any = None, suffix: str = "") -> Example:
        """The same prompt with another answer, where no record is at hand.

        Args:
            example: as :meth:`encode` made it.
            inputs: not offered; texts have other prompts by :meth:`encode`.
            answer: a text, or another example, whose answer is taken token by token.
            suffix: marks the new id.

        Raises:
            InputError: there is no answer, or none that is of one of these kinds.
        """
        held: Tokens = example.data
        if inputs is not None or not isinstance(answer, (str, Example)):
            raise InputError(f"A text's answer is replaced by a text or an example; got {type(answer).__name__}.")
        if isinstance(answer, str):
            made = self._encoder.answered(held, answer)
        else:
            other: Tokens = answer.data
            made = self._encoder.spliced(held, other.ids[other.start :].tolist(), other.ends)
        return Example(example.id + suffix, example.cluster, len(made.ids) - made.start, len(made.ids), made)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Right-padded batch.

        Beside the model's inputs its tensors hold the columns of the predicting tokens (``predict`` ``[N]``) and of the real ones
        (``real`` ``[M]``), which real tokens are not the last of their example (``inner`` ``[M - B]``), and where among
        those each predicting token stands (``row`` ``[N]``).
        """
        if not examples:
            raise InputError("A batch needs at least one example.")
        data: list[Tokens] = [e.data for e in examples]
        sizes = np.array([len(d.ids) for d in data])
        starts = np.array([d.start for d in data])
        counts = sizes - starts
        ids = np.full((len(data), int(sizes.max())), self.pad_id(), dtype=np.int64)
        columns = np.arange(ids.shape[1])
        real = columns < sizes[:, None]
        ids[real] = np.concatenate([d.ids for d in data])
        supervised = real & (columns >= starts[:, None])
        owner, column = np.nonzero(supervised)
        token_owner, token_column = np.nonzero(real)
        tensors = {
            "input_ids": ids,
            "attention_mask": real.astype(np.int64),
            "position_ids": np.broadcast_to(columns, ids.shape).copy(),
            "predict": column - 1,
            "real": token_column,
            "inner": np.nonzero(token_column < sizes[token_owner] - 1)[0],
            "row": np.repeat(np.cumsum(sizes - 1) - (sizes - 1), counts) + column - 1,
        }
        return Batch(
            ids=tuple(e.id for e in examples),
            tensors={k: torch.from_numpy(v) for k, v in tensors.items()},
            targets=torch.from_numpy(ids[supervised]),
            owner=torch.from_numpy(owner),
            position=torch.from_numpy(column - starts[owner]),
            counts=tuple(counts.tolist()),
            token_owner=torch.from_numpy(token_owner),
            token_supervised=torch.from_numpy(supervised[real]),
            token_counts=tuple(sizes.tolist()),
            marked=torch.from_numpy(np.concatenate([_flags(d, d.marked) for d in data])),
            favoured=torch.from_numpy(np.concatenate([_flags(d, d.favoured) for d in data])),
        )

    def translate(self, examples: Sequence[Example], terms: Mapping[str, str]) -> list[tuple[Example, Translation]]:
        """Examples with terms of their text replaced; see :meth:`expunge.adapters.base.Adapter.translate`."""

        def read(ids: Sequence[int]) -> str:
            text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return text

        dictionary = Dictionary(terms, self._encoder.spell, read)
        out = []
        for example in examples:
            found = dictionary.translate(example.data, self.context)
            size = len(found.tokens.ids)
            if size <= found.tokens.start:
                raise InputError(
                    f"The example {example.id!r} is longer than the model's context once its terms are replaced.",
                    "Use shorter counterparts, or shorter texts.",
                )
            made = Example(example.id + "#translated", example.cluster, size - found.tokens.start, size, found.tokens)
            out.append((made, found))
        return out

    def pad_id(self) -> int:
        """A token to pad with: the tokenizer's, or any."""
        # Masks rule, so any id will do where the tokenizer has none for padding.
        return int(next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None))

    # ---- the model -------------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """One forward pass; scores only at the positions that predict a target.

        Without gradients the model runs in evaluation mode, whatever mode it is in.

        Args:
            model: this adapter's model, a copy of it, or either one wrapped.
            batch: on the model's device.
            want: ``losses`` (float32 ``[N]``), ``logits`` (float32 ``[N, V]``), ``features:<layer>`` (``[M, D]``, the residual
                stream after that block, in the model's own type), ``values:<layer>`` (``[M, D]``, the value vectors of its
                attention) or ``received:<layer>`` (``[M, 1]``, how much of it each token gets; see
                :func:`~expunge.adapters.attending.attending`).

        Raises:
            InputError: a layer that the model does not have, or attention that cannot be read.
        """
        inside, kinds = sorted(want - {"losses", "logits"}), {"features", *KINDS} & self.offers
        for name in inside:
            kind, _, layer = name.partition(":")
            if kind not in kinds:
                raise unknown("output", name, ["losses", "logits", *sorted(f"{k}:<layer>" for k in kinds)])
            if layer not in self.layers():
                raise unknown("layer", layer, self.layers())
        scores = "logits" if "logits" in want else "losses" if "losses" in want else None
        values = self._runner.run(model, batch, scores, inside)
        if scores == "logits" and "losses" in want:
            values["losses"] = functional.cross_entropy(values["logits"], batch.targets, reduction="none")
        return Outputs.of(batch, {name: values[name] for name in want})

    def logit_blocks(self, model: nn.Module, batch: Batch, rows: int = 512) -> Iterator[tuple[int, Tensor]]:
        """One forward pass without gradients; logits in blocks of at most ``rows`` targets.

        A head that the model post-processes (soft-capped scores, say) is computed for all targets at once and then cut.
        """
        with torch.no_grad():
            yield from self._runner.logit_blocks(model, batch, rows)

    def generate(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int) -> list[Generation]:
        """Greedy continuations of the examples' prompts, as one left-padded batch; for plain text, of the first token.

        An example whose context is too short for ``max_new_tokens`` is continued alone, as far as its context goes.
        """
        return self._continued(model, examples, max_new_tokens)

    def drawn(
        self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int, draws: generation.Draws
    ) -> list[Generation]:
        """Continuations whose tokens are drawn by given numbers; see :meth:`expunge.adapters.base.Adapter.drawn`."""
        return self._continued(model, examples, max_new_tokens, draws=draws)

    def sample(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int, temperature: float) -> list[Generation]:
        """Continuations as they are drawn at a temperature; see :meth:`generate` for what is continued."""
        return self._continued(model, examples, max_new_tokens, temperature=temperature)

    def _continued(self, model: nn.Module, examples: Sequence[Example], limit: int, **drawing: Any) -> list[Generation]:
        prompts = [e.data.ids[: e.data.start] for e in examples]
        options: dict[str, Any] = {"limit": limit, "context": self.context, "ends": self.end_ids, "pad": self.pad_id()}
        with torch.no_grad(), evaluating(model):
            tokens = generation.continued(base(model), bare(model), prompts, **drawing, **options)
        return self._generations(examples, tokens)

    def _generations(self, examples: Sequence[Example], tokens: Sequence[tuple[list[int], bool]]) -> list[Generation]:
        return [Generation(e.id, tuple(ids), self.decode(ids), ended) for e, (ids, ended) in zip(examples, tokens, strict=True)]

    def opened(self, example: Example) -> Example:
        """The prompt alone; of plain text (whose prompt is a begin token, if anything) all of it."""
        held: Tokens = example.data
        whole = held.start <= 1
        ids = held.ids if whole else held.ids[: held.start]
        return _example(example.id, example.cluster, Tokens(ids, len(ids), False))

    def written(
        self, example: Example, tokens: Sequence[int], *, ended: bool, suffix: str = "", marked: Sequence[bool] = (),
        favoured: Sequence[bool] = (),
    ) -> Example:  # fmt: skip
        """A prompt with ids that a model has written; see :meth:`expunge.adapters.base.Adapter.written`."""
        held: Tokens = example.data
        ends = ended and bool(self.end_ids)
        answer = [*tokens, *([min(self.end_ids)] if ends else [])]
        made = self._encoder.spliced(held, answer, ends)
        size = len(made.ids) - made.start

        def flags(given: Sequence[bool]) -> NDArray[np.bool_] | None:
            found = np.zeros(size, dtype=np.bool_)
            found[: len(given)] = given[:size]
            return found if found.any() else None

        both = Tokens(made.ids, made.start, made.ends, flags(marked), flags(favoured))
        return _example(example.id + suffix, example.cluster, both)

    def pieces(self, example: Example) -> tuple[str, list[str]]:
        """Text of the prompt and of each target, decoded in short windows, so that the cost is linear in the length."""
        held: Tokens = example.data
        ids = held.ids.tolist()

        def read(start: int, stop: int) -> str:
            text: str = self.tokenizer.decode(ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return text

        prompt = read(0, held.start)
        out: list[str] = []
        # A text that is decoded on its own may lose the white space at its begin: some tokens before it go with it.
        begin, done = max(0, held.start - _BEFORE), held.start
        for at in range(held.start, len(ids)):
            known, text = read(begin, done), read(begin, at + 1)
            if text.endswith("\ufffd") and at + 1 < len(ids):  # part of a character
                out.append("")
                continue
            out.append(text[len(known) :])
            begin, done = max(0, at + 1 - _BEFORE), at + 1
        return prompt, out

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids without special tokens, white space stripped at both ends."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def running(self, example: Example, tokens: Sequence[int]) -> list[str]:
        """Text that each of the tokens adds which follow an example's prompt, white space kept."""
        return self.pieces(self.written(example, tokens, ended=False))[1]

    def text(self, example: Example) -> str:
        """Prompt and answer without special tokens, white space stripped at both ends."""
        return self.decode(example.data.ids.tolist())

    def spoken(self, example: Example) -> list[int]:
        """Ids of the targets, without an end token."""
        ids: list[int] = example.data.ids[example.data.start :].tolist()
        return ids[:-1] if example.data.ends else ids

    def resumed(self, example: Example, given: int) -> Example:
        """The example with the first ``given`` targets as part of the prompt."""
        held: Tokens = example.data
        marked, favoured = (None if f is None else f[given:] for f in (held.marked, held.favoured))
        return _example(example.id, example.cluster, Tokens(held.ids, held.start + given, held.ends, marked, favoured))

    def prefixed(self, example: Example, prefix: str | Sequence[int], suffix: str = "#prefixed") -> Example:
        """The example with a text or ids before all its tokens but a start token; see :meth:`Adapter.prefixed`."""
        held: Tokens = example.data
        new = self._encoder.spell(prefix) if isinstance(prefix, str) else list(prefix)
        at = 1 if len(held.ids) > 1 and held.ids[0] == self.tokenizer.bos_token_id else 0
        if self.context is not None and len(held.ids) + len(new) > self.context:
            raise InputError(
                f"The example {example.id!r} has {len(held.ids)} tokens; with {len(new)} before it the context of {self.context} "
                "is too short.",
                "Use a shorter prefix, or shorter texts.",
            )
        ids = np.concatenate([held.ids[:at], np.array(new, dtype=held.ids.dtype), held.ids[at:]])
        return _example(example.id + suffix, example.cluster, Tokens(ids, held.start + len(new), held.ends, held.marked))

    def layers(self) -> list[str]:
        """Names of the transformer blocks, from the input to the output, within the model (without peft's wrapper)."""
        return storage.block_names(base(self.model))

    def parts(self) -> dict[str, Adapter]:
        """Target and assistant of a composite, the model without its projections, and that without its adapter."""
        found: dict[str, Adapter] = {}
        for name, model in apart.parts(bare(self.model)).items():
            other = self.sharing()
            other.model = model
            found[name] = other
        return found

    # ---- identity and storage ----------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """SHA-256 over weights (base and adapter), configuration, tokenizer and template."""
        return identity.fingerprint(bare(self.model), self.tokenizer, self._encoder)

    def save(
        self, folder: Path, model: nn.Module | None = None, *, merge: bool = False, state: dict[str, Tensor] | None = None
    ) -> None:
        """Write model and tokenizer in the layout of transformers (or of peft, for an adapter), safetensors only.

        Args:
            folder: must not exist, or be empty; appears complete or not at all.
            model: another model to write instead.
            merge: write a peft model as a plain one, with its adapter added to the weights.
            state: weights gathered from a sharded model, to be written instead of the model's own.

        Raises:
            InputError: the folder holds something, or the disk has no room.
        """
        storage.save(Path(folder), bare(self.model if model is None else model), self.tokenizer, merge, state)

    def copy(self) -> LanguageAdapter:
        """An independent copy: same tokenizer and template, own weights."""
        other = self.sharing()
        other.model = copying.deepcopy(self.model)
        return other

    def sharing(self) -> LanguageAdapter:
        """Another adapter of the same tokenizer and template that holds the same model, which may be exchanged."""
        other = copying.copy(self)
        other._encoder = copying.copy(self._encoder)
        other._runner = copying.copy(self._runner)
        return other


def _example(name: str, cluster: str, tokens: Tokens) -> Example:
    targets = len(tokens.ids) - tokens.start
    marked, favoured = (int(_flags(tokens, f).sum()) for f in (tokens.marked, tokens.favoured))
    return Example(name, cluster, targets, len(tokens.ids), tokens, n_marked=marked, n_favoured=favoured)


def _flags(tokens: Tokens, held: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    return np.zeros(len(tokens.ids) - tokens.start, dtype=np.bool_) if held is None else held


@contextmanager
def reference_off(model: nn.Module) -> Iterator[None]:
    """While open, a peft model answers as its base does: the reference without a second copy.

    Raises:
        InputError: the model has no adapter.
    """
    disable = getattr(bare(model), "disable_adapter", None)
    if not callable(disable) or not hasattr(bare(model), "peft_config"):
        message = "The reference 'adapter-off' needs a model with a LoRA adapter."
        raise InputError(message, "Choose parameters=lora, or reference=cached.")
    with disable():
        yield
