"""Ids of prompts encoded as segments are the ids of the whole string, over many kinds of tokenizer.

The tokenizers are small, trained here, with the exact normalizers, pre-tokenizers and special tokens of their
families; the reference is transformers' apply_chat_template, which knows nothing of segments.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from spark_llm.engine.model.source import resolve
from spark_llm.engine.request import TokenIds
from spark_llm.engine.service.protocol import StreamOpen, request_rows
from spark_llm.engine.text import pipeline as pipeline_module
from spark_llm.engine.text.cuts import CutRule
from spark_llm.engine.text.gguf_tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, TEKKEN_PATTERN
from spark_llm.engine.text.pieces import PieceEncoder
from spark_llm.engine.text.pipeline import TextPipeline
from spark_llm.engine.text.tokenizer import LoadedTokenizer, load_tokenizer

WORDS = (
    "the review says: \"I'd watch it again, we'll see\" (2019) — naïve café, ÅNGSTRÖM über; don't stop!! "
    "value: 12345, 3.14; http://a.b/c?d=e&f ... 日本語のテキスト, русский текст, 😀👍🏽 done.\n\n  next\tline, "
    '{"name": "x", "list": [1, 2, null]}\nplot: "once upon a time, there was"\nrating: 5\n'
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endfor %}"
)
LLAMA2_TRIM = "{% for m in messages %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% endfor %}"
ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{{ '<start_of_turn>model\n' }}"
)
TEKKEN = "{{ bos_token }}{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' }}{% endfor %}"


def corpus() -> list[str]:
    chosen = random.Random(0)
    words = WORDS.split(" ")
    return [" ".join(chosen.choices(words, k=20)) for _ in range(400)]


def byte_level(pre: object, special: list[str], *, normalizer: object = None, ignore_merges: bool = False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    isolated = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([isolated, pre_tokenizers.ByteLevel(False, use_regex=False)])


def sentencepiece(special: list[str], *, prefix: str, plain: tuple[str, ...] = ()) -> Tokenizer:
    """Like Llama 2 (prefix "prepend"), Mistral ("first"), or Gemma ("none", with newlines as added tokens)."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False)
    trained.train_from_iterator([line.replace("\n", " ") for line in corpus()], trainer)
    state = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    if prefix == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    elif prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = spaces
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, *([] if prefix == "none" else [decoders.Strip(" ", 1, 0)])])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return tokenizer


def chatml() -> tuple[Tokenizer, str | None]:
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return byte_level(words, ["<|im_start|>", "<|im_end|>"]), CHATML


def llama3() -> tuple[Tokenizer, str | None]:
    special = ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(split(LLAMA3_PATTERN), special, ignore_merges=True), LLAMA3


def qwen() -> tuple[Tokenizer, str | None]:
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(split(QWEN2_PATTERN), special, normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer, CHATML


def tekken() -> tuple[Tokenizer, str | None]:
    return byte_level(split(TEKKEN_PATTERN), ["<s>", "[INST]", "[/INST]"], ignore_merges=True), TEKKEN


def base_gpt2() -> tuple[Tokenizer, str | None]:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return tokenizer, None


def llama2() -> tuple[Tokenizer, str | None]:
    return sentencepiece(["<s>", "</s>"], prefix="prepend"), LLAMA2


def mistral() -> tuple[Tokenizer, str | None]:
    return sentencepiece(["<s>", "</s>"], prefix="first"), LLAMA2_TRIM


def zephyr() -> tuple[Tokenizer, str | None]:
    return sentencepiece(["<s>", "</s>"], prefix="prepend"), ZEPHYR


def gemma() -> tuple[Tokenizer, str | None]:
    special, lines = ["<s>", "<start_of_turn>", "<end_of_turn>"], ("\n", "\n\n", "\n\n\n", "  ", "\t")
    return sentencepiece(special, prefix="none", plain=lines), GEMMA


def unknown_words() -> tuple[Tokenizer, str | None]:
    """A pre-tokenizer nobody has proved anything about: prompts are encoded whole."""
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+|\n+\s*\S?|."), "isolated"), pre_tokenizers.ByteLevel(False, False, False)]
    )
    return byte_level(words, ["<|im_start|>", "<|im_end|>"]), CHATML


def wide_special() -> tuple[Tokenizer, str | None]:
    """The template's end token takes in the white space beside it."""
    tokenizer, template = chatml()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False, lstrip=True)])
    return tokenizer, template


FAMILIES: dict[str, Callable[[], tuple[Tokenizer, str | None]]] = {
    made.__name__: made
    for made in (chatml, llama3, qwen, tekken, base_gpt2, llama2, mistral, zephyr, gemma, unknown_words, wide_special)
}
CUT_FAMILIES = {"chatml", "llama3", "qwen", "tekken", "base_gpt2", "llama2", "mistral", "zephyr", "gemma", "smollm2"}


@dataclass
class Family:
    """A pipeline and the reference for it."""

    name: str
    loaded: LoadedTokenizer
    pipeline: TextPipeline
    reference: PreTrainedTokenizerFast

    def expected(self, segments: list[str]) -> list[int]:
        """transformers' ids for the message that these segments are."""
        text = "".join(segments).removesuffix("\n")
        if self.loaded.chat_template is None:
            return list(self.reference(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        return list(self.reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def has_special(self, text: str) -> bool:
        return any(token in text for token in self.reference.all_special_tokens) or any(
            token.content in text
            for token in self.loaded.tokenizer.get_added_tokens_decoder().values()
            if token.special
        )

    def encode(self, rows: list[list[str]], instruction_segments: int = 1):
        header = StreamOpen(instruction_segments=instruction_segments)
        return self.pipeline.encode(header, request_batch(rows))


def request_batch(rows: list[list[str]]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    segments = pa.array([segment for row in rows for segment in row], pa.utf8()).dictionary_encode()
    return request_rows(range(len(rows)), pa.ListArray.from_arrays(pa.array(offsets), segments))


def make_family(name: str) -> Family:
    if name == "smollm2":
        loaded = load_tokenizer(resolve("default"))
    else:
        tokenizer, template = FAMILIES[name]()
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        special = {key: text for key, text in special.items() if tokenizer.token_to_id(text) is not None}
        loaded = LoadedTokenizer(name, tokenizer, template, special)
    reference = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(loaded.tokenizer),
        chat_template=loaded.chat_template,
        clean_up_tokenization_spaces=False,
        **loaded.special_tokens,
    )
    return Family(name, loaded, TextPipeline(loaded), reference)


ALL = [*FAMILIES, pytest.param("smollm2", marks=pytest.mark.model)]
_made: dict[str, Family] = {}


@pytest.fixture(params=ALL, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    name = str(request.param)
    if name not in _made:
        _made[name] = make_family(name)
    return _made[name]


PARTS = st.sampled_from(
    [
        *"aeé1 9\n\t\r\"'.,:/{}[]()<>|_-▁½٣ß",
        *("\u0301", "\u0327", "\u00a0", "\u2028", "\u3000", "\u200b", "\u200d", "\x1c", "\u037e", "A\u030a", "\u00c5"),
        *("\u1100", "\u1161", "\uac00", "日本", "😀", "👍🏽", "👨\u200d👩\u200d👧", "🇩🇪"),
        *("'s", "'ll", " the", "  ", "\n\n", "\r\n", " \n", "\n ", "name: ", 'plot: "once', "12345", "don't"),
        *("<|im_", "[INST", "</s", "<0x0A>", "//"),
    ]
)
TEXT = st.lists(PARTS | st.text(max_size=3), max_size=8).map("".join)
ENDS = st.sampled_from(["\n"] * 6 + ["", "\n\n", " \n", ".\n", '"\n', ",\n\n", "/\n", "\r\n", " ", "\n ", "1\n"])
SEGMENTS = st.lists(st.builds(str.__add__, TEXT, ENDS), max_size=5)
LINES = st.builds('{}: "{}"\n'.format, st.sampled_from(["a", "plot", "2nd", "é"]), TEXT)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(SEGMENTS | st.lists(LINES, max_size=5), min_size=1, max_size=3), data=st.data())
def check_family(family: Family, rows: list[list[str]], data: st.DataObject) -> None:
    assume(not any(family.has_special("".join(row)) for row in rows))
    rows = [*rows, data.draw(st.permutations(rows[0]))]
    prompts, instruction = family.encode(rows)
    for row, prompt, count in zip(rows, prompts, instruction, strict=True):
        assert prompt.dtype == np.int32
        assert prompt.tolist() == family.expected(row), row
        assert 0 <= count <= len(prompt)


def test_ids_equal_those_of_the_whole_string(family: Family) -> None:
    check_family(family)


def test_well_formed_segments_are_encoded_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above would hold for an encoder that never cuts; this one encodes a shared segment once."""
    encoded: list[str] = []
    real = PieceEncoder.encode

    def recording(self: PieceEncoder, texts: Sequence[str]) -> list[TokenIds]:
        encoded.extend(texts)
        return real(self, texts)

    monkeypatch.setattr(PieceEncoder, "encode", recording)
    rows = [["Is it good?\n", 'plot: "a b."\n', f'own: "{i} c"\n'] for i in range(20)]
    prompts, instruction = family.encode(rows)
    assert [prompt.tolist() for prompt in prompts] == [family.expected(row) for row in rows]
    start = family.pipeline.frame(None).prefix + "Is it good?\n"
    assert set(instruction.tolist()) == {len(family.reference(start, add_special_tokens=False)["input_ids"])}
    assert encoded.count('plot: "a b."\n') == (family.name in CUT_FAMILIES)
    assert sum("plot" in text for text in encoded) == (1 if family.name in CUT_FAMILIES else 20)


def unsafe_rules() -> list[CutRule]:
    class EverywhereRule(CutRule):
        def ends(self, left: str) -> bool:
            return bool(left)

        def begins(self, right: str) -> bool:
            return bool(right)

    return [EverywhereRule(lone_newline=False)]


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen", "tekken", "llama2", "gemma"])
def test_the_check_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting between any two segments gives other ids, and the comparison sees it."""
    for rule in unsafe_rules():
        monkeypatch.setattr(pipeline_module, "cut_rule", lambda tokenizer, rule=rule: rule)
        unsafe = make_family(name)
        monkeypatch.undo()
        row = ["wat", "ch it aga", "in, we", "'ll see \n", "\n the rev", "iew"]
        assert unsafe.encode([row])[0][0].tolist() != unsafe.expected(row)
        assert make_family(name).encode([row])[0][0].tolist() == unsafe.expected(row)


def test_a_weaker_rule_fails_where_the_newline_is_not_alone() -> None:
    """GPT-2's pattern keeps a run of white space together at the end of a text, but not inside it."""
    family = make_family("chatml")
    row = ["a\n\n", "b"]
    assert family.encode([row])[0][0].tolist() == family.expected(row)
    assert family.pipeline._segments is not None
    family.pipeline._segments._rule = replace(family.pipeline._segments._rule, lone_newline=False)
    assert family.encode([row])[0][0].tolist() != family.expected(row)
