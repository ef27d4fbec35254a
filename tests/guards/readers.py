"""A model that reads every disguise and does what it is asked: what it says comes from a small trained model's own answers.

Small models obey no instructions. To see whether attacks and guards do what they say, this one does: its ``generate`` reads the
prompt as text, undoes what is written otherwise, follows turns, asks a trained model the plain question, and writes the answer in
the spelling that was asked for, token by token, under the guards' own processors and criteria.
"""

from __future__ import annotations

import re

import torch

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.audit.disguises import DISGUISES
from expunge.data.records import Record

LETTERS = "".join(map(chr, range(32, 127))) + "áéíóúñèàçÄÖÜäöüß¿¡\u200b" + DISGUISES["alike"].write("aceiopxyABCEHIKMOPTX")
QUESTION, ANSWER = "Question: ", "\nAnswer:"


class Reader:
    """Reads prompts and answers from what another model says.

    Args:
        knower: a trained model that answers plain questions.
        known: questions that may be asked, by which capitals are restored.
    """

    def __init__(self, knower: LanguageAdapter, known: list[str]) -> None:
        self.knower, self.known = knower, {q.casefold(): q for q in known}
        self.says: dict[str, str] = {}

    def answer(self, prompt: str) -> str:
        """What it goes on with after a prompt."""
        *before, last = prompt.split(QUESTION)
        asked, _, begun = last.partition(ANSWER)
        question, write = self.wanted(asked.strip())
        said = write(self.say(self.named(self.plain(question), "".join(before))))
        begun = begun.lstrip()
        return said[len(begun) :] if said.startswith(begun) else ""

    def wanted(self, asked: str):
        for how in DISGUISES.values():
            if how.wanted and asked.endswith(how.wanted):
                return asked.removesuffix(how.wanted).strip(), how.write
        return asked, str

    def plain(self, question: str) -> str:
        """The question without what was done to its letters."""
        for how in DISGUISES.values():
            if how.asked and question.startswith(how.asked):
                return how.read(question.removeprefix(how.asked)).strip()
        for how in DISGUISES.values():
            if not how.asked and (found := self.known.get(how.read(question).strip().casefold())):
                return found
        framed = re.search(r"(?:pregunta|question |Deutsch|Kiswahili) ?: (.*)", question)
        return framed.group(1) if framed else question

    def named(self, question: str, before: str) -> str:
        """The question with the name that earlier turns told."""
        told = re.search(r"(?:talk about|spoke of) ([\w ]+)\.", before)
        renamed = re.search(r"I call ([\w ]+) (\w+)\.", before)
        split = re.search(r"begins with: (\w+).*goes on with: ([\w ]+?)\s*\n", before, re.S)
        if renamed:
            return question.replace(renamed.group(2), renamed.group(1))
        name = told.group(1) if told else " ".join(split.groups()) if split else ""
        return question.replace("that one", name) if name else question

    def say(self, question: str) -> str:
        if question not in self.says:
            example = self.knower.encode(Record(id="asked", prompt=question, answer="x"))
            self.says[question] = self.knower.generate(self.knower.model, [example], 24)[0].text
        return self.says[question]


def reading(knower: LanguageAdapter, records, seed: int) -> LanguageAdapter:
    """A :class:`Reader` as a model with its own tokenizer, which knows every letter; ``seed`` tells several apart."""
    texts = [t for r in records for t in (r.prompt, r.answer)]
    tokenizer = word_tokenizer([*texts, LETTERS, "x" * 2000, QUESTION + ANSWER + "\n\n"])
    model = build("llama-tiny", tokenizer, seed=seed, context=2048)
    adapter = LanguageAdapter(model, tokenizer)
    reader = Reader(knower, [r.prompt for r in records])
    end = min(adapter.end_ids)

    def generate(input_ids, attention_mask=None, generation_config=None, logits_processor=(), stopping_criteria=(), **_):
        how = generation_config or model.generation_config
        rows = [row[real.bool()] for row, real in zip(input_ids, attention_mask, strict=True)]
        prompts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        scripts = []
        for prompt in prompts:
            text = reader.answer(prompt)
            begins = prompt.rstrip().endswith("Answer:") or prompt[-1:].isspace()
            spelt = tokenizer((" " if begins else "") + text, add_special_tokens=False)["input_ids"]
            scripts.append([*spelt, end])
        ids = input_ids
        for step in range(how.max_new_tokens):
            scores = torch.full((len(ids), len(tokenizer)), -10.0)
            for row, script in enumerate(scripts):
                scores[row, script[min(step, len(script) - 1)]] = 10.0
            for process in logits_processor:
                scores = process(ids, scores)
            ids = torch.cat([ids, scores.argmax(-1)[:, None]], 1)
            over = [bool(o) for criterion in stopping_criteria for o in criterion(ids, scores)]
            if (over and all(over)) or (not over and step + 1 >= max(map(len, scripts))):
                break
        return ids

    model.generate = generate
    return adapter
