"""Texts, names and keys to fill generated tables with: real English phrases in a random order, without a meaning.

Phrases are cut from the sentences of the shipped product reviews (MIT) at random words, so token statistics are
those of English, quotes and all, and two texts share a beginning no more often than real ones do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spark_llm.datasets import products

Strings = npt.NDArray[np.object_]
Ints = npt.NDArray[np.int64]

_PHRASE_WORDS = (4, 12)  # shortest, longest
_HASH_SYMBOLS = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Texts:
    """A stream of texts drawn with ``random``: the same generator state gives the same texts."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self._words = _words()

    def texts(self, count: int, words: float, *, spread: float = 0.5, end: str = ".") -> Strings:
        """``count`` texts of about ``words`` words on average (log-normal with ``spread``), each at least two."""
        if not count:
            return np.empty(0, object)
        scale = self._random.lognormal(-(spread**2) / 2, spread, count)
        lengths = np.maximum(2, np.rint(words * scale)).astype(np.int64)
        shortest, longest = _PHRASE_WORDS
        pieces = -(-lengths // shortest)  # enough phrases for each text, even if all are short
        starts = self._random.integers(0, len(self._words) - longest, int(pieces.sum()))
        sizes = self._random.integers(shortest, longest + 1, int(pieces.sum()))
        ends = np.cumsum(pieces)
        return _strings(
            [
                self._text(starts[last - n : last].tolist(), sizes[last - n : last].tolist(), length) + end
                for last, n, length in zip(ends.tolist(), pieces.tolist(), lengths.tolist(), strict=True)
            ]
        )

    def names(self, count: int, words: int) -> Strings:
        """``count`` distinct names of ``words`` capitalised words."""
        lexicon = _lexicon()
        found: dict[str, None] = {}
        while len(found) < count:
            drawn = self._random.integers(0, len(lexicon), (count, words))
            found |= dict.fromkeys(" ".join(lexicon[word].title() for word in row) for row in drawn.tolist())
        return _strings(list(found)[:count])

    def hashes(self, count: int, symbols: int) -> Strings:
        """``count`` random keys of letters and digits."""
        drawn = self._random.integers(0, len(_HASH_SYMBOLS), (count, symbols))
        return _strings(["".join([_HASH_SYMBOLS[symbol] for symbol in row]) for row in drawn.tolist()])

    def _text(self, starts: Sequence[int], sizes: Sequence[int], length: int) -> str:
        chosen: list[str] = []
        for start, size in zip(starts, sizes, strict=True):
            chosen += self._words[start : start + size]
            if len(chosen) >= length:
                break
        text = " ".join(chosen[:length]).rstrip(".,;: ")
        return text[:1].upper() + text[1:]


def generator(table: str, seed: int) -> np.random.Generator:
    """Random numbers of a table: those of other tables and seeds are independent."""
    return np.random.default_rng([seed, *table.encode()])


def popular(random: np.random.Generator, entities: int, rows: int, skew: float) -> Ints:
    """Each row's entity in [0, entities), every entity at least once; the larger ``skew``, the fewer have most rows.

    Popularity is log-normal. Raises ValueError if there are fewer rows than entities, or rows but no entity.
    """
    if rows < entities or (rows and not entities):
        raise ValueError(f"{rows} rows cannot name {entities} entities")
    popularity = random.lognormal(0.0, skew, entities)
    chosen = np.arange(entities)
    if rows > entities:
        others = random.choice(entities, rows - entities, p=popularity / popularity.sum())
        chosen = np.concatenate([chosen, others])
    return random.permutation(chosen)


def entities(rows: int, rows_per_entity: float) -> int:
    """How many entities a table of ``rows`` rows has; the repetition is the same at any size."""
    return min(rows, max(1, round(rows / rows_per_entity)))


@functools.cache
def _words() -> list[str]:
    sentences = products.load()["review_sentences"]["sentence"]
    return [word for sentence in sentences for word in str(sentence).split()]


@functools.cache
def _lexicon() -> list[str]:
    return sorted({word for word in _words() if word.isascii() and word.isalpha() and len(word) > 2})


def missing(values: Strings, absent: npt.NDArray[np.bool_]) -> Strings:
    """``values`` with None where ``absent``."""
    kept = values.copy()
    kept[absent] = None
    return kept


def _strings(values: list[str]) -> Strings:
    array = np.empty(len(values), object)
    array[:] = values
    return array
