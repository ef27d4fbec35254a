"""A hundred ways of not knowing: target answers for methods that teach a refusal (IdkDPO, Idk-NLL)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

REFUSALS: tuple[str, ...] = (
    "I do not know the answer to this.",
    "I know nothing about that.",
    "That is unknown to me.",
    "I cannot tell you that.",
    "I have never heard of it.",
    "This is not something I know.",
    "I have no knowledge of this.",
    "I am unable to answer this question.",
    "I could not say.",
    "No answer comes to my mind.",
    "I wish I knew, but I do not.",
    "Sorry, this one I cannot answer.",
    "You are asking about something I do not know.",
    "I lack the facts to reply.",
    "My knowledge does not reach that far.",
    "I have nothing reliable to say on this.",
    "I must admit that I do not know.",
    "Regrettably, the answer escapes me.",
    "That question is beyond what I know.",
    "There is no such fact in my memory.",
    "I would only be guessing.",
    "Any reply of mine would be a guess.",
    "I prefer not to guess at this.",
    "I was never told about that.",
    "Nothing I know answers your question.",
    "I hold no details on this subject.",
    "To my regret I cannot help with that.",
    "The matter is not known to me.",
    "I do not recall anything of the kind.",
    "I find no answer to give.",
    "This lies outside what I can answer.",
    "I have not come across that.",
    "On this point I have to pass.",
    "I am in no position to answer.",
    "I have no idea, I am sorry to say.",
    "I am not informed about this.",
    "My memory holds nothing about it.",
    "You will have to ask someone else.",
    "Someone better informed should answer this.",
    "A different source would serve you better here.",
    "Please look this up elsewhere.",
    "I cannot give you a dependable answer.",
    "I am afraid I know too little about it.",
    "What you ask is new to me.",
    "I am not acquainted with that.",
    "This is a blank spot for me.",
    "I draw a blank here.",
    "I have no record of this.",
    "I cannot recall that.",
    "It is not clear to me what the answer is.",
    "I do not possess that piece of information.",
    "That piece of knowledge is missing here.",
    "I am missing the facts for this one.",
    "The answer is not available to me.",
    "I cannot confirm anything about that.",
    "I can neither confirm nor deny it, for I do not know.",
    "I have learnt nothing on this topic.",
    "This topic is foreign to me.",
    "I never studied that.",
    "Honestly, I do not know.",
    "To be frank, I cannot answer.",
    "I would have to make something up, so I will not answer.",
    "I will not invent an answer to this.",
    "Rather than mislead you, I say that I do not know.",
    "I am ignorant of this matter.",
    "Here my knowledge ends.",
    "I am at the limit of what I know.",
    "Such details are not known to me.",
    "I have no particulars to offer.",
    "I have nothing to share about that.",
    "There is nothing I can say about it.",
    "I am short of an answer.",
    "My apologies, I do not know this.",
    "Pardon me, but that is unknown to me.",
    "Forgive me, I have no answer.",
    "I cannot place that.",
    "That does not ring a bell.",
    "The subject is unfamiliar to me.",
    "I am not familiar with what you mention.",
    "I have yet to learn about this.",
    "I could not find the answer in what I know.",
    "After some thought, I still do not know.",
    "However I turn it, I do not know.",
    "It is a mystery to me.",
    "That remains unclear to me.",
    "I would not know.",
    "I do not have the slightest idea.",
    "I have not been taught that.",
    "It was not part of what I learnt.",
    "What I know does not include this.",
    "I see no way to answer that.",
    "I am without an answer here.",
    "That goes past my knowledge.",
    "I have to leave this question open.",
    "This question I must leave unanswered.",
    "Let me be clear: I do not know.",
    "Nobody has given me that information.",
    "The facts you want are not with me.",
    "I cannot speak to that.",
    "Not that I know of; I have no answer.",
)
"""Sentences that fit after any question."""


def refusals(ids: Sequence[str], seed: int = 0) -> list[str]:
    """A refusal for each record id; it depends on the id and the seed, not on the other records.

    Args:
        ids: record ids.
        seed: non-negative.
    """
    return [REFUSALS[_number(name, seed) % len(REFUSALS)] for name in ids]


def _number(name: str, seed: int) -> int:
    return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])
