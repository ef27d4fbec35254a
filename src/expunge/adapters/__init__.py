"""Adapters: what every method may ask of a model, one module per modality."""
