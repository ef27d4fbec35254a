"""Attacks: on scores, or acting on a copy of the model."""
