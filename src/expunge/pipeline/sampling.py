"""Which settings a sweep tries.

What trial i of a method runs is a function of the seed, the method, i, and the results of earlier *rounds*: not of the order in
which trials end, of the number of workers, or of a kill in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from expunge.core.errors import MissingExtra
from expunge.core.files import digest_bytes
from expunge.core.search import Range
from expunge.methods.search import Dimension

Sampler = Literal["random", "tpe"]
_STARTUP = 5  #: trials that are drawn at random before TPE has anything to learn from


def check_sampler(sampler: Sampler) -> None:
    """Check that what the sampler needs is installed.

    Raises:
        MissingExtra: it is not.
    """
    if sampler == "tpe":
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise MissingExtra("The sampler tpe", "sweep") from None


def rounds(sampler: Sampler, trials: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Ranges of trials that are drawn together, in order: all of them at random; with TPE a start, then so many at once."""
    if sampler == "random":
        yield 0, trials
        return
    at = min(trials, max(_STARTUP, at_once))
    yield 0, at
    while at < trials:
        yield at, min(trials, at + at_once)
        at += at_once


def values_of(
    sampler: Sampler, method: str, dimensions: Sequence[Dimension], *, index: int, seed: int,
    earlier: Sequence[tuple[Mapping[str, Any], float]],
) -> dict[str, Any]:  # fmt: skip
    """The setting of a trial, by path; of trial 0 the method's own: nothing.

    Args:
        sampler: random, or TPE (tree-structured Parzen estimator, Bergstra et al. 2011), by optuna.
        method: its name, so that methods with the same parameters do not try the same values.
        dimensions: what is searched.
        index: of the trial.
        seed: of the sweep.
        earlier: settings of the trials of earlier rounds with their scores; the smaller, the better.
    """
    if index == 0:
        return {}
    own = int(digest_bytes(method.encode())[:8], 16)
    if sampler == "random" or not earlier:
        shares = np.random.default_rng([seed, 41, own, index]).random(len(dimensions))
        return {d.path: d.range.at(float(u)) for d, u in zip(dimensions, shares, strict=True)}
    return _tpe(dimensions, int(np.random.default_rng([seed, 42, own, index]).integers(2**31)), earlier)


def _tpe(dimensions: Sequence[Dimension], seed: int, earlier: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, Any]:
    import optuna

    held = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            space = {d.path: _distribution(optuna, d.range) for d in dimensions}
            study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True))
            for values, score in earlier:
                params = {d.path: _within(d.range, values.get(d.path, d.default)) for d in dimensions}
                if any(v is None for v in params.values()):  # the method's own value is "none", which is in no range
                    continue
                params = {d.path: _told(d.range, params[d.path]) for d in dimensions}
                study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=score))
            asked = study.ask(space).params
    finally:
        optuna.logging.set_verbosity(held)
    return {d.path: _taken(d.range, asked[d.path]) for d in dimensions}


def _distribution(optuna: Any, held: Range) -> Any:
    if held.choices:
        return optuna.distributions.CategoricalDistribution(tuple(range(len(held.choices))))
    if held.whole:
        return optuna.distributions.IntDistribution(int(held.low), int(held.high), log=held.log)
    return optuna.distributions.FloatDistribution(held.low, held.high, log=held.log)


def _within(held: Range, value: Any) -> Any:
    """A value of the range as near as can be to the method's own; None where there is none."""
    if held.choices:
        return value if value in held.choices else None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return min(held.high, max(held.low, value))


def _told(held: Range, value: Any) -> Any:
    if held.choices:
        return held.choices.index(value)
    return round(value) if held.whole else float(value)


def _taken(held: Range, value: Any) -> Any:
    if held.choices:
        return held.choices[value]
    return int(value) if held.whole else min(held.high, max(held.low, float(f"{value:.6g}")))
