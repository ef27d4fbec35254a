"""Any metric or score-based attack as a pure function of given logits, labels or strings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from expunge.audit.attacks.membership import MEMBERSHIP
from expunge.audit.metrics.registry import METRICS
from expunge.audit.scores import token_statistics
from expunge.core.errors import InputError, unknown


def evaluate_metric(name: str, **inputs: Any) -> Any:
    """Evaluate a metric's formula on given inputs, without models or files.

    Every metric and every score-based attack has a pure function, and this calls it: for tests, for teaching, and so that
    anyone can compare Expunge with another implementation number by number. Where the function takes per-token arrays
    (``logp``, ``hits``, ``mean_logp``, ``std_logp``), one answer's ``logits`` ``[T, V]`` and ``labels`` ``[T]`` may be given
    instead; row ``t`` of the logits is the one that predicts label ``t`` (no shift is applied).

    Args:
        name: a registered metric, or a score-based membership attack.
        inputs: the parameters of its function.

    Returns:
        What the function returns; a float for most.

    Raises:
        InputError: no such metric, a parameter that it does not take, or one that is missing; the message names those it takes.
    """
    function = _function(name)
    parameters = inspect.signature(function).parameters
    if "logits" in inputs and "labels" in inputs:
        inputs = _from_logits(inputs, set(parameters))
    for given in inputs:
        if given not in parameters:
            raise unknown(f"{name} parameter", given, parameters)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in inputs]
    if missing:
        raise InputError(f"Parameter {missing[0]!r} of {name} is missing.", f"It takes {', '.join(parameters)}.")
    return function(**inputs)


def _function(name: str) -> Callable[..., Any]:
    if name not in METRICS and name in MEMBERSHIP:
        return MEMBERSHIP.get(name).evaluate
    return METRICS.get(name).evaluate


def _from_logits(inputs: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
    rest = {k: v for k, v in inputs.items() if k not in ("logits", "labels")}
    logits, labels = torch.as_tensor(inputs["logits"]), torch.as_tensor(inputs["labels"])
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"Logits must be [T, V] and labels [T]; got {tuple(logits.shape)} and {tuple(labels.shape)}.",
            "Give one answer at a time, with the row that predicts each label.",
        )
    found = token_statistics(logits, labels.long())
    arrays = {"logp": found["logp"], "hits": found["hit"], "mean_logp": found["mean_logp"], "std_logp": found["std_logp"]}
    taken = {k: v.numpy() for k, v in arrays.items() if k in wanted}
    if not taken:
        raise InputError("This metric reads no logits.", f"It takes {', '.join(sorted(wanted))}.")
    return {**taken, **rest}
