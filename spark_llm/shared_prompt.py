"""Several pairs of a join in one prompt, where ``spark.llm.join.rowsPerPrompt`` allows it: its text, and its answers.

The message shows the instruction and the fields of the left row once, then the right rows with numbers, and asks for
one line for each: ``1: answer``. What comes back is read with some tolerance for how models number lines; a row
whose answer is not sure (missing, there twice, cut off, of several lines) has none, and is asked alone.
The text of a prompt is a pure function of its rows' arguments, in their order; docs/cost-and-budgets.md shows it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from spark_llm.call import FieldSpec
from spark_llm.canonical import DIGEST_BYTES
from spark_llm.engine.service.protocol import request_rows
from spark_llm.field_text import FieldRenderer, instruction_line

_TEMPLATE = b"rows of one prompt, 1"  # another text needs another number: answers are kept under it
_FORMAT = "Answer for each of the {rows} rows on its own: {rows} lines, each a row's number, a colon and the answer.\n"
_LINE = re.compile(
    r"\s*(?:[-*•]\s+)?\**(?:row|pair|answer|item|line)?\s*[(\[#]?(?P<number>\d{1,3})[)\]]?"
    r"(?:\**[:=]\**|\**[.)]\**(?=\s|$)|\s+[-–—](?=\s)|(?<=[)\]])(?=\s))\s*(?P<answer>.*?)\s*",
    re.IGNORECASE,
)
_INNER = re.compile(r"(?:^|[\s,;|(])(\d{1,3})\s*[:.)](?=\s|$)")  # a row's number within a line


@dataclass(frozen=True, kw_only=True)
class Together:
    """How pairs of a left row share prompts.

    rows: the most of a prompt. left, right: numbers of the call's fields that all pairs of a prompt have in common, and
    of the others, in the order in which they are shown. stop: the call's stop strings, which end each answer.
    """

    rows: int
    left: tuple[int, ...]
    right: tuple[int, ...]
    stop: tuple[str, ...] = ()


def prompts(columns: Sequence[pa.Array], together: Together) -> list[list[int]]:
    """The rows of each prompt: all rows that are asked, each once.

    columns: string arrays [rows], the prompt and the fields. Rows with equal left sides stand together, by their right
    values, so that the same rows give the same prompts in whatever order they come; prompts come in the order of their
    first rows.
    """
    lists = [column.to_pylist() for column in columns]
    left = [lists[0], *(lists[1 + number] for number in together.left)]
    right = [lists[1 + number] for number in together.right]
    groups: dict[tuple[str | None, ...], list[int]] = {}
    for row, key in enumerate(zip(*left, strict=True)):
        groups.setdefault(key, []).append(row)
    found = []
    for rows in groups.values():
        rows.sort(key=lambda row: [(values[row] is None, values[row] or "") for values in right])
        found += [rows[start : start + together.rows] for start in range(0, len(rows), together.rows)]
    return found


def shared_key(keys: Sequence[bytes]) -> bytes:
    """The canonical arguments of a prompt, of those of its rows in their order."""
    return hashlib.blake2b(_TEMPLATE + b"".join(keys), digest_size=DIGEST_BYTES).digest()


def segments(
    columns: Sequence[pa.Array],
    rows: Sequence[int],
    specs: Sequence[FieldSpec],
    together: Together,
    instruction_last: bool = False,
) -> list[str]:
    """The message about ``rows``, which have one left side; cut as in spark_llm.rendering, a right row a segment."""

    def line(number: int, row: int) -> str:
        return FieldRenderer(specs[number])(columns[1 + number][row].as_py())

    instruction = [instruction_line(columns[0][rows[0]].as_py())]
    fields = [line(number, rows[0]) for number in together.left]
    fields += [
        f"{place}. " + "".join(line(number, row) for number in together.right) for place, row in enumerate(rows, 1)
    ]
    asked = _FORMAT.format(rows=len(rows))
    return [*fields, *instruction, asked] if instruction_last else [*instruction, *fields, asked]


def shared_batch(
    messages: Sequence[Sequence[str]],
    first_id: int,
    keys: Sequence[bytes] | None = None,
    seeds: Sequence[int] | None = None,
) -> pa.RecordBatch:
    """The REQUEST_SCHEMA batch of these messages, with ids from ``first_id`` on."""
    flat = pa.array([segment for message in messages for segment in message], pa.utf8()).dictionary_encode()
    offsets = np.cumsum([0, *map(len, messages)], dtype=np.int32)
    ids = pa.array(np.arange(first_id, first_id + len(messages), dtype=np.int64))
    return request_rows(ids, pa.ListArray.from_arrays(pa.array(offsets), flat), seeds=seeds, keys=keys)


def answers(text: str, rows: int, is_cut: bool, stop: Sequence[str] = ()) -> list[str | None]:
    """The answer about each of ``rows`` rows in ``text``; None for a row that has none, or none that is sure.

    is_cut: the text ends where it had to, not where the model ended it. A line without a number makes the answer before
    it unsure; numbers that begin with 0 make all so, as nobody knows which row is meant; those beyond ``rows`` do not
    count. An answer ends before the first of ``stop`` in it.
    """
    found: list[str | None] = [None] * rows
    unsure: set[int] = set()
    last = None
    for line in text.splitlines():
        if not line.strip() or line.strip().startswith("```"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            if last is not None:
                unsure.add(last)
            continue
        last = int(match["number"]) - 1
        if last < 0:
            return [None] * rows
        if last < rows:
            if found[last] is not None:
                unsure.add(last)
            found[last] = match["answer"]
    if is_cut and last is not None:
        unsure.add(last)
    for row, answer in enumerate(found):  # a line that goes on with the answers about other rows
        if answer and any(0 < int(n) <= rows and found[int(n) - 1] is None for n in _INNER.findall(answer)):
            unsure.add(row)
    return [None if row in unsure or not answer else _ended(answer, stop) for row, answer in enumerate(found)]


def _ended(answer: str, stop: Sequence[str]) -> str:
    return answer[: min((place for each in stop if (place := answer.find(each)) >= 0), default=len(answer))].strip()
