"""Builds a ``tokenizers.Tokenizer`` from GGUF metadata, equal to the one the model was trained with.

GGUF keeps vocabulary, merges (or scores) and the name of the pre-tokenizer; the pre-tokenizers themselves are
those of the original tokenizer.json files, listed here by llama.cpp's names (src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from spark_llm.errors import LlmError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2_PATTERN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_then_gpt2() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_FAMILIES = {
    "gpt2": (_gpt2, False, False),
    "smollm": (_digits_then_gpt2, False, False),
    "llama3": (lambda: _split(LLAMA3_PATTERN), True, False),
    "qwen2": (lambda: _split(QWEN2_PATTERN), False, True),
    "tekken": (lambda: _split(TEKKEN_PATTERN), True, False),
}
"""Pre-tokenizer, whether whole words of the vocabulary skip the merges, whether text is put into NFC."""

_PRE_TOKENIZERS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "smollm": "smollm",
    "starcoder": "smollm",
    "refact": "smollm",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "llama-bpe": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "tekken": "tekken",
}
_BOS_BY_DEFAULT = ("llama3", "tekken")


def tokenizer_from_gguf(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """The tokenizer described by GGUF ``metadata`` of the model called ``name``.

    Raises LLM_TOKENIZER_MISSING for metadata that is absent, inconsistent or of an unknown kind.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if model is None or not tokens:
        raise _missing(name, "the GGUF file has no tokenizer metadata")
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise _missing(name, f"the GGUF file has {len(tokens)} tokens but {len(kinds)} token types")
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, tokens, name)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(metadata, tokens, kinds, name)
    else:
        raise _missing(name, f"the GGUF file has a tokenizer of the unknown kind {model}")
    special = [
        AddedToken(text, special=True, normalized=False)
        for text, kind in zip(tokens, kinds, strict=True)
        if kind == _CONTROL or (kind == _UNKNOWN and model == "llama")
    ]
    tokenizer.add_special_tokens(special)
    pairs = zip(tokens, kinds, strict=True)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, kind in pairs if kind == _USER_DEFINED])
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", add_bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], name: str) -> tuple[Tokenizer, bool]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    family = _PRE_TOKENIZERS.get(pre)
    if family is None:
        reason = f"the GGUF file uses the unknown pre-tokenizer {pre}; use the model's Hugging Face folder"
        raise _missing(name, reason)
    build, ignore_merges, nfc = _FAMILIES[family]
    merges = _pairs(metadata.get("tokenizer.ggml.merges") or ())
    if not merges:
        raise _missing(name, "the GGUF file has no tokenizer merges")
    vocab = {text: token for token, text in enumerate(tokens)}
    tokenizer = Tokenizer(_bpe(name, vocab, merges, ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, family in _BOS_BY_DEFAULT


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], name: str
) -> tuple[Tokenizer, bool]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise _missing(name, "the GGUF file has no score for each token")
    vocab = {text: token for token, text in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    given = metadata.get("tokenizer.ggml.merges")
    merges = _pairs(given) if given else _merges_of_scores(vocab, scores, kinds)
    unk_token = tokens[unknown] if unknown is not None else None
    tokenizer = Tokenizer(_bpe(name, vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer, True


def _bpe(name: str, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> Any:
    try:
        return models.BPE(vocab, merges, **options)
    except Exception as error:  # tokenizers raises plain Exception, for example for a merge of unknown pieces
        raise _missing(name, f"the GGUF file has inconsistent merges: {error}") from error


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def _merges_of_scores(vocab: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """SentencePiece's BPE merges: every split of a piece into two pieces, best piece first.

    The order of equal scores is transformers' (generate_merges), so that ids are those of its tokenizers.
    """
    ordinary = {text: token for text, token in vocab.items() if kinds[token] == 1}
    merges: list[tuple[float, str, str]] = []
    for piece, token in ordinary.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in ordinary and right in ordinary]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges.extend((scores[token], left, right) for left, right in known)
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


def _missing(name: str, reason: str) -> LlmError:
    return LlmError("LLM_TOKENIZER_MISSING", model=name, reason=reason)
