"""Expunge makes a trained model forget, and proves it.

The public names are loaded when they are first used, so ``import expunge`` is cheap and needs no optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from expunge.core.version import __version__

_LAZY = {
    "unlearn": "expunge.api:unlearn",
    "plan": "expunge.api:plan",
    "unlearn_rows": "expunge.api:unlearn_rows",
    "guard": "expunge.api:guard",
    "audit_model": "expunge.api:audit_model",
    "audit_rows": "expunge.api:audit_rows",
    "table": "expunge.data.rows:table",
    "merge_models": "expunge.pipeline.merge:merge_models",
    "worst_rows": "expunge.pipeline.worst_case:worst_rows",
    "read_table": "expunge.data.tables:read_table",
    "ShardedEstimator": "expunge.methods.prepared.estimators:ShardedEstimator",
    "Supervised": "expunge.pipeline.supervised:Supervised",
    "Training": "expunge.engine.members:Training",
    "load": "expunge.data.sources:load",
    "build_recipe": "expunge.methods.recipe:build",
    "loss_terms": "expunge.methods.evaluate:loss_terms",
    "loss_on": "expunge.methods.evaluate:loss_on",
    "evaluate_metric": "expunge.audit.evaluate:evaluate_metric",
    "METHODS": "expunge.methods.registry:METHODS",
    "METRICS": "expunge.audit.metrics.registry:METRICS",
}

if TYPE_CHECKING:
    from expunge.api import audit_model, audit_rows, guard, plan, unlearn, unlearn_rows
    from expunge.audit.evaluate import evaluate_metric
    from expunge.audit.metrics.registry import METRICS
    from expunge.data.rows import table
    from expunge.data.sources import load
    from expunge.data.tables import read_table
    from expunge.engine.members import Training
    from expunge.methods.evaluate import loss_on, loss_terms
    from expunge.methods.prepared.estimators import ShardedEstimator
    from expunge.methods.recipe import build as build_recipe
    from expunge.methods.registry import METHODS
    from expunge.pipeline.merge import merge_models
    from expunge.pipeline.supervised import Supervised
    from expunge.pipeline.worst_case import worst_rows

__all__ = [
    "METHODS",
    "METRICS",
    "ShardedEstimator",
    "Supervised",
    "Training",
    "__version__",
    "audit_model",
    "audit_rows",
    "build_recipe",
    "evaluate_metric",
    "guard",
    "load",
    "loss_on",
    "loss_terms",
    "merge_models",
    "plan",
    "read_table",
    "table",
    "unlearn",
    "unlearn_rows",
    "worst_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'expunge' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value
