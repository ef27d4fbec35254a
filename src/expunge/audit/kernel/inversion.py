"""Log-probabilities of a language model, kept small without loss: a few log-ratios hold the whole distribution.

After *Better Language Model Inversion by Compactly Representing Next-Token Distributions* (2025, arXiv 2506.17090). The logits
of a model with ``d`` hidden units are ``W h + b``, so its log-probabilities, taken relative to that of one token, lie in an
affine family of dimension ``d`` at most, however large the vocabulary. The additive log-ratios of ``d + 1`` tokens with
independent rows,

    a_i = log p(chosen_i) - log p(chosen_0),  i = 1..d,

therefore determine all others. The paper takes random tokens and a hundred more than needed; here tokens can also be chosen so
that they are independent for certain, and both ways back are given: by the head's weights, and, for who has log-probabilities
alone, by a linear map fitted on observed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from expunge.audit.kernel.arrays import Floats, Integers
from expunge.core.errors import InputError


def log_ratios(log_probabilities: ArrayLike, chosen: ArrayLike) -> Floats:
    """``log p(chosen_i) - log p(chosen_0)`` for i >= 1: ``[..., V]`` to ``[..., len(chosen) - 1]``, in float64.

    Logits give the same: what a softmax takes away cancels.

    Raises:
        InputError: fewer than two tokens, one twice, or one that there is not.
    """
    logs = np.asarray(log_probabilities, dtype=np.float64)
    tokens = _tokens(chosen, logs.shape[-1])
    return np.asarray(logs[..., tokens[1:]] - logs[..., tokens[:1]], dtype=np.float64)


def normalised(scores: ArrayLike) -> Floats:
    """Log-probabilities of scores ``[..., V]`` that are right up to one number for each row."""
    held = np.asarray(scores, dtype=np.float64)
    top = held.max(axis=-1, keepdims=True)
    found: Floats = held - top - np.log(np.exp(held - top).sum(axis=-1, keepdims=True))
    return found


def dimension(log_probabilities: ArrayLike, tolerance: float = 1e-8) -> int:
    """Dimension of the affine family in which log-ratios of observed distributions ``[n, V]`` lie; the hidden width at most.

    Args:
        log_probabilities: of ``n`` contexts, more than the dimension.
        tolerance: singular values below this share of the largest count as none.
    """
    values = np.linalg.svd(_centred(log_probabilities), compute_uv=False)
    return int((values > tolerance * max(values[0], np.finfo(np.float64).tiny)).sum())


def independent_tokens(log_probabilities: ArrayLike, *, extra: int = 0, seed: int = 0, tolerance: float = 1e-8) -> Integers:
    """Tokens whose log-ratios hold those of all tokens, taken in the order of a seeded permutation: what is dependent is skipped.

    Args:
        log_probabilities: of observed contexts ``[n, V]``.
        extra: further tokens, which make what is read back less sensitive to rounding (paper: 100).
        seed: of the permutation.
        tolerance: a token is dependent if those before leave less of its ratio than this share of the largest.

    Returns:
        :func:`dimension` + 1 + ``extra`` tokens (no more than there are); the first is the one that others are relative to.
    """
    logs = np.asarray(log_probabilities, dtype=np.float64)
    order = np.random.default_rng(seed).permutation(logs.shape[-1])
    wanted = dimension(logs, tolerance)
    ratios = log_ratios(logs, order)
    ratios -= ratios.mean(axis=0)
    least = tolerance * np.linalg.norm(ratios, axis=0).max()
    basis = np.zeros((0, len(ratios)))
    kept, rest = [int(order[0])], []
    for token, column in zip(order[1:].tolist(), ratios.T, strict=True):
        left = column - basis.T @ (basis @ column)
        left -= basis.T @ (basis @ left)  # once more: the first pass leaves rounding of the size of the column
        if len(basis) < wanted and np.linalg.norm(left) > least:
            basis = np.vstack([basis, left / np.linalg.norm(left)])
            kept.append(token)
        else:
            rest.append(token)
    return np.array([*kept, *rest[:extra]], dtype=np.int64)


def expand(ratios: ArrayLike, chosen: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> Floats:
    """All log-probabilities ``[..., V]`` from log-ratios ``[..., c - 1]`` and the head's weights.

    Args:
        ratios: of the tokens ``chosen``.
        chosen: tokens ``[c]``, the first the one that others are relative to; their rows must span those of all tokens.
        weight, bias: of the head ``[V, d]``, ``[V]``.

    Raises:
        InputError: the chosen rows do not determine the distribution.
    """
    rows = np.asarray(weight, dtype=np.float64)
    tokens = _tokens(chosen, len(rows))
    offset = np.zeros(len(rows)) if bias is None else np.asarray(bias, dtype=np.float64)
    relative, shift = rows - rows[tokens[0]], offset - offset[tokens[0]]
    held = relative[tokens[1:]]
    if np.linalg.matrix_rank(held) < np.linalg.matrix_rank(relative):
        raise InputError("These tokens do not determine the distribution: their rows are dependent.", "Choose more tokens.")
    hidden = (np.asarray(ratios, dtype=np.float64) - shift[tokens[1:]]) @ np.linalg.pinv(held).T
    return normalised(hidden @ relative.T + shift)


@dataclass(frozen=True)
class Expansion:
    """The way back for who has log-probabilities alone: all ratios as an affine map of some, fitted by least squares.

    Attributes:
        chosen: tokens ``[c]``.
        matrix, offset: ``[c - 1, V]`` and ``[V]``.
    """

    chosen: Integers
    matrix: Floats
    offset: Floats

    @classmethod
    def fit(cls, log_probabilities: ArrayLike, chosen: ArrayLike) -> Expansion:
        """From observed distributions ``[n, V]``, more than there are chosen tokens.

        Raises:
            InputError: there are too few.
        """
        logs = np.asarray(log_probabilities, dtype=np.float64)
        tokens = _tokens(chosen, logs.shape[-1])
        if len(logs) <= len(tokens):
            raise InputError(f"A map from {len(tokens) - 1} ratios needs more than {len(tokens)} contexts; got {len(logs)}.")
        some, every = log_ratios(logs, tokens), logs - logs[:, tokens[:1]]
        mean_some, mean_every = some.mean(axis=0), every.mean(axis=0)
        matrix = np.linalg.lstsq(some - mean_some, every - mean_every, rcond=1e-10)[0]
        return cls(tokens, matrix, mean_every - mean_some @ matrix)

    def log_probabilities(self, ratios: ArrayLike) -> Floats:
        """All log-probabilities ``[..., V]`` of log-ratios ``[..., c - 1]``."""
        return normalised(np.asarray(ratios, dtype=np.float64) @ self.matrix + self.offset)


def _centred(log_probabilities: ArrayLike) -> Floats:
    """Ratios to the first token without their mean over contexts: what a bias of the head adds is gone."""
    logs = np.asarray(log_probabilities, dtype=np.float64)
    ratios = logs[:, 1:] - logs[:, :1]
    return np.asarray(ratios - ratios.mean(axis=0), dtype=np.float64)


def _tokens(chosen: ArrayLike, vocabulary: int) -> Integers:
    tokens = np.asarray(chosen, dtype=np.int64)
    if tokens.ndim != 1 or len(tokens) < 2 or len(set(tokens.tolist())) < len(tokens):
        raise InputError(f"Log-ratios need at least two tokens, each once; got {tokens.tolist()}.")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise InputError(f"Tokens are numbered from 0 to {vocabulary - 1}; got {tokens.min()} to {tokens.max()}.")
    return tokens
