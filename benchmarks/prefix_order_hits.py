"""What a prefix cache finds in a list of prompts, in tokens: prompts as the engine would get them, no model.

A hit is a token of a prompt's beginning that an earlier prompt begins with, too; the last token of a prompt is always
computed, as in the engine. Instruction tokens (chat template and instruction) are counted apart from data.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from sortedcontainers import SortedList

from spark_llm.call import FieldSpec
from spark_llm.engine.model.source import resolve
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.engine.text.pipeline import TextPipeline
from spark_llm.engine.text.tokenizer import load_tokenizer
from spark_llm.rendering import RenderedWindow, render, request_batch

Ints = npt.NDArray[np.int64]
TokenIds = npt.NDArray[np.int32]

CACHE_BYTES = 4 << 30  # each distinct piece is encoded once


@dataclass(frozen=True)
class Prompts:
    """Prompts in token ids, and how many leading tokens of each are instruction."""

    ids: list[TokenIds]
    instruction: Ints

    def take(self, rows: Ints) -> Prompts:
        """The prompts ``rows``, in this order."""
        return Prompts([self.ids[row] for row in rows.tolist()], self.instruction[rows])


@dataclass(frozen=True)
class Hits:
    """Tokens of some prompts, and how many of them a cache found; of both, those of instruction."""

    rows: int
    tokens: int
    instruction_tokens: int
    found: int
    instruction_found: int

    @property
    def rate(self) -> float:
        """PHR: the share of all tokens that was found."""
        return self.found / max(1, self.tokens)

    @property
    def data_rate(self) -> float:
        """The same of the tokens that are not instruction."""
        return (self.found - self.instruction_found) / max(1, self.tokens - self.instruction_tokens)

    @property
    def instruction_rate(self) -> float:
        """The same of the instruction."""
        return self.instruction_found / max(1, self.instruction_tokens)

    def __add__(self, other: Hits) -> Hits:
        return Hits(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.instruction_tokens + other.instruction_tokens,
            self.found + other.found,
            self.instruction_found + other.instruction_found,
        )


def demo_pipeline() -> TextPipeline:
    """Tokenizer and chat template of the demo model; its weights are not read."""
    return TextPipeline(load_tokenizer(resolve("default")), CACHE_BYTES)


def text_columns(frame: pd.DataFrame) -> tuple[list[pa.StringArray], list[FieldSpec]]:
    """A table's columns as the UDF gets them from Spark: strings as they are, all else as JSON text."""
    columns, specs = [], []
    for name in frame.columns:
        values = frame[name]
        is_json = not pd.api.types.is_object_dtype(values)
        if pd.api.types.is_bool_dtype(values):
            values = values.map({True: "true", False: "false"})
        elif is_json:
            values = values.map(repr)
        columns.append(pa.array(values.astype(object), pa.utf8(), from_pandas=True))
        specs.append(FieldSpec(str(name), json=is_json))
    return columns, specs


def rendered(frame: pd.DataFrame, instruction: str) -> RenderedWindow:
    """All rows of a table as one window of messages, fields in the table's order."""
    columns, specs = text_columns(frame)
    return render(pa.array([instruction] * len(frame), pa.utf8()), columns, specs)


def with_fields(window: RenderedWindow, orders: Ints) -> RenderedWindow:
    """``window`` with each row's fields in its own order; orders: int64 [rows, fields], or [fields] for all."""
    orders = np.broadcast_to(orders, window.codes[:, 1:].shape)
    codes = np.concatenate([window.codes[:, :1], np.take_along_axis(window.codes[:, 1:], orders, axis=1)], axis=1)
    return replace(window, codes=codes)


def encode(pipeline: TextPipeline, window: RenderedWindow) -> Prompts:
    """The prompts of a window's rows, as the engine makes them."""
    batch = request_batch(window, np.arange(len(window.codes)), 0)
    return Prompts(*pipeline.encode(StreamOpen(), batch))


def unbounded(prompts: Prompts) -> Hits:
    """Hits in a cache that forgets nothing: the order of the prompts makes no difference."""
    keys = [ids.astype(">i4").tobytes() for ids in prompts.ids]
    return neighbours(prompts.take(np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)))


def neighbours(prompts: Prompts) -> Hits:
    """Hits in a cache that holds one prompt, the one before."""
    shared = np.zeros(len(prompts.ids), np.int64)
    for row in range(1, len(prompts.ids)):
        shared[row] = common(prompts.ids[row - 1], prompts.ids[row])
    return summed(prompts, shared)


def summed(prompts: Prompts, shared: Ints) -> Hits:
    """The hits of prompts that share so many leading tokens with what was held."""
    lengths = np.array([len(ids) for ids in prompts.ids], np.int64)
    shared = np.minimum(shared, lengths - 1)
    return Hits(
        rows=len(lengths),
        tokens=int(lengths.sum()),
        instruction_tokens=int(prompts.instruction.sum()),
        found=int(shared.sum()),
        instruction_found=int(np.minimum(shared, prompts.instruction).sum()),
    )


def common(left: TokenIds, right: TokenIds) -> int:
    """How many leading tokens are equal."""
    shorter = min(len(left), len(right))
    differ = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differ[0]) if len(differ) else shorter


def total(parts: Sequence[Hits]) -> Hits:
    """The sum of at least one part."""
    first, *others = parts
    return sum(others, first)


def bounded(prompts: Prompts, cache_tokens: int) -> Hits:
    """Hits in a cache that holds the last prompts, as many as fit into ``cache_tokens``, in the order given."""
    keys = [ids.astype(">i4").tobytes() for ids in prompts.ids]
    rank = np.empty(len(keys), np.int64)
    rank[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    row_of = np.argsort(rank).tolist()
    held: SortedList = SortedList()
    recent: deque[int] = deque()
    room = cache_tokens
    shared = np.zeros(len(keys), np.int64)
    for row, own in enumerate(rank.tolist()):
        # of all prompts held, the two beside it in lexicographic order have the longest common beginning with it
        place = held.bisect_left(own)
        beside = [held[index] for index in (place - 1, place) if 0 <= index < len(held)]
        shared[row] = max((common(prompts.ids[row_of[other]], prompts.ids[row]) for other in beside), default=0)
        held.add(own)
        recent.append(own)
        room -= len(prompts.ids[row])
        while room < 0 and len(recent) > 1:
            oldest = recent.popleft()
            held.remove(oldest)
            room += len(prompts.ids[row_of[oldest]])
    return summed(prompts, shared)
