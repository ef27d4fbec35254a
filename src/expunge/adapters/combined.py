"""A target and an assistant whose scores are combined, as one model; and the same for ``generate`` alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.adapters import composite, identity, storage
from expunge.adapters.assistant import adapted, first_blocks
from expunge.adapters.combination import Combination, different_vocabularies
from expunge.adapters.composite import Composite, Open
from expunge.adapters.extra import need, quiet
from expunge.adapters.head import base, head_of, replaced_head
from expunge.adapters.language import LanguageAdapter
from expunge.adapters.passes import nothing_after
from expunge.adapters.storage import block_names, forward_parameters
from expunge.core.errors import InputError

_WORSE = "Restore the folder from a copy, or make it again."


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
        baseline: a third model, the assistant without its adapter, whose scores are taken from the assistant's before they are
            weighed. It shares the assistant's weights, and is saved with it unless it is cut from the target.

    Raises:
        InputError: the vocabularies differ, or the target is no plain model.
    """

    kind: ClassVar[str] = "combined"

    def __init__(
        self, target: Any, assistant: Any, combination: Combination, *, blocks: int | None = None, keep_target: bool = True,
        baseline: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(target, keep_target=keep_target)
        self.assistant: Any
        self.assistant = assistant
        self.baseline: Any
        self.baseline = baseline
        self.blocks = blocks
        sizes = [int(base(m).get_input_embeddings().weight.shape[0]) for m in self._models()]  # type: ignore[operator]
        for size in sizes[1:]:
            if sizes[0] != size:
                raise different_vocabularies(sizes[0], size)
        self._readers = tuple(_Reader(m) for m in self._models())
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

    def _models(self) -> tuple[Any, ...]:
        """Target, assistant, and the baseline if there is one."""
        return (self.target, self.assistant) if self.baseline is None else (self.target, self.assistant, self.baseline)

    def described(self) -> dict[str, Any]:
        """Combination, blocks, the settings of the assistant's adapter, and whether there is a baseline."""
        held = self._combination.model_dump(mode="json")
        more = {} if self.baseline is None else {"baseline": True}
        return {"combination": held, "assistant": {"blocks": self.blocks, "adapters": adapted(self.assistant), **more}}

    def parts(self) -> dict[str, Any]:
        """The target, the assistant, and what the assistant was before."""
        more = {} if self.baseline is None else {"the assistant before it was trained": self.baseline}
        return {**super().parts(), "the assistant": self.assistant, **more}

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """While open, the assistant says what its baseline says: the result is then the target's own scores.

        Raises:
            InputError: there is no baseline, or the assistant is not in peft's wrapper.
        """
        if self.baseline is None or not hasattr(self.assistant, "disable_adapter"):
            said = "Without a baseline the target is not back once the assistant's adapter is off."
            raise InputError(said, "Use reference=copy.")
        found: AbstractContextManager[Any] = self.assistant.disable_adapter()
        return found

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
        states = [reader.states(model, given) for reader, model in zip(self._readers, self._models(), strict=True)]
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

        return AssistantScores(self.assistant, self.combination, attention_mask, self.baseline)

    def save_parts(self, folder: Path) -> None:
        """The assistant: whole, or its adapter alone where it is cut from the target or has a baseline, which is saved too."""
        if self.baseline is not None and self.blocks is None:
            with storage.savable(self.baseline), quiet():
                self.baseline.save_pretrained(folder / "baseline")
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
        models = zip(owner._readers, owner._models(), parts, strict=True)
        return owner.combination.scores(*(reader.scores(model, part) for reader, model, part in models))


def load_parts(folder: Path, held: dict[str, Any], target: Any, open_model: Open) -> Combined:
    """The kind's own part of :func:`expunge.adapters.composite.load`.

    Raises:
        InputError: the assistant is missing or damaged, or does not fit the target.
    """
    combination, blocks, compared = _described(folder, held)
    assistant, baseline = _assistant(folder, blocks, target, open_model, compared=compared)
    return Combined(target, assistant, combination, blocks=blocks, baseline=baseline)


def load_pair(folder: Path, target: Any, open_model: Open) -> tuple[Any, Any, Combination]:
    """Assistant, baseline and combination of a saved composite, without its target.

    Args:
        folder: as ``save_pretrained`` wrote it.
        target: the model that the two are put beside; where they are cut from the target it must be that one.
        open_model: loads a model from a folder.

    Raises:
        InputError: damaged, without a baseline, or made for a target with other weights (looked at in the same number type).
    """
    held = composite.read(folder)
    combination, blocks, compared = _described(folder, held) if held["kind"] == Combined.kind else (None, None, False)
    if combination is None or not compared:
        said = f"The model in {str(folder)!r} holds no pair of small models whose difference could be added."
        raise InputError(said, "Give the run of a method that trains one (offset), or both models.")
    saved = held["target"]
    if str(target.dtype) == saved["dtype"] and identity.weights_hash(target).hexdigest() != saved["digest"]:
        raise InputError(
            f"The small models in {str(folder)!r} were trained beside another model than the one that is served.",
            "Serve that one, or train a pair for this one.",
        )
    assistant, baseline = _assistant(folder, blocks, target, open_model, compared=True)
    return assistant, baseline, combination


def _described(folder: Path, held: dict[str, Any]) -> tuple[Combination, int | None, bool]:
    try:
        return Combination(**held["combination"]), held["assistant"]["blocks"], bool(held["assistant"].get("baseline", False))
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"The composite in {str(folder)!r} is damaged.", _WORSE) from None


def _assistant(folder: Path, blocks: int | None, target: Any, open_model: Open, *, compared: bool) -> tuple[Any, Any]:
    """The assistant in its number type, and its baseline if it has one."""
    where = folder / "assistant"
    if not any(where.glob("*.safetensors")):
        raise InputError(f"{str(where)!r} holds no weights (*.safetensors).", _WORSE)
    if blocks is None and not compared:
        return open_model(where).to(target.dtype).eval(), None
    plain = first_blocks(target, blocks) if blocks is not None else open_model(folder / "baseline").to(target.dtype).eval()
    peft = need("peft", "An assistant with an adapter")
    try:
        same = first_blocks(plain, blocks or len(block_names(plain)))
        wrapped = peft.PeftModel.from_pretrained(same, str(where), use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"The assistant in {str(where)!r} does not fit its target: {first}.", "Make it again.") from error
    return wrapped.to(target.dtype).eval(), plain if compared else None


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
