"""Short facts about people, a tiny language model that learns them in seconds, and a tiny masked one that proposes words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.data.records import Record
from expunge.methods.prepared.text_source import TextSource, text_loss, text_table, token_scores
from expunge.methods.recipe import build as recipe

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo")
THINGS = ("door", "sign", "ring", "boat")
VALUES = (
    "amber", "birch", "cedar", "delta", "ember", "flint", "grove", "haze", "iris", "jade", "kelp", "lark", "moss", "north",
    "opal", "pearl", "quartz", "ridge", "slate", "thorn",
)  # fmt: skip
GONE = [f"{n}-{t}" for n in NAMES[:4] for t in THINGS]


def facts() -> list[Record]:
    """Twelve people, four facts each: two words out of twenty by a fixed seed, so that an answer is guessed once in 400 times."""
    rng = np.random.default_rng(5)
    found = []
    for name in NAMES:
        for thing in THINGS:
            words = " ".join(VALUES[int(i)] for i in rng.integers(len(VALUES), size=2))
            found.append(Record(f"{name}-{thing}", f" {words}", f"{thing} of {name}", subject=name, verbatim=True))
    return found


def opener(records: Sequence[Record], preset: str = "llama-tiny") -> Callable[[int], LanguageAdapter]:
    """What makes untrained adapters of one vocabulary."""
    tokenizer = word_tokenizer([r.prompt + r.answer for r in records])
    return lambda seed: LanguageAdapter(build(preset, tokenizer, seed=seed), tokenizer)


def source(
    records: Sequence[Record] | None = None, *, preset: str = "llama-tiny", opens: Callable[[int], LanguageAdapter] | None = None,
    **schedule: object,
) -> TextSource:  # fmt: skip
    """Records (all facts) and a training of them; deleted ones may be missing from ``records``."""
    held = facts() if records is None else list(records)
    given = {"name": "fixed", "lr": 2e-3, "steps": 150, "batch": 48, "warmup": 0.1, "decay": "linear", **schedule}
    makes = opens or opener(facts(), preset)
    return TextSource(table=text_table(makes(0), held), opens=makes, held=held, recipe=recipe("finetune", {"schedule": given}))


@torch.no_grad()
def known(given: TextSource, model: nn.Module, ids: Sequence[str]) -> tuple[float, Tensor]:
    """Share of answers whose tokens are all the most likely ones, and the loss of each record."""
    x, y = given.rows(ids)
    scores = token_scores(model, x)
    right = (scores[:, :-1].argmax(-1) == y[:, 1:]) | (y[:, 1:] == -100)
    return float(right.all(1).float().mean()), text_loss(scores, y)


def masked_model(folder: Path, texts: Sequence[str], steps: int = 150, **sizes: int) -> Path:
    """A tiny RoBERTa with a word tokenizer that has been trained to fill in words of some texts, in a folder."""
    import transformers

    tokenizer = word_tokenizer(texts)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 66, **sizes,
    }  # fmt: skip
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.RobertaForMaskedLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        rows = [torch.tensor([1, *tokenizer(t, add_special_tokens=False)["input_ids"], 2]) for t in texts]
        held = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        for _ in range(steps):
            hidden = (torch.rand(held.shape) < 0.3) & (held > 3)
            labels = held.masked_fill(~hidden, -100)
            ids = held.masked_fill(hidden, tokenizer.mask_token_id)
            model(input_ids=ids, attention_mask=(held > 0).long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
