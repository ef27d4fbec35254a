"""Experiments on published data: each a module that is run with ``python -m``."""
