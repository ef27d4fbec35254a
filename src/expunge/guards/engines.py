"""Guards' terms inside an engine that runs the model itself: a logits processor of vLLM's V1 interface.

vLLM keeps one processor for a batch whose rows come, go and change places between steps. It tells the processor so
(``update_state``), then hands it the scores of all rows (``apply``). What belongs to one request is held under its row here, and
moves with it. Only the scores are reached: names cannot be *said*. What is asked is not refused, and no answer is looked at as
a whole; for that put ``expunge serve --upstream`` before the engine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import yaml
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.settings import load_yaml
from expunge.guards.barring import HardBar
from expunge.guards.keyterms import common_words, key_terms
from expunge.guards.target import Target, check_target
from expunge.guards.terms import TermIndex

FILE, KEY = "EXPUNGE_BAR_FILE", "EXPUNGE_GUARD_KEY"
_LOOK = 0.5  #: seconds between two looks at the file
_CANDIDATES = 64

if TYPE_CHECKING:
    _Base = object
else:
    try:  # an engine takes subclasses of its own class alone; without it the same methods are driven by whoever wants to
        from vllm.v1.sample.logits_processor import LogitsProcessor as _Base
    except ImportError:
        _Base = object


class Update(Protocol):
    """What has changed in a batch, as vLLM tells it: taken in the order ``removed``, ``added``, ``moved``.

    Attributes:
        batch_size: rows now.
        removed: rows whose requests have ended.
        added: row, parameters, ids of the prompt (none: it came as embeddings), and the list that the engine appends each new
            token of the answer to.
        moved: from which row to which, and whether they change places (``SWAP``) or the second is replaced.
    """

    batch_size: int
    removed: Sequence[int]
    added: Sequence[tuple[int, Any, list[int] | None, list[int]]]
    moved: Sequence[tuple[int, int, Any]]


class Barring:
    """Terms of targets for an engine, as digests, which can be exchanged while it runs.

    Names cannot be said in any answer. The key terms of a target's answers (:mod:`expunge.guards.keyterms`) cannot be said where
    the prompt names the target, or holds one of its questions: elsewhere they are ordinary words.

    Args:
        targets: whose terms.
        key: secret of the digests, at least 16 bytes.
        encodings: also terms in encodings, backwards, by rot13, with digits for letters.

    Raises:
        InputError: a target hides nothing or nearly everything, or says no term at all.
    """

    def __init__(self, targets: Sequence[Target], key: bytes, *, encodings: bool = True) -> None:
        self.index = TermIndex(key, encodings=encodings)
        self._asked = TermIndex(key, encodings=encodings)  # what shows that a prompt is about a target
        self._names: list[str] = []
        common = common_words([])
        for at, target in enumerate(targets):
            check_target(target)
            terms = [t for e in target.examples for t in key_terms(e.answer, e.prompt, common)]
            if not target.entities and not terms:
                raise InputError(
                    f"Target {at + 1} has {target.summary()} and no term that could be barred.", "Give names, or answers."
                )
            self.index.add(f"{at}", target.entities)
            self.index.add(f"{at} answers", terms)
            self._asked.add(f"{at} answers", [*target.entities, *(e.prompt for e in target.examples if e.prompt.strip())])
            self._names.append(f"{at}")

    def labels(self, prompt: str) -> frozenset[str]:
        """Whose terms cannot be said in an answer to a prompt."""
        return frozenset(self._names) | {m.target for m in self._asked.find(prompt)}


def read_barring(path: Path, key: bytes) -> Barring:
    """The targets of a guard file (``expunge serve --guard``), as terms for an engine.

    Raises:
        InputError: it is not there, holds no list of targets, or one that cannot be barred.
    """
    try:
        held = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The guard file {str(path)!r} cannot be read: {type(error).__name__}.", "Name a YAML file.") from None
    given = held.get("targets", []) if isinstance(held, Mapping) else None
    if not isinstance(given, list) or not all(isinstance(g, Mapping) for g in given):
        raise InputError(f"The guard file {str(path)!r} holds no list of targets.", "Begin with 'targets:'.")
    return Barring([Target(**g) for g in given], key)


@dataclass
class _Row:
    prompt: list[int]
    said: list[int]  # the engine's own list: it grows while the request runs
    bar: HardBar


class BarTerms(_Base):
    """vLLM's processor: ``vllm serve MODEL --logits-processors expunge.guards.engines:BarTerms``.

    It reads the guard file of ``EXPUNGE_BAR_FILE`` under the key of ``EXPUNGE_GUARD_KEY``, and reads it again when it changes;
    one that cannot be read then is passed over, and the terms of before stay barred. Every request is barred: no parameter of a
    request takes it out.

    Args:
        vllm_config: of the engine: which tokenizer.
        device: of the scores.
        is_pin_memory: not used.

    Raises:
        InputError: there is no file or no key.
    """

    candidates: ClassVar[int] = _CANDIDATES

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        from transformers import AutoTokenizer

        path, key = os.environ.get(FILE, ""), os.environ.get(KEY, "").encode()
        if not path or len(key) < 16:
            raise InputError("There is no guard file or no key for the engine.", f"Set {FILE}, and {KEY} to at least 16 bytes.")
        model = vllm_config.model_config
        self.tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, revision=getattr(model, "tokenizer_revision", None))
        self._path, self._key, self._rows = Path(path), key, dict[int, _Row]()
        self._seen, self._looked = self._stamp(), time.monotonic()
        self._barring = read_barring(self._path, key)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what would tell the scores that are barred.

        Raises:
            ValueError: log-probabilities are asked for: the engine takes them before any processor.
        """
        if any(getattr(sampling_params, name, None) is not None for name in ("logprobs", "prompt_logprobs")):
            raise ValueError("Log-probabilities would tell what is barred; leave logprobs and prompt_logprobs out.")

    def is_argmax_invariant(self) -> bool:
        """Never: the likeliest token may be barred."""
        return False

    def needs_output_token_ids(self) -> bool:
        """The tokens themselves are read, not only counted."""
        return True

    def update_state(self, batch_update: Update | None) -> None:
        """Follow the batch; called before each step."""
        self._reread()
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, _, prompt, said in batch_update.added:
            self._rows[row] = self._begun(list(prompt or []), said)
        for first, second, how in batch_update.moved:
            one, other = self._rows.pop(first, None), self._rows.pop(second, None)
            if one is not None:
                self._rows[second] = one
            if other is not None and getattr(how, "name", how) == "SWAP":
                self._rows[first] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Scores ``[B, V]``, in place: what would complete a term at minus infinity; an end token where nothing is left.

        Raises:
            RuntimeError: the engine hides tokens that were said, so nothing can be barred.
        """
        if any(-1 in row.said[-8:] for row in self._rows.values()):
            raise RuntimeError("The engine gives placeholders for tokens; run it with --no-async-scheduling.")
        given = [(r.bar, torch.tensor([*r.prompt, *r.said]), len(r.prompt), logits[at]) for at, r in self._rows.items()]
        for at, made in zip(self._rows, given[0][0].together(given) if given else [], strict=True):
            if not bool(torch.isfinite(made).any()):
                made[self.tokenizer.eos_token_id] = 0.0
            logits[at] = made
        return logits

    def _begun(self, prompt: list[int], said: list[int]) -> _Row:
        text = str(self.tokenizer.decode(prompt, skip_special_tokens=True))
        bar = HardBar(self._barring.index, self.tokenizer, self._barring.labels(text), self.candidates)
        return _Row(prompt, said, bar)

    def _stamp(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0
        return found.st_mtime_ns, found.st_size

    def _reread(self) -> None:
        """Take in what the file says now, for requests that run, too."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked, seen = time.monotonic(), self._stamp()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._barring = read_barring(self._path, self._key)
        except Exception:  # half written, or wrong: what is barred stays barred
            return
        self._rows = {at: self._begun(r.prompt, r.said) for at, r in self._rows.items()}
