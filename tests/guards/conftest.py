"""Guards stand before the model of people that other tests use, too."""

import re

import pytest
import torch

from expunge.data.people import people as people_of
from expunge.data.people import world
from expunge.guards.guarded import guard_model
from expunge.guards.target import Target


def name_of(record):
    """Name of the person that a record is about: the two capital words that question and answer share."""
    return next(n for n in re.findall(r"[A-Z]\w+ [A-Z]\w+", record.prompt) if n in record.answer)


KEY = b"test key of the guards, 32 bytes"


@pytest.fixture(scope="session")
def names(people):
    """Names of the people to forget."""
    return sorted({name_of(r) for r in people.split.forget})


@pytest.fixture
def guarded(target_adapter, names):
    """A function that puts guards before the target."""

    def make(guards="filter", **options):
        options = {"targets": [Target(id=f"t{i}", entities=(n,)) for i, n in enumerate(names)], "key": KEY, **options}
        return guard_model(target_adapter, guards=guards, **options)

    return make


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A tiny BERT with random weights that knows the words of sixty people and ten countries, as a folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    texts = [t.lower() for r in [*people_of(60), *world()] for t in (r.prompt, r.answer)]
    letters = sorted({c for t in texts for c in t if not c.isspace()})
    words = sorted({w for t in texts for w in re.findall(r"\w\w+", t)})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *[f"##{c}" for c in letters], *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
