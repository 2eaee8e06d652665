r"""Where a text may be cut so that the ids of the parts, joined, are the ids of the whole (CONTRACTS.md 14).

The only cut considered is after a newline, before a visible character; which further conditions make it exact
is read off the tokenizer's normalizer, pre-tokenizer, vocabulary and added tokens. What is not known to be
exact is not cut.

Why it is exact. (1) No added token that is looked for in text crosses the cut, none takes in white space before
the cut, so added tokens are found alike in whole and parts. (2) NFC and NFD never join or swap anything with a
newline before it. (3) A byte-level pre-tokenizer of known alternatives ends a word at the cut, and begins one
there without looking back: alternatives either never match a newline, or take newlines only at their end
(``[\r\n]*``), or match white space only. The GPT-2 pattern alone looks ahead: ``\s+(?!\S)`` leaves a run's
last space to what follows, so there the newline must be the only white space before the cut. Words are encoded
independently. (4) Without words (SentencePiece), merges cannot cross the cut if no piece of the vocabulary
holds a newline before another character; the right part must then be encoded without the prefix space.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer, models

_PREFIX_SPACE = "▁"

# The alternatives of the pre-tokenizer patterns of GPT-2, cl100k, Llama 3, Qwen 2, o200k and Tekken.
_WITHOUT_NEWLINE = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"'(?i:[sdmt]|ll|ve|re)",
    *(r" ?\p{L}+", r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+"),
    *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
}
_NEWLINES_AT_END = {r" ?[^\s\p{L}\p{N}]+[\r\n]*": "", r" ?[^\s\p{L}\p{N}]+[\r\n/]*": "/"}
_NEWLINE_RUNS = {r"\s*[\r\n]+", r"\s*[\r\n]"}
_SPACE_RUNS = (r"\s+(?!\S)", r"\s+")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class CutRule:
    """The exact cuts of one tokenizer: between ``left`` and ``right`` where ``ends(left) and begins(right)``.

    lone_newline: the character before the newline must be visible.
    not_first: characters that may not begin the right part.
    prefix: what a tokenizer puts before text: never, at the start of the string, or also after special tokens.
    """

    lone_newline: bool
    not_first: str = ""
    prefix: Literal["never", "first", "always"] = "never"

    def ends(self, left: str) -> bool:
        """True when ``left`` may stand before a cut, whatever stands before it."""
        return left.endswith("\n") and (not self.lone_newline or (len(left) > 1 and _is_visible(left[-2])))

    def begins(self, right: str) -> bool:
        """True when ``right`` may stand after a cut, whatever stands after it."""
        return bool(right) and _is_visible(right[0]) and right[0] not in self.not_first


def _is_visible(character: str) -> bool:
    """Surely not white space to any regular expression engine; refuses controls and unassigned characters too."""
    return character.isprintable() and character != " "


def cut_rule(tokenizer: Tokenizer) -> CutRule | None:
    """The exact cuts of ``tokenizer`` with special tokens in text not recognised; None if none are known."""
    if getattr(tokenizer.model, "dropout", None):
        return None
    parts = _components(tokenizer.normalizer, "normalizers")
    words = _components(tokenizer.pre_tokenizer, "pretokenizers")
    plain = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    if any(token.lstrip or re.search(r"\n[^\n]", token.content) for token in plain):
        return None
    if all(part["type"] in ("NFC", "NFD") for part in parts):
        rule = _byte_level_rule(words)
        if rule is not None:
            return rule
    rule = _sentencepiece_rule(parts, words)
    if rule is None or not _newline_ends_pieces(tokenizer):
        return None
    # With a prefix, text after an added token gets one too, which a part cut off before it would not know.
    return None if rule.prefix == "always" and plain else rule


def _components(component: Any, key: str) -> list[dict[str, Any]]:
    """The JSON of a normalizer or pre-tokenizer, sequences flattened."""
    if component is None:
        return []

    def flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
        if state["type"] != "Sequence":
            return [state]
        return [leaf for part in state[key] for leaf in flatten(part)]

    return flatten(json.loads(component.__getstate__()))


def _byte_level_rule(words: list[dict[str, Any]]) -> CutRule | None:
    while words and words[0]["type"] == "Digits":
        words = words[1:]
    if not words or words[-1]["type"] != "ByteLevel" or words[-1].get("add_prefix_space", True):
        return None
    if words[-1].get("use_regex", True):
        return _pattern_rule(_GPT2) if len(words) == 1 else None
    if len(words) != 2 or words[0]["type"] != "Split":
        return None
    how = (words[0].get("behavior"), bool(words[0].get("invert")))
    pattern = words[0].get("pattern", {}).get("Regex")
    if pattern is None or how not in (("Isolated", False), ("Removed", True)):
        return None
    return _pattern_rule(pattern)


def _pattern_rule(pattern: str) -> CutRule | None:
    alternatives = [re.sub(r"\+\+", "+", part) for part in _alternatives(pattern)]
    if tuple(alternatives[-2:]) != _SPACE_RUNS:
        return None
    rest = alternatives[:-2]
    takes_runs = bool(rest) and rest[-1] in _NEWLINE_RUNS
    rest = rest[:-1] if takes_runs else rest
    if any(part not in _WITHOUT_NEWLINE and part not in _NEWLINES_AT_END for part in rest):
        return None
    not_first = "".join(_NEWLINES_AT_END.get(part, "") for part in rest)
    return CutRule(lone_newline=not takes_runs, not_first=not_first)


def _alternatives(pattern: str) -> list[str]:
    """``pattern`` split at the bars outside all brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif character == "|" and depth == 0:
            parts.append(pattern[start:position])
            start = position + 1
        position += 1
    return [*parts, pattern[start:]]


def _sentencepiece_rule(parts: list[dict[str, Any]], words: list[dict[str, Any]]) -> CutRule | None:
    prefix: Literal["never", "first", "always"] = "never"
    for part in parts:
        if part == {"type": "Prepend", "prepend": _PREFIX_SPACE}:
            prefix = "always"
        elif part != {"type": "Replace", "pattern": {"String": " "}, "content": _PREFIX_SPACE}:
            return None
    for word in words:
        if word["type"] == "Metaspace" and len(words) == 1 and not parts:
            prefix = word.get("prepend_scheme", "always")
        elif word != {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }:
            return None
    return CutRule(lone_newline=False, prefix=prefix) if parts or words else None


def _newline_ends_pieces(tokenizer: Tokenizer) -> bool:
    model = tokenizer.model
    # Without byte fallback unknown characters might fuse across the cut; the others look at a whole text at once.
    if not isinstance(model, models.BPE) or not model.byte_fallback or model.ignore_merges:
        return False
    if model.end_of_word_suffix or model.continuing_subword_prefix:
        return False
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if "\n" not in vocab and "<0x0A>" not in vocab:
        return False
    longer = (piece for piece in vocab if "\n" in piece or "<0x0A>" in piece)
    return not any(re.search(r"\n[^\n]|<0x0A>.|.<0x0A>", piece, re.DOTALL) for piece in longer)


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a SentencePiece-like tokenizer that puts no space before its text."""
    state = json.loads(tokenizer.to_str())
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        component = state.get(key)
        if not component:
            continue
        listed = component[inner] if component["type"] == "Sequence" else [component]
        kept = [part for part in listed if part["type"] != "Prepend"]
        for part in kept:
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
        state[key] = {"type": "Sequence", inner: kept}
    return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
