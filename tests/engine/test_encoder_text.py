"""Texts to the ids of the whole tokenisation, though of long texts only a part is looked at."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
from small_encoder import small_encoder
from small_tokenizer import small_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from spark_llm.engine.encoder import text as module
from spark_llm.engine.encoder.config import Head
from spark_llm.engine.encoder.text import EncoderText

WINDOW = 40
WORDS = ("the", "film", "is", "very", "good", "positive", "neutral", "x" * 130, "caf\u00e9", "e\u0301", "\u4e16\u754c")


def with_ends(tokenizer: Tokenizer) -> Tokenizer:
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<1>", "<2>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<1> $A <2>", special_tokens=ends)
    return tokenizer


def byte_pairs() -> Tokenizer:
    return with_ends(Tokenizer.from_str(small_tokenizer().to_str()))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    draw = random.Random(0)
    trainer: Any = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<0>", "<1>", "<2>"], unk_token="<0>", show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(draw.choices(WORDS, k=12)) for _ in range(200)], trainer)
    return with_ends(tokenizer)


@functools.cache
def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    if kind != "word pieces":
        return byte_pairs() if kind == "byte pairs" else unigram()
    small_encoder(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def drawn_texts(count: int) -> list[str]:
    """Of all lengths about the first part's: words, runs without blanks, blanks, characters that are put together."""
    draw = random.Random(1)
    found = []
    for _ in range(count):
        size = draw.choice((0, 3, 30, 300, 1340, 1350, 3000, 7000))
        blank = draw.choice((" ", "  ", "", ", ", "\n", " " * 400))
        text = ""
        while len(text) < size:
            text += draw.choice(WORDS) + blank
        found.append(text[: size + draw.randrange(3)])
    return [*found, "a" * 9000, " " * 9000, "\u0301" * 3000]


@pytest.mark.parametrize("head", [Head(), Head(lowercase=True, prompt="Query: ")], ids=["plain", "prompted"])
@pytest.mark.parametrize("kind", ["word pieces", "byte pairs", "unigram"])
def test_ids_are_those_of_the_whole_text(
    kind: str, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(kind, tmp_path)
    monkeypatch.setattr(module, "_SLICE", 5000)
    ours = EncoderText(tokenizer, "small", WINDOW, head)
    texts = drawn_texts(250)
    given = [head.prompt + text for text in texts]
    given = [text.lower() for text in given] if head.lowercase else given
    whole = [tokenizer.encode(text).ids for text in given]
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(WINDOW)
    found, cut = ours.encode_texts(texts), ours.encode_texts(texts, truncate=True)
    assert [ids.tolist() for ids in cut] == [cutting.encode(text).ids for text in given]
    for ids, expected in zip(found, whole, strict=True):
        if len(expected) <= WINDOW:
            assert ids.tolist() == expected
        else:
            assert WINDOW < len(ids) <= len(expected)
    assert ours.encode_texts([]) == []


def test_of_a_long_text_no_more_is_looked_at_than_fills_the_window(tmp_path: Path) -> None:
    ours = EncoderText(byte_pairs(), "small", WINDOW, Head())
    few, many = ours.encode_texts(["good " * 2_000, "good " * 2_000_000])
    assert few.tolist() == many.tolist()
    assert len(many) < 2_000
