"""Windows in flight: rows in order, duplicates folded, NULLs, failures, and how much is asked at a time."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.answering import Answering, Flow, RowSource
from spark_llm.asking import AnswerSettings, Asker
from spark_llm.call import FieldSpec
from spark_llm.engine.service.protocol import ANSWER_SCHEMA, REQUEST_SCHEMA
from spark_llm.errors import LlmError
from spark_llm.tally import Counts


class FakeStream:
    """Answers each request with its own text in brackets, a few at a time, in an order of its own."""

    def __init__(self, seed: int = 0, most: int = 3) -> None:
        self.random = random.Random(seed)
        self.most = most
        self.waiting: list[tuple[int, str, int | None]] = []
        self.asked: list[str] = []
        self.sent: list[pa.RecordBatch] = []
        self.most_waiting = 0
        self.closed = 0

    def send(self, batch: pa.RecordBatch) -> None:
        assert batch.schema == REQUEST_SCHEMA
        assert batch.num_rows
        self.sent.append(batch)
        for number, segments, seed, *_ in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            self.asked.append("".join(segments))
            self.waiting.append((number, "".join(segments), seed))
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def receive(self) -> pa.RecordBatch:
        assert self.waiting, "nothing is asked: the real stream would block for ever"
        self.random.shuffle(self.waiting)
        rows = []
        for _ in range(min(self.random.randint(1, self.most), len(self.waiting))):
            number, text, seed = self.waiting.pop()
            fails = "fail" in text
            rows.append(
                {
                    "id": number,
                    "text": None if fails else answer(text, seed),
                    "finish_reason": "error" if fails else "stop",
                    "error": f"[LLM_X] {text.splitlines()[-1]}" if fails else None,
                    "prompt_tokens": 10,
                    "instruction_tokens": 4,
                    "cached_tokens": 7,
                    "cached_instruction_tokens": 3,
                    "computed_tokens": 3,
                    "recomputed_tokens": 1,
                    "output_tokens": 2,
                    "folded": False,
                    "stored": False,
                }
            )
        return pa.RecordBatch.from_pylist(rows, ANSWER_SCHEMA)

    def close(self) -> None:
        self.closed += 1


def answer(text: str, seed: int | None = None) -> str:
    return f"<{text}|{seed}>" if seed is not None else f"<{text}>"


def how(**changes: object) -> AnswerSettings:
    defaults: dict[str, object] = {
        "fields": (FieldSpec("f"),),
        "window_rows": 4,
        "fold": True,
    }
    return AnswerSettings(**(defaults | changes))  # type: ignore[arg-type]


def one_call(settings: AnswerSettings, open_stream: Callable[[], object], windows_in_flight: int = 2) -> Answering:
    asker = Asker(settings, open_stream)  # type: ignore[arg-type]
    return Answering([asker], Flow(window_rows=settings.window_rows, windows_in_flight=windows_in_flight))


def counts_of(answering: Answering) -> Counts:
    return answering.askers[0].counts


def batches_of(rows: list[tuple[str | None, str | None]], sizes: list[int]) -> Iterator[list[pa.Array]]:
    start = 0
    for size in [*sizes, len(rows)]:
        part = rows[start : start + size]
        yield [pa.array([row[column] for row in part], pa.utf8()) for column in range(2)]
        start += size


def run(answering: Answering, rows: list[tuple[str | None, str | None]], sizes: list[int]) -> list[str | None]:
    return [text for texts in answering.run(RowSource(batches_of(rows, sizes))) for text in texts[0]]


def expected(row: tuple[str | None, str | None]) -> str | None:
    prompt, value = row
    return None if prompt is None or value is None or "fail" in value else answer(f"{prompt}\nf: {value}\n")


values = st.sampled_from(["a", "b", "c", "d", "e", "f", "fail", None])
tables = st.lists(st.tuples(st.sampled_from(["p", "q", None]), values), max_size=60)


@given(
    rows=tables,
    sizes=st.lists(st.integers(0, 25), max_size=8),
    fold=st.booleans(),
    window_rows=st.integers(1, 9),
    in_flight=st.integers(1, 4),
    seed=st.integers(0, 100),
)
@settings(deadline=None)
def test_rows_come_back_in_order_with_their_own_answers(
    rows: list[tuple[str | None, str | None]],
    sizes: list[int],
    fold: bool,
    window_rows: int,
    in_flight: int,
    seed: int,
) -> None:
    stream = FakeStream(seed)
    answering = one_call(how(fold=fold, window_rows=window_rows), lambda: stream, in_flight)
    assert run(answering, rows, sizes) == [expected(row) for row in rows]
    counts = counts_of(answering)
    assert counts.rows == len(rows) == answering.read == answering.answered(0)
    assert counts.rows == counts.calls + counts.duplicates + counts.nulls + counts.failed
    assert (counts.stored, counts.skipped, counts.over_budget) == (0, 0, 0)
    assert counts.nulls == sum(None in row for row in rows)
    assert counts.calls + counts.failed == len(stream.asked)
    assert counts.prompt_tokens == 10 * len(stream.asked) == counts.cached_tokens + counts.computed_tokens
    assert stream.most_waiting <= window_rows * in_flight
    assert stream.closed == (1 if stream.asked else 0)
    remembered = len(set(rows)) <= 4 * window_rows
    assert not fold or counts.failed or not remembered or len(stream.asked) == len(set(stream.asked))
    if not fold:
        assert counts.duplicates == 0


def test_naive_mode_asks_row_by_row() -> None:
    stream = FakeStream()
    rows: list[tuple[str | None, str | None]] = [("p", "a"), ("p", "a"), ("p", None), ("p", "b")]
    answering = one_call(how(fold=False, window_rows=1), lambda: stream, 1)
    assert run(answering, rows, [4]) == [expected(row) for row in rows]
    assert [batch.num_rows for batch in stream.sent] == [1, 1, 1]
    assert stream.most_waiting == 1


def test_windows_are_sent_in_prefix_order() -> None:
    stream = FakeStream()
    run(one_call(how(), lambda: stream), [("q", "b"), ("p", "c"), ("q", "a"), ("p", "a")], [4])
    assert stream.asked == ["p\nf: a\n", "p\nf: c\n", "q\nf: a\n", "q\nf: b\n"]


def test_the_engine_is_opened_only_for_rows_that_need_it() -> None:
    def no_engine() -> FakeStream:
        raise AssertionError("opened")

    assert run(one_call(how(), no_engine), [], []) == []
    assert run(one_call(how(), no_engine), [(None, "a"), ("p", None)], []) == [None, None]


def test_rows_are_handed_out_before_the_input_ends() -> None:
    stream = FakeStream()
    windows = RowSource([pa.array(["p"]), pa.array([str(number)])] for number in range(100))
    answering = one_call(how(window_rows=1), lambda: stream)
    next(answering.run(windows))
    assert len(stream.asked) < 5


def test_an_early_end_closes_the_stream() -> None:
    stream = FakeStream()
    outputs = one_call(how(window_rows=1), lambda: stream).run(
        RowSource(batches_of([("p", str(number)) for number in range(20)], []))
    )
    next(outputs)
    assert stream.closed == 0
    outputs.close()
    assert stream.closed == 1


def test_a_failed_row_fails_the_query_when_asked_to() -> None:
    stream = FakeStream()
    with pytest.raises(LlmError, match=r"LLM_ROW_FAILED.*\[LLM_X\] f: fail") as raised:
        run(one_call(how(fail=True), lambda: stream), [("p", "a"), ("p", "fail")], [])
    assert raised.value.condition == "LLM_ROW_FAILED"
    assert stream.closed == 1


def test_failures_are_counted_and_sampled() -> None:
    answering = one_call(how(), FakeStream)
    rows: list[tuple[str | None, str | None]] = [("p", f"fail {number}") for number in range(50)]
    assert run(answering, rows, []) == [None] * 50
    assert counts_of(answering).failed == 50
    assert counts_of(answering).calls == 0
    assert len(counts_of(answering).errors) == 5


def test_a_failed_call_is_asked_again_for_a_later_equal_row() -> None:
    stream = FakeStream()
    rows: list[tuple[str | None, str | None]] = [("p", "fail"), ("p", "fail"), *[("p", "a")] * 8, ("p", "fail")]
    answering = one_call(how(), lambda: stream, 1)
    run(answering, rows, [])
    assert [text.count("fail") for text in stream.asked] == [0, 1, 1]
    assert counts_of(answering).duplicates == 8


def test_equal_rows_of_later_windows_share_the_call() -> None:
    stream = FakeStream()
    answering = one_call(how(), lambda: stream)
    rows: list[tuple[str | None, str | None]] = [("p", f"v{number % 3}") for number in range(1000)]
    assert run(answering, rows, [17, 0, 400]) == [expected(row) for row in rows]
    assert len(stream.asked) == 3
    assert counts_of(answering).duplicates == 997


def test_the_memory_of_earlier_answers_is_bounded() -> None:
    answering = one_call(how(), FakeStream)
    run(answering, [("p", str(number)) for number in range(1000)], [])
    assert len(answering.askers[0]._memory) <= 4 * 4


def test_seeds_travel_with_rows_and_equal_rows_still_fold() -> None:
    stream = FakeStream()
    answering = one_call(how(seed=3), lambda: stream)
    texts = run(answering, [("p", "a"), ("p", "b"), ("p", "a")], [])
    assert texts[0] == texts[2] != texts[1]
    assert len({batch["seed"][0] for batch in stream.sent} | {stream.sent[0]["seed"][1]}) == 2


def test_progress_is_told_before_a_window_is_handed_out() -> None:
    seen: list[tuple[bool, int]] = []
    answering = one_call(how(), FakeStream)
    answering.on_progress = lambda is_due: seen.append((is_due, counts_of(answering).rows))
    outputs = answering.run(RowSource(batches_of([("p", str(number)) for number in range(9)], [])))
    handed_out = 0
    for texts in outputs:
        handed_out += len(texts[0])
        assert seen[-1] == (True, handed_out)
    assert any(not is_due for is_due, _ in seen)


@given(st.lists(st.integers(0, 30), max_size=10), st.lists(st.integers(1, 12), min_size=1))
@settings(deadline=None)
def test_a_source_keeps_rows_and_fills_windows(sizes: list[int], rows: list[int]) -> None:
    numbers = list(range(sum(sizes)))
    ends = np.cumsum([0, *sizes])
    source = RowSource([pa.array(numbers[a:b], pa.int64())] for a, b in itertools.pairwise(ends))
    wanted = itertools.cycle(rows)
    windows = []
    while (window := source.take(size := next(wanted))) is not None:
        windows.append((size, window[0].to_pylist()))
    assert [number for _, window in windows for number in window] == numbers
    assert all(len(window) == size for size, window in windows[:-1])
    assert all(window for _, window in windows)


class ForgetfulStream(FakeStream):
    """Keeps no requests; each window is answered whole."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] = []
        self.peak = 0

    def send(self, batch: pa.RecordBatch) -> None:
        self.ids += batch["id"].to_pylist()

    def receive(self) -> pa.RecordBatch:
        self.peak = max(self.peak, pa.total_allocated_bytes() + tracemalloc.get_traced_memory()[0])
        ids, self.ids = self.ids, []
        counts = [0] * len(ids)
        columns = [counts if field.type == pa.int64() else ["a"] * len(ids) for field in ANSWER_SCHEMA]
        columns[ANSWER_SCHEMA.get_field_index("confidence")] = [None] * len(ids)
        columns[ANSWER_SCHEMA.get_field_index("id")] = ids
        columns[ANSWER_SCHEMA.get_field_index("error")] = [None] * len(ids)
        for name in ("folded", "stored"):
            columns[ANSWER_SCHEMA.get_field_index(name)] = [False] * len(ids)
        return pa.RecordBatch.from_arrays(
            [pa.array(column, field.type) for column, field in zip(columns, ANSWER_SCHEMA, strict=True)],
            schema=ANSWER_SCHEMA,
        )


def test_memory_is_that_of_the_windows_in_flight() -> None:
    """40 MB of rows pass through a few megabytes."""
    stream = ForgetfulStream()
    answering = one_call(how(window_rows=500), lambda: stream)

    def batches() -> Iterator[list[pa.Array]]:
        for start in range(0, 20_000, 2_000):
            values = [f"{number:07}" * 286 for number in range(start, start + 2_000)]
            yield [pa.array(["p"] * 2_000), pa.array(values)]

    tracemalloc.start()
    try:
        before = pa.total_allocated_bytes() + tracemalloc.get_traced_memory()[0]
        rows = sum(len(texts[0]) for texts in answering.run(RowSource(batches())))
    finally:
        tracemalloc.stop()
    assert rows == counts_of(answering).calls == 20_000
    assert stream.peak - before < 12 << 20
