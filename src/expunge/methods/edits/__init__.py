"""Edits of the weights, one file each: closed-form methods that need no training."""
