"""Loss terms, by family: likelihood, weighted ascent, preference, distribution, features.

A term is a function of per-target quantities; most are one of the few functions in
:mod:`expunge.methods.terms.functions` of a score.
"""
