"""A model taken apart: what is left when what was put beside or after its weights is taken away again.

Some results of unlearning keep the target as it was, and add something that has a say in its scores: an assistant, updates that a
detector loads, directions that are projected away, a low-rank adapter that was not merged. Whoever has the files can leave the
addition out. What then remains is no copy with other weights but exactly what lies in the folder (or what it names), so it is
found here without training and without search.
"""

from __future__ import annotations

import copy
from typing import Any

from expunge.adapters import projection
from expunge.adapters.composite import Composite

WITHOUT_ADAPTER = "the model without its adapter"
WITHOUT_PROJECTIONS = "the model without its projections"


def parts(model: Any) -> dict[str, Any]:
    """The models inside a model, by name; none for the weights of one network.

    Args:
        model: a transformers model, perhaps in peft's wrapper, or a composite; it is left as it is.

    Returns:
        Models that share weights with the given one (parts of a composite), or copies (without projections, without an adapter).
    """
    if isinstance(model, Composite):
        return model.parts()
    if hasattr(model, "peft_config"):
        return {WITHOUT_ADAPTER: _without_adapter(model)}
    if projection.installed(model):
        other = copy.deepcopy(model)
        projection.uninstall(other)
        return {WITHOUT_PROJECTIONS: other}
    return {}


def _without_adapter(model: Any) -> Any:
    """The base of a peft model as it is without it."""
    if any(getattr(held, "is_prompt_learning", False) for held in model.peft_config.values()):
        return model.get_base_model()  # what was learnt stands before the input: the base has nothing of it
    found = copy.deepcopy(model).unload()
    vars(found).pop("peft_config", None)  # peft leaves its settings there, and with them the look of an adapter
    return found
