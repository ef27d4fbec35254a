"""Stages joined: train, unlearn, audit, sequences of requests, on run folders."""
