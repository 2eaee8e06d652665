"""The prompts of a call in a task: what is sent for rows, alone or several together, and what is not answered yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_llm.answer_form import row_choices
from spark_llm.canonical import row_keys, row_seed
from spark_llm.optimizer.reorder.hashing import hash_values
from spark_llm.optimizer.reorder.window import prefix_order
from spark_llm.rendering import render, request_batch
from spark_llm.shared_prompt import prompts, segments, shared_batch, shared_key

if TYPE_CHECKING:
    from spark_llm.asking import AnswerSettings
    from spark_llm.engine.service.answers import AnswerSource

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.object_]
Request = TypeVar("Request")


@dataclass(slots=True, eq=False)
class Prompt(Generic[Request]):
    """What was sent: a request alone, or several together; then ``columns`` and ``keys`` have their arguments.

    choices: the row's own, where rows have them.
    """

    requests: list[Request]
    columns: list[pa.Array] | None = None
    keys: Keys | None = None
    choices: Sequence[str] = ()

    def part(self, rows: Sequence[int]) -> tuple[list[pa.Array], list[Request], Keys]:
        """Some of several rows: their columns, requests and keys."""
        assert self.columns is not None
        assert self.keys is not None
        taken = [column.take(pa.array(rows)) for column in self.columns]
        return taken, [self.requests[row] for row in rows], self.keys[list(rows)]


class Prompts(Generic[Request]):
    """Sends a call's rows to the engine. ``sent``: the prompts without an answer by id, the oldest first."""

    def __init__(
        self,
        settings: AnswerSettings,
        open_stream: Callable[[], AnswerSource],
        open_shared: Callable[[], AnswerSource] | None,
    ) -> None:
        self.sent: dict[int, Prompt[Request]] = {}
        self._settings = settings
        self._open = {False: open_stream, True: open_shared or open_stream}
        self._streams: dict[bool, AnswerSource] = {}  # by whether prompts have several rows
        self._next_id = 0

    def receive(self) -> pa.RecordBatch:
        """The next answers on the stream of the oldest prompt; there must be one."""
        oldest = next(iter(self.sent.values()))
        batch = self._streams[oldest.columns is not None].receive()
        assert batch is not None, "the stream knows of no open row, but rows are open"
        return batch

    def close(self) -> None:
        """Close the streams."""
        while self._streams:
            self._streams.popitem()[1].close()

    def send(self, columns: Sequence[pa.Array], requests: Sequence[Request], keys: Keys) -> None:
        """Ask for rows, which share prompts if they may. keys: their canonical arguments."""
        together = self._settings.together
        if together is None:
            self.send_alone(columns, requests, keys)
            return
        groups = prompts(columns, together)
        if alone := [rows[0] for rows in groups if len(rows) == 1]:
            taken = [column.take(pa.array(alone)) for column in columns]
            self.send_alone(taken, [requests[row] for row in alone], keys[alone])
        self._send_together(columns, requests, keys, [rows for rows in groups if len(rows) > 1])

    def _send_together(
        self, columns: Sequence[pa.Array], requests: Sequence[Request], keys: Keys, groups: list[list[int]]
    ) -> None:
        """Ask for rows in the prompts ``groups``, in prefix order."""
        settings, together = self._settings, self._settings.together
        assert together is not None
        if not groups:
            return
        written = [segments(columns, rows, settings.fields, together, settings.instruction_last) for rows in groups]
        order = sorted(range(len(groups)), key=written.__getitem__)
        groups = [groups[number] for number in order]
        seeds = None
        if settings.seed is not None:
            drawn = row_keys(columns, settings.drawn)
            seeds = [row_seed(settings.seed, shared_key([drawn[row] for row in rows])) for rows in groups]
        batch = shared_batch(
            [written[number] for number in order],
            self._next_id,
            keys=[shared_key(keys[rows].tolist()) for rows in groups] if settings.fold else None,
            seeds=seeds,
        )
        sent = [
            Prompt([requests[row] for row in rows], [column.take(pa.array(rows)) for column in columns], keys[rows])
            for rows in groups
        ]
        self._put(batch, sent, True)

    def send_alone(self, columns: Sequence[pa.Array], requests: Sequence[Request], keys: Keys) -> None:
        """Ask for rows in prefix order, each in a prompt of its own."""
        settings = self._settings
        orders = None
        if settings.order is not None and len(columns) > 1:
            orders = settings.order.orders(np.stack([hash_values(column) for column in columns[1:]], axis=1))
        rendered = render(columns[0], columns[1:], settings.fields, orders, settings.instruction_last)
        order = prefix_order(rendered.codes)
        choices = self._choices(columns, order)
        batch = request_batch(
            rendered,
            order,
            self._next_id,
            keys=keys[order].tolist() if settings.fold else None,
            seeds=self._seeds(columns, order),
            choices=choices,
        )
        sent = [
            Prompt([requests[row]], choices=own)
            for row, own in zip(order.tolist(), choices or [()] * len(order), strict=True)
        ]
        self._put(batch, sent, False)

    def _put(self, batch: pa.RecordBatch, sent: list[Prompt[Request]], is_shared: bool) -> None:
        self.sent.update(enumerate(sent, self._next_id))
        self._next_id += len(sent)
        if is_shared not in self._streams:
            self._streams[is_shared] = self._open[is_shared]()
        self._streams[is_shared].send(batch)

    def _choices(self, columns: Sequence[pa.Array], order: Ints) -> list[tuple[str, ...]] | None:
        """The choices of each row, in this order, where rows have their own."""
        form = self._settings.form
        if form is None or form.field is None:
            return None
        return [row_choices(text) for text in columns[1 + form.field].take(pa.array(order)).to_pylist()]

    def _seeds(self, columns: Sequence[pa.Array], order: Ints) -> list[int] | None:
        """For draws that repeat, the seed of each row, in this order."""
        seed = self._settings.seed
        if seed is None:
            return None
        keys = row_keys(columns, self._settings.drawn)
        return [row_seed(seed, keys[row]) for row in order.tolist()]

    def split(self, prompt: Prompt[Request]) -> None:
        """Ask for the rows of a prompt that failed, one that is too long for example, in two, or each alone."""
        assert prompt.columns is not None
        assert prompt.keys is not None
        rows = list(range(len(prompt.requests)))
        middle = (len(rows) + 1) // 2
        if middle > 1:
            halves = [half for half in (rows[:middle], rows[middle:]) if len(half) > 1]
            self._send_together(prompt.columns, prompt.requests, prompt.keys, halves)
            rows = rows[middle:] if len(rows) == middle + 1 else []
        if rows:
            self.send_alone(*prompt.part(rows))
