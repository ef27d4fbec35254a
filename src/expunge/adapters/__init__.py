"""Adapters: what every method may ask of a model, one module per modality."""

from expunge.adapters.registry import ADAPTERS, adapter

__all__ = ["ADAPTERS", "adapter"]
