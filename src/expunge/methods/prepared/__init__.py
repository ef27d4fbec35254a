"""Prepared methods: exact or certified deletion, paid for in training."""
