"""Texts as unit vectors whose products tell how alike they are: n-grams by default, or a sentence encoder by name or folder.

Vectors of texts are derivatives of them: n-grams are held as hashed columns, not in clear, but who can guess a text can check the
guess, and vectors of sentence encoders can be inverted. They are personal data where the texts are.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from expunge.core.errors import InputError, MissingExtra
from expunge.guards.folding import words

_COLUMNS = 2**18
_REMEMBERED = 2**15  #: words and pairs whose columns are remembered, about
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Encoder(abc.ABC):
    """Unit vectors of texts; a text without any letter is the zero vector."""

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> sp.csr_matrix:
        """Rows of length one, ``[n, D]``: sparse, or sparse in form only."""

    def encode_words(self, texts: Sequence[Sequence[str]]) -> sp.csr_matrix:
        """The same of texts that are folded words already."""
        return self.encode([" ".join(t) for t in texts])


class NGrams(Encoder):
    """TF-IDF of words, pairs of words, and runs of characters within words.

    Words are folded first (case, accents, look-alikes). Columns are hashed with a key in front, so that no word is held in clear.
    The columns come from ``FeatureHasher``, whose hash is no cryptographic one: the key keeps words from being looked up at a
    glance, and no determined attacker out.

    Args:
        key: secret of the guard.
        texts: by which rare n-grams are told from common ones; none: all count alike.
        shortest, longest: letters of a run.
        pairs: also take pairs of words that follow each other.
    """

    def __init__(self, key: bytes, texts: Sequence[str] = (), *, shortest: int = 3, longest: int = 5, pairs: bool = True) -> None:
        from sklearn.feature_extraction import FeatureHasher

        self._key = hashlib.blake2b(key, digest_size=32, person=b"expunge-units").digest()
        self._columns: dict[bytes, tuple[NDArray[np.int32], NDArray[np.float64]]] = {}
        self._salt = hashlib.blake2b(key, digest_size=8, person=b"expunge-ngrams").hexdigest()
        self.shortest, self.longest, self.pairs = shortest, longest, pairs
        self._hasher = FeatureHasher(_COLUMNS, input_type="string", alternate_sign=False, dtype=np.float64)
        self._weights = np.ones(_COLUMNS)
        if texts:
            counts = np.bincount(self._counted([words(t) for t in texts]).indices, minlength=_COLUMNS)
            self._weights = np.log((1 + len(texts)) / (1 + counts)) + 1  # as scikit-learn has it, smooth

    def encode(self, texts: Sequence[str]) -> sp.csr_matrix:
        """Sublinear counts by rarity, each row of length one, ``[n, 2**18]``."""
        return self._weighed(self._counted([words(t) for t in texts]))

    def encode_words(self, texts: Sequence[Sequence[str]]) -> sp.csr_matrix:
        """See :class:`Encoder`; for texts that share words with those of other calls. Columns of words are remembered."""
        return self._weighed(self._counted(texts, self._remembered))

    def _weighed(self, made: sp.csr_matrix) -> sp.csr_matrix:
        made.data = (1 + np.log(made.data)) * self._weights[made.indices]
        return _unit(made)

    def _counted(
        self, texts: Sequence[Sequence[str]], hashed: Callable[[Sequence[str]], sp.csr_matrix] | None = None
    ) -> sp.csr_matrix:
        """How often each column stands in each text: the sum over its words and pairs, each of which is hashed once."""
        numbers: dict[str, int] = {}
        rows = [[numbers.setdefault(u, len(numbers)) for u in self._units(t)] for t in texts]
        if not numbers:
            return sp.csr_matrix((len(texts), _COLUMNS))
        ends = np.cumsum([0, *map(len, rows)])
        chosen = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=int(ends[-1]))
        times = sp.csr_matrix((np.ones(len(chosen)), chosen, ends), shape=(len(texts), len(numbers)))
        made = times @ (hashed or self._hashed)(list(numbers))
        made.sort_indices()
        return made

    def _hashed(self, units: Sequence[str]) -> sp.csr_matrix:
        return sp.csr_matrix(self._hasher.transform([self._grams(u) for u in units]))

    def _remembered(self, units: Sequence[str]) -> sp.csr_matrix:
        """The same, of which only what is new is hashed. What is remembered is keyed digests with columns."""
        held = self._columns = self._columns if len(self._columns) < _REMEMBERED else {}
        keys = [hashlib.blake2b(u.encode(), key=self._key, digest_size=16).digest() for u in units]
        new = [at for at, key in enumerate(keys) if key not in held]
        if new:
            made = self._hashed([units[at] for at in new])
            for at, first, last in zip(new, made.indptr, made.indptr[1:], strict=False):
                held[keys[at]] = (made.indices[first:last].copy(), made.data[first:last].copy())
        rows = [held[key] for key in keys]
        ends = np.cumsum([0, *(len(i) for i, _ in rows)])
        parts = np.concatenate([d for _, d in rows]), np.concatenate([i for i, _ in rows])
        return sp.csr_matrix((*parts, ends), shape=(len(units), _COLUMNS))

    def _units(self, held: Sequence[str]) -> list[str]:
        return [*held, *(f"{a} {b}" for a, b in itertools.pairwise(held))] if self.pairs else [*held]

    def _grams(self, unit: str) -> list[str]:
        """Of a word with its runs of letters, or of a pair of words."""
        whole = f"{self._salt}w{unit}"
        if " " in unit:
            return [whole]
        edged, begin = f" {unit} ", f"{self._salt}c"
        sizes = range(self.shortest, min(self.longest, len(edged)) + 1)
        return [whole, *(begin + edged[at : at + size] for size in sizes for at in range(len(edged) - size + 1))]


class Sentences(Encoder):
    """A sentence encoder.

    A folder of the layout of sentence-transformers, or a name of that organisation, is loaded by that package, with its own
    pooling; any other encoder of transformers gives the mean of its last states over the tokens. From a folder nothing but the
    folder is read. Weights are safetensors only, and no code that comes with them is run.

    Args:
        name: folder, or name on the hub.
        device: where it runs.
        batch: texts at a time.

    Raises:
        MissingExtra: the layout is that of sentence-transformers, and the package is not installed.
        InputError: there is no such model, it cannot be reached, its weights are pickled, or it brings its own code.
    """

    def __init__(self, name: str, device: Any = "cpu", batch: int = 64) -> None:
        self.name, self.device, self.batch = name, device, batch
        folder = Path(name)
        own = (folder / "modules.json").is_file() if folder.is_dir() else name.startswith("sentence-transformers/")
        self._mean: Any = None
        self._whole: Any = None
        if own:
            self._whole = _sentence_transformer(name, device)
            return
        from expunge.adapters.loading import load_auto

        try:
            model, tokenizer = load_auto("AutoModel", name)
        except InputError as error:
            raise _none(name, error.message, error.remedy) from None
        self._mean = (tokenizer, model.to(device).eval())

    def encode(self, texts: Sequence[str]) -> sp.csr_matrix:
        """Vectors of length one, ``[n, D]``."""
        if not texts:
            return sp.csr_matrix((0, 1))
        if self._whole is not None:
            return _unit(sp.csr_matrix(np.asarray(self._whole.encode(list(texts), batch_size=self.batch), dtype=np.float64)))
        made = [self._pooled(list(texts[at : at + self.batch])) for at in range(0, len(texts), self.batch)]
        return _unit(sp.csr_matrix(np.concatenate(made)))

    @torch.no_grad()
    def _pooled(self, texts: list[str]) -> Any:
        tokenizer, model = self._mean
        limit = min(512, getattr(model.config, "max_position_embeddings", 512))
        given = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        states = model(**given).last_hidden_state.double()
        mask = given["attention_mask"][..., None].double()
        return ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy()


class Columns:
    """Texts to look others up among. Of sparse vectors only what a text shares with them is read.

    Args:
        rows: their vectors, ``[n, D]``.
    """

    def __init__(self, rows: sp.csr_matrix) -> None:
        self._held = np.unique(rows.indices)  # other columns are in none of them
        whole = len(self._held) == rows.shape[1]  # vectors of an encoder: there is nothing to leave out
        self._dense = rows.toarray() if whole else None
        self._columns = sp.csr_matrix(rows[:, self._held].T)

    def against(self, rows: sp.csr_matrix) -> NDArray[np.float64]:
        """Cosines with other texts ``[m, D]``, ``[n, m]``."""
        if self._dense is not None:
            return np.asarray(self._dense @ rows.T.toarray())
        places = np.searchsorted(self._held, rows.indices)
        found = self._held[np.minimum(places, len(self._held) - 1)] == rows.indices if len(self._held) else places < 0
        ends = np.concatenate([[0], np.cumsum(found)])[rows.indptr]
        shared = sp.csr_matrix((rows.data[found], places[found], ends), shape=(rows.shape[0], len(self._held)))
        return np.asarray((shared @ self._columns).toarray().T)


def encoder_of(name: str, key: bytes, texts: Sequence[str], device: Any = "cpu") -> Encoder:
    """The encoder of a setting: empty for n-grams, else a folder or name; see :class:`Sentences`."""
    return Sentences(name, device) if name else NGrams(key, texts)


def _sentence_transformer(name: str, device: Any) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingExtra(f"The sentence encoder {name!r}", "encoders") from None
    from expunge.adapters.extra import quiet
    from expunge.adapters.loading import reach

    options: dict[str, Any] = {"device": str(device), "trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
    folder = Path(name)
    if folder.is_dir():
        _check_layout(folder)
    try:
        with quiet():
            return SentenceTransformer(name, local_files_only=True, **options)
    except Exception as error:  # whatever a broken or missing file makes the libraries raise
        if folder.is_dir():
            raise _none(name, f"{str(error).strip().partition(chr(10))[0]}", "Check the folder's files.") from None
    try:
        reach(name)
        with quiet():
            return SentenceTransformer(name, **options)
    except InputError as error:
        raise _none(name, error.message, error.remedy) from None
    except (OSError, ValueError) as error:
        raise _none(name, str(error).strip().partition("\n")[0], "Download it elsewhere and give the folder.") from None


def _none(name: str, why: str, remedy: str) -> InputError:
    return InputError(f"There is no sentence encoder {name!r}: {why.rstrip('.')}.", remedy)


def _check_layout(folder: Path) -> None:
    """Refuse parts that are no modules of the package itself, and pickled weights."""
    try:
        held = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        parts = [(str(m["type"]), folder / str(m["path"])) for m in held]
    except (OSError, ValueError, KeyError, TypeError):
        raise _none(str(folder), "its modules.json is damaged", "Check the folder's files.") from None
    if not parts:
        raise _none(str(folder), "its modules.json names no modules", "Check the folder's files.")
    for kind, place in parts:
        if not kind.startswith("sentence_transformers."):
            raise _none(str(folder), f"it brings its own code ({kind})", "Use a model of the package's own modules.")
        pickled = sorted(p.name for p in place.glob("*") if p.suffix in _PICKLED)
        if pickled and not any(place.glob("*.safetensors")):
            why = f"it holds pickled weights only ({pickled[0]}), which can run code when they are read"
            raise _none(str(folder), why, "Convert them to safetensors: SentenceTransformer(FOLDER).save_pretrained(NEW).")


def _unit(rows: sp.csr_matrix) -> sp.csr_matrix:
    owner = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    lengths = np.sqrt(np.bincount(owner, rows.data**2, minlength=rows.shape[0]))
    rows.data = rows.data / np.where(lengths > 0, lengths, 1)[owner]
    return rows
