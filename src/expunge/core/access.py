"""What a method may ask for and what an adapter may offer; the method x modality table is derived from these names."""

from __future__ import annotations

import enum


class Offer(enum.StrEnum):
    """A capability of an adapter."""

    LOSSES = "losses"  #: a loss per supervised target
    LOGITS = "logits"  #: scores over the classes (vocabulary) of each target
    FEATURES = "features"  #: hidden states at named layers
    GENERATE = "generate"  #: free generation from a prompt
    SEQUENCE = "sequence"  #: prompt and answer are one sequence of tokens, read by the same blocks
    TEXT = "text"  #: prompts and answers are text: alternative answers can be written
    CLASSES = "classes"  #: answers are classes: another class can be taught
    NUMBERS = "numbers"  #: answers are numbers: predictions that have a distance, and another number can be taught
    VALUES = "values"  #: the value vectors that attention makes of tokens, at named layers
    RECEIVED = "received"  #: how much attention each token gets, at named layers
    MAPS = "maps"  #: where in a layer the activations of a row are large
    ASSISTANT = "assistant"  #: scores of an assistant can be joined with the model's, and the two run, saved and loaded as one
    ROWS = "rows"  #: one target per example, by a plain function of tensors: gradients of each row at once
    EACH = "each"  #: a loss of each record as a plain function of tensors: gradients of each record at once


#: What only somebody who holds a model's weights gets of it.
OF_WEIGHTS = frozenset({Offer.FEATURES, Offer.VALUES, Offer.RECEIVED, Offer.MAPS, Offer.ASSISTANT, Offer.ROWS, Offer.EACH})


#: What scores of tokens are needed for, beside it: who gets answers in words has none of it.
OF_SCORES = frozenset({Offer.LOSSES, Offer.LOGITS})


class Level(enum.StrEnum):
    """How much of a model somebody has who audits it, from most to least."""

    WEIGHTS = "weights"  #: the model itself: what acts on weights and looks inside
    SCORES = "scores"  #: answers in words and log-probabilities
    TEXT = "text"  #: answers in words

    def of(self, offers: frozenset[Offer]) -> frozenset[Offer]:
        """What is left of a model's offers."""
        return offers - {Level.WEIGHTS: frozenset(), Level.SCORES: OF_WEIGHTS, Level.TEXT: OF_WEIGHTS | OF_SCORES}[self]


class Stream(enum.StrEnum):
    """Which examples a term reads."""

    FORGET = "forget"
    RETAIN = "retain"
    ALTERNATIVE = "alternative"  #: the forget examples with other answers
    VALIDATION = "validation"  #: never trained on, of the kinds of the forget examples: a schedule chooses by them


class Of(enum.StrEnum):
    """Under which model a quantity is computed."""

    CURRENT = "current"  #: the model being changed, with gradients
    REFERENCE = "reference"  #: the frozen target model
    INCOMPETENT = "incompetent"  #: a network of the same shape that has learnt nothing, frozen
    ORACLE = "oracle"  #: a model trained without the forget set, or a prediction of what it would say, frozen
