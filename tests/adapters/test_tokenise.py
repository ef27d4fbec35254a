"""From records to ids: the boundary of prompt and answer, chat templates, and every way in which it can go wrong."""

from __future__ import annotations

import dataclasses

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.tokenise import Encoder
from expunge.adapters.words import word_tokenizer
from expunge.core.errors import InputError
from expunge.data.records import Record

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
DATED = "{{ date_string if date_string is defined else strftime_now('%H:%M:%S.%f') }}" + CHATML
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}" + CHATML


@dataclasses.dataclass(frozen=True)
class VerbatimRecord(Record):
    verbatim: bool = True


def bpe(texts, *, bos=False, vocab=300, split=True):
    """A byte-level BPE tokenizer; without ``split`` merges may cross spaces and line ends, as they do across a boundary."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )


def metaspace(texts, vocab=200):
    """As sentencepiece has it: spaces are part of words, and every text begins with one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<unk>", "<s>", "</s>"]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def encoder(tokenizer, template=None, max_length=None, truncate=False):
    return Encoder(tokenizer, template, max_length, truncate)


def halves(tokenizer, tokens):
    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    return decode(tokens.ids[: tokens.start]), decode(tokens.ids[tokens.start :])


def test_the_default_template_gives_the_space_to_the_answer():
    tokenizer = bpe(["Question: who\nAnswer: me"] * 5, bos=True)
    tokens = encoder(tokenizer).encode(Record(id="r", prompt="who", answer="me"))
    assert halves(tokenizer, tokens) == ("<s>Question: who\nAnswer:", " me</s>")
    assert tokens.ends
    assert tokens.ids.dtype == "int32"


def test_a_merge_across_the_boundary_is_repaired():
    text = "ab"
    tokenizer = bpe([text] * 50, split=False)
    before, answer = "xa", "bx"
    assert len(tokenizer("ab")["input_ids"]) == 1, "the pair is one token"
    coder = encoder(tokenizer)
    tokens = coder.encode(VerbatimRecord(id="r", prompt=before, answer=answer))
    prompt_ids = tokenizer(before)["input_ids"]
    assert tokens.ids[: tokens.start].tolist() == prompt_ids, "the prompt's ids are those it has alone"
    assert tokens.ids[tokens.start :].tolist() == [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer(before + answer)["input_ids"][: len(prompt_ids)] != prompt_ids, "or the test would test nothing"
    assert coder.repairs == 1
    coder.encode(VerbatimRecord(id="r", prompt="xx", answer="yy"))
    assert coder.repairs == 1


def test_a_repair_adds_no_space_in_vocabularies_that_begin_with_one():
    tokenizer = metaspace(["ab ab ab", "a b a b", ". \n"] * 20)
    assert tokenizer.tokenize("ab") == ["▁ab"], "the pair is one token"
    assert tokenizer.decode(tokenizer("a")["input_ids"] + tokenizer("b ab")["input_ids"], skip_special_tokens=True) == "a b ab"
    coder = encoder(tokenizer)
    tokens = coder.encode(VerbatimRecord(id="r", prompt="a", answer="b ab"))
    assert coder.repairs == 1
    assert tokens.ids[: tokens.start].tolist() == tokenizer("a")["input_ids"]
    assert tokenizer.decode(tokens.ids, skip_special_tokens=True) == "ab ab"


def test_sentencepiece_like_vocabularies_need_no_repair_with_the_template():
    tokenizer = metaspace(["Question: ab\nAnswer: ab ab"] * 20)
    coder = encoder(tokenizer)
    record = Record(id="r", prompt="ab", answer="ab ab")
    tokens = coder.encode(record)
    assert coder.repairs == 0
    assert tokenizer.decode(tokens.ids[tokens.start :], skip_special_tokens=True) == "ab ab"
    joint = tokenizer("Question: ab\nAnswer: ab ab")["input_ids"]
    assert tokens.ids.tolist() == [*joint, tokenizer.eos_token_id]


def test_the_prompt_does_not_depend_on_the_answer():
    tokenizer = bpe(["Question: abc\nAnswer: abc"] * 5, split=False, vocab=280)
    coder = encoder(tokenizer)
    prompts = {
        tuple(t.ids[: t.start].tolist())
        for a in ("abc", " abc", "\nabc", ":", "  ", "ß")
        for t in [coder.encode(Record(id="r", prompt="abc", answer=a))]
    }
    assert len(prompts) == 1


def test_the_adapter_counts_repairs():
    tokenizer = bpe(["ab"] * 50, split=False)
    adapter = LanguageAdapter(build("llama-tiny", tokenizer), tokenizer)
    adapter.encode(VerbatimRecord(id="r", prompt="a", answer="b"))
    assert adapter.boundary_repairs == 1


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_chat_template(template):
    tokenizer = bpe(["user assistant me who"])
    tokenizer.chat_template = template
    coder = encoder(tokenizer)
    tokens = coder.encode(Record(id="r", prompt="who", answer="me"))
    extra = "<think>\n\n</think>\n\n" if template is THINKING else ""
    before, after = halves(tokenizer, tokens)
    assert before == "<|im_start|>user\nwho<|im_end|>\n<|im_start|>assistant\n" + extra
    assert after == "me<|im_end|>", "what comes after the end of turn is never generated, so it is not supervised"
    assert tokens.ends
    assert coder.end_ids() == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")])
    if template is CHATML:
        generated = tokenizer.apply_chat_template(
            [{"role": "user", "content": "who"}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert tokens.ids[: tokens.start].tolist() == generated


def test_chat_templates_that_trim_or_do_not_end():
    tokenizer = bpe(["who me"], bos=True)
    tokenizer.chat_template = TRIMMING
    tokens = encoder(tokenizer).encode(Record(id="r", prompt="who", answer=" me "))
    assert halves(tokenizer, tokens) == ("[INST] who [/INST] ", "me</s>")
    tokenizer.chat_template = BARE
    tokens = encoder(tokenizer).encode(Record(id="r", prompt="who", answer="me"))
    assert halves(tokenizer, tokens) == ("user: who\nassistant: ", "me\n</s>")


def test_chat_turns_are_kept_and_only_the_last_answer_is_supervised():
    tokenizer = bpe(["who me"])
    tokenizer.chat_template = CHATML
    turns = (("system", "be kind"), ("user", "me?"), ("assistant", "me"), ("user", "who?"))
    tokens = encoder(tokenizer).encode(Record(id="r", messages=turns, answer="me"))
    before, after = halves(tokenizer, tokens)
    assert before.count("<|im_start|>") == 5
    assert before.endswith("who?<|im_end|>\n<|im_start|>assistant\n")
    assert after == "me<|im_end|>"
    other, _ = halves(tokenizer, encoder(tokenizer).encode(Record(id="r", messages=turns, answer="me"), prompt="new?"))
    assert other == before.replace("who?", "new?")


def test_chat_templates_with_a_date_are_the_same_tomorrow():
    tokenizer = bpe(["who me"])
    tokenizer.chat_template = DATED
    first, second = (encoder(tokenizer).encode(Record(id="r", prompt="who", answer="me")).ids.tolist() for _ in range(2))
    assert first == second


def test_chat_templates_that_refuse():
    tokenizer = bpe(["who me"])
    tokenizer.chat_template = STRICT
    record = Record(id="r7", messages=(("system", "x"), ("user", "who")), answer="me")
    with pytest.raises(InputError, match=r"refuses record 'r7': no system turns here\..*template"):
        encoder(tokenizer).encode(record)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="does not write out the answer of record 'r8'"):
        encoder(tokenizer).encode(Record(id="r8", prompt="who", answer="me"))


def test_a_given_template_goes_before_the_chat_template():
    tokenizer = bpe(["who me"])
    tokenizer.chat_template = CHATML
    tokens = encoder(tokenizer, "Q {prompt} A {answer} .").encode(Record(id="r", prompt="{answer}", answer="me {prompt}"))
    assert halves(tokenizer, tokens) == ("Q {answer} A", " me {prompt} .</s>")


@pytest.mark.parametrize("template", ["{prompt}", "{answer} {prompt}", "{prompt}{prompt}{answer}", "no places"])
def test_bad_templates(template):
    with pytest.raises(InputError, match="must contain"):
        encoder(bpe(["x"]), template)


def test_chats_without_a_template():
    tokenizer = bpe(["who me"])
    one = encoder(tokenizer).encode(Record(id="r", messages=(("user", "who"),), answer="me"))
    assert one.ids.tolist() == encoder(tokenizer).encode(Record(id="r", prompt="who", answer="me")).ids.tolist()
    with pytest.raises(InputError, match="chat of 2 turns, but there is no chat template"):
        encoder(tokenizer).encode(Record(id="r", messages=(("system", "x"), ("user", "who")), answer="me"))


def test_other_answers_and_prompts(tokenizer):
    adapter = LanguageAdapter(build("llama-tiny", tokenizer), tokenizer)
    record = Record(id="r1", prompt="When?", answer="1843.", subject="ada")
    example = adapter.encode(record, answer="London, England.", suffix="#pert0")
    assert (example.id, example.cluster) == ("r1#pert0", "ada")
    assert adapter.tokenizer.decode(example.data.ids[example.data.start :]) == " London, England.</s>"
    assert example.data.ids[: example.data.start].tolist() == adapter.encode(record).data.ids[: example.data.start].tolist()
    asked = adapter.encode(record, prompt="Where?")
    assert "Where?" in adapter.tokenizer.decode(asked.data.ids[: asked.data.start])


def test_plain_text_and_end_tokens():
    for begin in (False, True):
        tokenizer = bpe(["some text"], bos=begin)
        tokens = encoder(tokenizer).encode(Record(id="t", answer="some text"))
        assert tokens.start == 1
        assert not tokens.ends
        assert tokens.ids.tolist() == tokenizer("some text")["input_ids"]
    with pytest.raises(InputError, match="'t' has no token to supervise"):
        encoder(bpe(["x"])).encode(Record(id="t", answer="x"))


def test_a_tokenizer_without_an_end_token():
    tokenizer = bpe(["who me"])
    tokenizer.eos_token = None
    coder = encoder(tokenizer)
    assert coder.encode(Record(id="t", answer="some text")).start == 1
    with pytest.raises(InputError, match=r"no end token.*tokenizer\.eos_token"):
        coder.encode(Record(id="r", prompt="who", answer="me"))


def test_a_tokenizer_without_a_padding_token(records):
    tokenizer = word_tokenizer([r.prompt + " " + r.answer + "Question: \nAnswer: " for r in records])
    tokenizer.pad_token = None
    adapter = LanguageAdapter(build("llama-tiny", tokenizer), tokenizer)
    batch = adapter.collate([adapter.encode(r) for r in records])
    assert adapter.forward(adapter.model, batch, frozenset({"losses"})).losses.isfinite().all()
    assert len(adapter.generate(adapter.model, [adapter.encode(r) for r in records], 2)) == 4


def test_tokenizers_that_add_an_end_token_themselves():
    tokenizer = bpe(["who me"], bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokens = encoder(tokenizer).encode(Record(id="r", prompt="who", answer="me"))
    assert halves(tokenizer, tokens) == ("<s>Question: who\nAnswer:", " me</s>")


def test_too_long(tokenizer):
    adapter = LanguageAdapter(build("gpt2-tiny", tokenizer, context=16), tokenizer)
    long = Record(id="r9", prompt="When?", answer="London, England. " * 9)
    with pytest.raises(InputError, match=r"Record 'r9' has \d+ tokens; the model's context holds 16\..*truncate"):
        adapter.encode(long)
    cut = LanguageAdapter(build("gpt2-tiny", tokenizer, context=16), tokenizer, truncate=True)
    example = cut.encode(long)
    assert example.size == 16
    assert not example.data.ends
    assert len(cut.encode(Record(id="t", answer="London " * 99)).data.ids) == 16
    with pytest.raises(InputError, match="The prompt of record 'r9' alone has"):
        cut.encode(Record(id="r9", prompt="London " * 20, answer="1843."))
    shorter = LanguageAdapter(build("gpt2-tiny", tokenizer, context=64), tokenizer, max_length=12)
    assert shorter.context == 12
    with pytest.raises(InputError, match="holds 12"):
        shorter.encode(Record(id="r9", prompt="When?", answer="London, England. London."))


def test_word_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    texts = ["Ada's notes (1843), e.g. the first.", "Zürich — where?\nThere!  Two  spaces"]
    tokenizer = word_tokenizer(texts)
    for text in [*texts, "Adas wherefirst", "e.g. the Zürich notes"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    words = tokenizer.convert_ids_to_tokens(tokenizer(texts[0])["input_ids"])
    assert words[:4] == ["<s>", "Ada", "'", "s"]
    assert " notes" in words
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2, 3)
    assert tokenizer("漢", add_special_tokens=False)["input_ids"] == [3]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts[1])["input_ids"] == tokenizer(texts[1])["input_ids"]
    assert again.eos_token_id == 2
    assert len(word_tokenizer(["a b c a b a"], size=12)) <= 12
    with pytest.raises(InputError, match="no room"):
        word_tokenizer(["abc"], size=5)
    with pytest.raises(InputError, match="at least one text"):
        word_tokenizer([])
