"""A byte-level BPE with no more tokens than the tiny models, trained on the spot: special tokens, then bytes."""

from __future__ import annotations

import functools
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = 16


@functools.cache
def small_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """Its merges are those of JSON: separators, keys and words that follow one another; tokens straddle seams."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[f"<{i}>" for i in range(SPECIAL)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [{"title": f"the film {i}", "score": i, "tags": ["good", "bad", "very good"], "x": i / 7} for i in range(90)]
    words = ["positive negative neutral very good enough"] * 20
    tokenizer.train_from_iterator([json.dumps(row) for row in rows] + words, trainer)
    assert SPECIAL + 256 < tokenizer.get_vocab_size() <= vocab_size
    return tokenizer
