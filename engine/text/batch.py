"""A batch of messages as numbered texts, and what belongs to the message of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SegmentBatch:
    """Row i is the texts numbered ``codes[offsets[i]:offsets[i + 1]]``, joined. offsets begin with 0."""

    texts: list[str]
    codes: Ints
    offsets: Ints

    @classmethod
    def from_arrow(cls, column: pa.ListArray) -> SegmentBatch:
        """From a ``list<dictionary<int32, utf8>>`` column."""
        offsets = column.offsets.to_numpy().astype(np.int64)
        segments = column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
        texts = [text or "" for text in segments.dictionary.to_pylist()]
        codes = segments.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(texts, codes, offsets - offsets[0])

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[str]]) -> SegmentBatch:
        """From the segments of each row."""
        texts = list(dict.fromkeys(text for row in rows for text in row))
        numbers = {text: number for number, text in enumerate(texts)}
        codes = np.array([numbers[text] for row in rows for text in row], np.int64)
        return cls(texts, codes, np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def row(self, index: int) -> list[str]:
        """The segments of one row."""
        return [self.texts[code] for code in self.codes[self.offsets[index] : self.offsets[index + 1]].tolist()]

    def message(self, strips_start: bool, strips_end: bool) -> SegmentBatch:
        """The same rows, each without the newline that ends its last segment, ends stripped as asked.

        Every row keeps its number of segments; some may be empty.
        """
        texts, codes = list(self.texts), self.codes.copy()
        rows = np.flatnonzero(np.diff(self.offsets) > 0)
        lasts, firsts = self.offsets[rows + 1] - 1, self.offsets[rows]
        original = codes[lasts]

        def end(text: str) -> str:
            return text.rstrip() if strips_end else text.removesuffix("\n")

        _replace(texts, codes, lasts, end)
        empty = np.array([not text for text in texts], bool)
        # Where a stripped segment is used up, its neighbour is stripped too: such rows are done one by one.
        odd = empty[codes[lasts]] & (strips_end | empty[original])
        if strips_start:
            _replace(texts, codes, firsts, str.lstrip)
            empty = np.array([not text for text in texts], bool)
            odd |= empty[codes[firsts]]
        for row in rows[odd].tolist():
            parts = _trimmed(self.row(row), strips_start, strips_end)
            codes[self.offsets[row] : self.offsets[row + 1]] = np.arange(len(texts), len(texts) + len(parts))
            texts += parts
        return SegmentBatch(texts, codes, self.offsets)


def messages(column: pa.ListArray) -> list[str]:
    """Each row's text, for whoever puts it into no template: its segments joined, without the newline that ends the
    last."""
    rows = SegmentBatch.from_arrow(column).message(False, False)
    return ["".join(rows.row(index)) for index in range(len(rows.offsets) - 1)]


def _replace(texts: list[str], codes: Ints, positions: Ints, change: Callable[[str], str]) -> None:
    """Put ``change(text)`` at ``positions``, as new texts."""
    table = np.arange(len(texts))
    for code in np.unique(codes[positions]).tolist():
        changed = change(texts[code])
        if changed != texts[code]:
            table[code] = len(texts)
            texts.append(changed)
    codes[positions] = table[codes[positions]]


def _trimmed(parts: list[str], strips_start: bool, strips_end: bool) -> list[str]:
    for index in range(len(parts) - 1, -1, -1):
        if parts[index]:
            parts[index] = parts[index].rstrip() if strips_end else parts[index].removesuffix("\n")
            if parts[index] or not strips_end:
                break
    for index in range(len(parts) if strips_start else 0):
        parts[index] = parts[index].lstrip()
        if parts[index]:
            break
    return parts
