"""A target and an assistant whose scores are combined, as one model; and the same for ``generate`` alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.adapters import storage
from expunge.adapters.assistant import adapted, first_blocks
from expunge.adapters.combination import Combination, different_vocabularies
from expunge.adapters.composite import Composite, Open
from expunge.adapters.extra import need, quiet
from expunge.adapters.head import base, head_of, replaced_head
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import nothing_after
from expunge.adapters.storage import forward_parameters
from expunge.core.errors import InputError


class Combined(Composite):
    """A model whose scores are a :class:`~expunge.adapters.combination.Combination` of a target's and an assistant's.

    Its features are the target's. In a forward pass each of the two runs once; their heads run together, at the positions that
    are asked for. ``generate`` excludes what the combination's filter drops, and keeps a cache of keys and values for each.

    Args:
        target: a transformers model with a language-modelling head.
        assistant: another one with the same vocabulary, perhaps in peft's wrapper.
        combination: how their scores are joined; it can be exchanged later.
        blocks: the assistant is the target's first so many blocks with an adapter: only that is saved. None: a model of its own.
        keep_target: see :class:`~expunge.adapters.composite.Composite`.

    Raises:
        InputError: the vocabularies differ, or the target is no plain model.
    """

    kind: ClassVar[str] = "combined"

    def __init__(
        self, target: Any, assistant: Any, combination: Combination, *, blocks: int | None = None, keep_target: bool = True
    ) -> None:
        super().__init__(target, keep_target=keep_target)
        sizes = [int(base(m).get_input_embeddings().weight.shape[0]) for m in (target, assistant)]  # type: ignore[operator]
        if sizes[0] != sizes[1]:
            raise different_vocabularies(*sizes)
        self.assistant: Any
        self.assistant = assistant
        self.blocks = blocks
        self._readers = (_Reader(target), _Reader(assistant))
        self._head = _Heads(self)
        self.combination = combination

    @property
    def combination(self) -> Combination:
        """How the scores are joined."""
        return self._combination

    @combination.setter
    def combination(self, value: Combination) -> None:
        self._combination = value
        self.describe()

    def described(self) -> dict[str, Any]:
        """Combination, blocks, and the settings of the assistant's adapter."""
        held = self._combination.model_dump(mode="json")
        return {"combination": held, "assistant": {"blocks": self.blocks, "adapters": adapted(self.assistant)}}

    def parts(self) -> dict[str, Any]:
        """The target and the assistant."""
        return {**super().parts(), "the assistant": self.assistant}

    def get_output_embeddings(self) -> nn.Module:
        """Makes combined scores from what both models say before their heads."""
        return self._head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """Combined ``logits`` ``[B, T, V]``."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        states = [reader.states(model, given) for reader, model in zip(self._readers, (self.target, self.assistant), strict=True)]
        self._head.widths = [s.shape[-1] for s in states]
        logits = self._head(torch.cat(states, -1))
        return need("transformers", "A language model").modeling_outputs.CausalLMOutput(logits=logits)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The target's ``generate`` with the assistant as a logits processor; options as there."""
        processors = [self.processor(attention_mask), *options.pop("logits_processor", ())]
        settings = copy.deepcopy(options.pop("generation_config", None) or self.generation_config)
        rest = settings.update(**options)
        return self.target.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=settings, logits_processor=processors, **rest
        )

    def processor(self, attention_mask: Tensor | None = None) -> Any:
        """The assistant as a transformers ``LogitsProcessor`` for the target's ``generate``; one for each call of it.

        Args:
            attention_mask: of the prompts, 0 where they are padded on the left; none: nothing is padded.
        """
        from expunge.adapters.decoding import AssistantScores

        return AssistantScores(self.assistant, self.combination, attention_mask)

    def save_parts(self, folder: Path) -> None:
        """The assistant: its adapter alone where it is cut from the target, else the whole model."""
        with storage.savable(base(self.assistant)), quiet():
            more = {"save_embedding_layers": False} if hasattr(self.assistant, "peft_config") else {}
            self.assistant.save_pretrained(folder / "assistant", **more)


class _Reader:
    """What a model says before its head, or its scores where something comes after the head or the head is no plain one."""

    def __init__(self, model: Any) -> None:
        head = head_of(model)
        self.bare = type(head) is nn.Linear and nothing_after(model)

    def states(self, model: Any, given: dict[str, Any]) -> Tensor:
        """``[B, T, D]``, or scores ``[B, T, V]``."""
        accepted = forward_parameters(base(model))
        options = {k: v for k, v in given.items() if k in accepted and v is not None}
        if not self.bare:
            found: Tensor = model(**options)["logits"]
            return found
        with replaced_head(_present(head_of(model)), _before):
            before: Tensor = model(**options)["logits"]
        return before

    def scores(self, model: Any, states: Tensor) -> Tensor:
        """Scores from :meth:`states`."""
        if not self.bare:
            return states
        head: Any = _present(head_of(model))
        out: Tensor = head(states.to(head.weight.dtype))  # side by side, states have the wider type of both models
        return out


def _before(states: Tensor, _: Callable[[Tensor], Tensor]) -> Tensor:
    return states


def _present(head: nn.Module | None) -> nn.Module:
    if head is None:
        raise InputError("The model has no language-modelling head.", "Load it with AutoModelForCausalLM.")
    return head


class _Heads(nn.Module):
    """Both heads and the combination, on the states of both models side by side."""

    def __init__(self, owner: Combined) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple, so that torch does not take it for a part of this module
        self.widths: Sequence[int] = ()

    def forward(self, states: Tensor) -> Tensor:
        owner = self.owner[0]
        parts = torch.split(states, list(self.widths), -1)
        models = zip(owner._readers, (owner.target, owner.assistant), parts, strict=True)
        first, second = (reader.scores(model, part) for reader, model, part in models)
        return owner.combination.scores(first, second)


def load_parts(folder: Path, held: dict[str, Any], target: Any, open_model: Open) -> Combined:
    """The kind's own part of :func:`expunge.adapters.composite.load`.

    Raises:
        InputError: the assistant is missing or damaged, or does not fit the target.
    """
    try:
        combination = Combination(**held["combination"])
        blocks = held["assistant"]["blocks"]
    except (KeyError, TypeError):
        raise InputError(f"The composite in {str(folder)!r} is damaged.", "Restore it from a copy, or make it again.") from None
    where = folder / "assistant"
    if not any(where.glob("*.safetensors")):
        raise InputError(f"{str(where)!r} holds no weights (*.safetensors).", "Restore the folder from a copy, or make it again.")
    if blocks is None:
        assistant = open_model(where)
    else:
        peft = need("peft", "An assistant with an adapter")
        try:
            assistant = peft.PeftModel.from_pretrained(first_blocks(target, blocks), str(where), use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0].rstrip(".")
            raise InputError(f"The assistant in {str(where)!r} does not fit its target: {first}.", "Make it again.") from error
    return Combined(target, assistant.to(target.dtype).eval(), combination, blocks=blocks)


def join(target: LanguageAdapter, assistant: LanguageAdapter, combination: Combination) -> LanguageAdapter:
    """Two models that you hold as one, with the target's template; both are used as they are, not copied.

    Raises:
        InputError: tokenizers or vocabularies differ, or a model is wrapped.
    """
    from expunge.adapters.identity import describe_tokenizer

    if describe_tokenizer(target.tokenizer) != describe_tokenizer(assistant.tokenizer):
        raise InputError(
            "Target and assistant have different tokenizers, so their scores are of different tokens.",
            "Use an assistant with the target's own tokenizer.",
        )
    made = target.sharing()
    made.model = Combined(target.model, assistant.model, combination)
    return made
