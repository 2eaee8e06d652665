"""Several calls a window: siblings, conditions that drop rows between stages, masks, limits and budgets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.answering import Answering, Flow, RowSource
from spark_llm.asking import AnswerSettings, Asker
from spark_llm.call import FieldSpec
from spark_llm.condition import judge
from spark_llm.engine.service.client import LimitReached
from spark_llm.engine.service.protocol import ANSWER_SCHEMA
from spark_llm.errors import LlmError
from spark_llm.first_match import FirstMatches
from spark_llm.predicate_order import PredicateOrder, predicate_order

OVER_BUDGET = str(LlmError("LLM_BUDGET_EXCEEDED", key="spark.llm.budget.maxCalls", limit="9", spent="10 calls"))

Row = tuple[str | None, bool | None]  # a field and a mask


class FakeEngine:
    """Answers "<prompt>: <value>" in a random order; counts hits as the real engine does, one window at a time.

    answer: (prompt, value) -> text. budget: how many rows are answered in all. tokens: of each prompt, by its text.
    """

    def __init__(
        self,
        answer: Callable[[str, str], str] = lambda prompt, value: f"{prompt}: {value}",
        seed: int = 0,
        budget: int = 1_000_000,
        tokens: dict[str, int] | None = None,
    ) -> None:
        self.answer = answer
        self.random = random.Random(seed)
        self.budget = budget
        self.tokens = tokens or {}
        self.asked: list[tuple[str, str]] = []
        self.streams: list[FakeStream] = []
        self.most_waiting = 0
        self.grants: list[tuple[int, int, bool]] = []
        self.stopped = False

    def open(self) -> Any:
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def limited(self, limit: int) -> Callable[[int, int, bool], int]:
        """Windows of 1, 2, 4 ... until ``limit`` hits have been told of."""

        def grant(rows: int, hits: int, ended: bool) -> int:
            self.grants.append((rows, hits, ended))
            self.stopped = self.stopped or hits >= limit
            return 0 if self.stopped else int(2 ** sum(not told[2] for told in self.grants[:-1]))

        return grant


class FakeStream:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.waiting: list[tuple[int, str, str]] = []
        self.closed = 0

    def send(self, batch: pa.RecordBatch) -> None:
        assert not self.closed
        for number, segments in zip(batch["id"].to_pylist(), batch["segments"].to_pylist(), strict=True):
            prompt, value = "".join(segments).removesuffix("\n").split("\nf: ")
            value = value.strip('"')  # of texts that look like numbers
            self.engine.asked.append((prompt, value))
            self.waiting.append((number, prompt, value))
        self.engine.most_waiting = max(self.engine.most_waiting, len(self.waiting))

    def receive(self) -> pa.RecordBatch:
        assert self.waiting, "nothing is asked: the real stream would return None"
        if self.engine.stopped:
            raise LimitReached
        self.engine.random.shuffle(self.waiting)
        rows = []
        for _ in range(self.engine.random.randint(1, len(self.waiting))):
            number, prompt, value = self.waiting.pop()
            self.engine.budget -= 1
            error = OVER_BUDGET if self.engine.budget < 0 else None
            tokens = self.engine.tokens.get(prompt, 10)
            counts = {field.name: 0 for field in ANSWER_SCHEMA if field.type == pa.int64()}
            rows.append(
                counts
                | {
                    "id": number,
                    "text": None if error else self.engine.answer(prompt, value),
                    "finish_reason": "error" if error else "stop",
                    "error": error,
                    "prompt_tokens": 0 if error else tokens,
                    "computed_tokens": 0 if error else tokens,
                    "folded": value.startswith("folded"),
                    "stored": value.startswith("stored"),
                }
            )
        return pa.RecordBatch.from_pylist(rows, ANSWER_SCHEMA)

    def close(self) -> None:
        self.closed += 1


def group(
    engine: FakeEngine, calls: int, masked: bool = False, fold: bool = True, partial: bool = True, **flow: Any
) -> Answering:
    """Calls with the prompts p0, p1 ... over one field, and one mask where ``masked``."""
    askers = []
    for call in range(calls):
        settings = AnswerSettings(
            fields=(FieldSpec("f"),),
            window_rows=flow.setdefault("window_rows", 4),
            fold=fold,
            columns=(call, calls, calls + 1) if masked else (call, calls),
            masked=masked,
            call=b"%d" % call,
            partial=partial,
        )
        askers.append(Asker(settings, engine.open))
    return Answering(askers, Flow(**({"windows_in_flight": 2} | flow)))


def run(
    answering: Answering, rows: Sequence[Row], batch: int = 5, lefts: Sequence[int] | None = None
) -> list[tuple[str | None, ...]]:
    """The answers of each row. lefts: of each row the left row whose pair it is."""
    calls = len(answering.askers)

    def batches() -> Iterator[list[pa.Array]]:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            prompts = [pa.array([f"p{call}"] * len(part)) for call in range(calls)]
            yield [
                *prompts,
                pa.array([row[0] for row in part], pa.utf8()),
                pa.array([row[1] for row in part], pa.bool_()),
                *([] if lefts is None else [pa.array(lefts[start : start + batch], pa.int64())]),
            ]

    found = []
    for window in answering.run(RowSource(batches())):
        found += list(zip(*(texts.tolist() for texts in window), strict=True))
    for asker in answering.askers:
        counts = asker.counts
        assert counts.rows == len(rows) == answering.read
        asked = counts.calls + counts.duplicates + counts.stored + counts.failed + counts.over_budget
        assert counts.rows == asked + counts.nulls + counts.skipped
    return found


def values(rows: int) -> list[Row]:
    return [(str(number), True) for number in range(rows)]


fields = st.one_of(st.none(), st.sampled_from("abcdefgh"))
tables = st.lists(st.tuples(fields, st.sampled_from([True, False, None])), max_size=40)


@given(
    rows=tables,
    calls=st.integers(1, 3),
    masked=st.booleans(),
    window_rows=st.integers(1, 6),
    in_flight=st.integers(1, 3),
    batch=st.integers(1, 9),
    seed=st.integers(0, 50),
)
@settings(deadline=None)
def test_siblings_answer_every_row_that_their_mask_leaves(
    rows: list[Row], calls: int, masked: bool, window_rows: int, in_flight: int, batch: int, seed: int
) -> None:
    engine = FakeEngine(seed=seed)
    answering = group(engine, calls, masked, window_rows=window_rows, windows_in_flight=in_flight)
    expected = [
        tuple(f"p{call}: {value}" if value is not None and (mask or not masked) else None for call in range(calls))
        for value, mask in rows
    ]
    assert run(answering, rows, batch) == expected
    counts = answering.askers[0].counts
    assert counts.skipped == (sum(not mask for _, mask in rows) if masked else 0)
    assert counts.nulls == sum(value is None and bool(mask or not masked) for value, mask in rows)
    assert engine.most_waiting <= window_rows * in_flight
    assert all(stream.closed for stream in engine.streams)


def test_rows_that_no_mask_lets_through_need_no_engine() -> None:
    engine = FakeEngine()
    assert run(group(engine, 2, masked=True), [("a", False), ("b", None)]) == [(None, None)] * 2
    assert engine.streams == []


def test_siblings_of_a_window_are_asked_before_the_first_is_awaited() -> None:
    engine = FakeEngine()
    answering = group(engine, 3, windows_in_flight=1)
    outputs = answering.run(
        RowSource([[*(pa.array([f"p{call}"]) for call in range(3)), pa.array(["a"]), pa.array([True])]])
    )
    next(outputs)
    assert [prompt for prompt, _ in engine.asked] == ["p0", "p1", "p2"]


def says_yes(*shares: int) -> Callable[[str, str], str]:
    """Call i says yes to the values that shares[i] divides."""
    return lambda prompt, value: "yes" if int(value) % shares[int(prompt[1:])] == 0 else "no"


def all_yes(calls: int) -> list[Any]:
    return [["=", ["answer", call], ["literal", "yes"]] for call in range(calls)]


condition_trees = st.sampled_from(
    [
        all_yes(1),
        all_yes(2),
        all_yes(3),
        [["or", *all_yes(2)]],
        [["or", *all_yes(2)], ["not", all_yes(3)[2]]],
        [["isnull", ["answer", 0]]],
        [["and", *all_yes(3)]],
        [["=", ["answer", 0], ["answer", 1]]],
    ]
)


@given(
    rows=st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 30).map(str)), st.booleans()), max_size=60),
    conditions=condition_trees,
    shares=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    masked=st.booleans(),
    window_rows=st.integers(1, 9),
    sharers=st.sampled_from([1, 16]),
    seed=st.integers(0, 20),
)
@settings(deadline=None)
def test_rows_that_meet_the_conditions_have_all_answers_and_others_cannot_meet_them(
    rows: list[Row],
    conditions: list[Any],
    shares: tuple[int, ...],
    masked: bool,
    window_rows: int,
    sharers: int,
    seed: int,
) -> None:
    answer = says_yes(*shares)
    engine = FakeEngine(answer, seed)
    answering = group(
        engine, 3, masked, window_rows=window_rows, conditions=conditions, order=PredicateOrder(3, sharers)
    )
    found = run(answering, rows)
    known = [True] * 3
    for (value, mask), answers in zip(rows, found, strict=True):
        asks = value is not None and (mask or not masked)
        full = [answer(f"p{call}", value) if asks else None for call in range(3)]  # type: ignore[arg-type]
        if judge(conditions, full, known):
            assert list(answers) == full
        else:
            assert not judge(conditions, answers, known)  # as Spark's filter above sees them
            assert all(ours in (None, theirs) for ours, theirs in zip(answers, full, strict=True))
    assert len(engine.asked) == len(set(engine.asked)) or window_rows < 8


def least(rows: int, order: Sequence[int], shares: Sequence[int]) -> int:
    """Calls that asking in this order takes."""
    alive, calls = list(range(rows)), 0
    for call in order:
        calls += len(alive)
        alive = [value for value in alive if value % shares[call] == 0]
    return calls


@pytest.mark.parametrize("shares", [(1, 20), (20, 1), (2, 3, 30), (1, 1, 50), (30, 1, 2)])
def test_the_order_of_least_calls_is_found_within_64_calls(shares: tuple[int, ...]) -> None:
    engine = FakeEngine(says_yes(*shares))
    calls = len(shares)
    answering = group(engine, calls, window_rows=32, conditions=all_yes(calls), order=PredicateOrder(calls))
    run(answering, values(2000))
    best = least(2000, sorted(range(calls), key=lambda call: -shares[call]), shares)
    assert len(engine.asked) <= best + 64


def test_what_a_dropped_row_costs_decides() -> None:
    """p0 drops two thirds for 1000 tokens a row, p1 half for 10."""
    engine = FakeEngine(says_yes(3, 2), tokens={"p0": 1000})
    answering = group(engine, 2, window_rows=32, conditions=all_yes(2), order=PredicateOrder(2))
    run(answering, values(1000))
    asked = [prompt for prompt, _ in engine.asked]
    assert asked.count("p1") > 950
    assert asked.count("p0") < 550


def test_later_tasks_of_a_query_go_on_with_what_is_known() -> None:
    calls = []
    for query in ("q1", "q1", "q2"):
        engine = FakeEngine(says_yes(1, 50))
        order = predicate_order((query, "test"), 2)
        run(group(engine, 2, window_rows=32, conditions=all_yes(2), order=order), values(500))
        calls.append(len(engine.asked))
    assert calls[0] == calls[2] > calls[1] == least(500, (1, 0), (1, 50))


def test_rows_whose_arguments_are_null_are_judged_before_anything_is_asked() -> None:
    engine = FakeEngine()
    answering = group(engine, 2, conditions=all_yes(2), order=PredicateOrder(2))
    assert run(answering, [(None, True)] * 10) == [(None, None)] * 10
    assert engine.streams == []


def bound(rows: int, share: int, limit: int) -> int:
    """Twice the rows up to the hit that is the last one needed."""
    hits = [value for value in range(rows) if value % share == 0]
    return 2 * (hits[limit - 1] + 1) if len(hits) >= limit else rows


@pytest.mark.parametrize(("share", "limit"), [(1, 1), (1, 5), (7, 3), (50, 2), (3, 1000)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_limit_asks_windows_that_grow_until_there_are_enough_hits(share: int, limit: int, masked: bool) -> None:
    engine = FakeEngine(says_yes(share))
    answering = group(engine, 1, masked, window_rows=64, conditions=all_yes(1), grant=engine.limited(limit))
    found = run(answering, values(200), batch=17)
    assert len(engine.asked) <= bound(200, share, limit)
    hits = [row for row, (text,) in enumerate(found) if text == "yes"]
    assert hits[:limit] == [row for row in range(200) if row % share == 0][:limit]
    told = [grant for grant in engine.grants if not grant[2]]
    assert [rows for rows, _, _ in told[:4]] == [0, 1, 3, 7][: len(told)]
    if not engine.stopped:
        assert engine.grants[-1] == (200, len(hits), True)
    assert answering.askers[0].counts.skipped == 200 - len(engine.asked)


def test_a_limit_without_conditions_counts_no_hits() -> None:
    engine = FakeEngine()
    run(group(engine, 1, grant=engine.limited(3)), values(40))
    assert {hits for _, hits, _ in engine.grants} == {0}
    assert len(engine.asked) == 40


def test_a_limit_and_several_conditions() -> None:
    engine = FakeEngine(says_yes(2, 3))
    order = PredicateOrder(2)
    answering = group(engine, 2, window_rows=64, conditions=all_yes(2), order=order, grant=engine.limited(4))
    found = run(answering, values(300))
    assert [row for row, texts in enumerate(found) if texts == ("yes", "yes")][:4] == [0, 6, 12, 18]
    assert len(engine.asked) < 100


def test_a_stop_of_the_engine_leaves_open_rows_null_and_ends_the_asking() -> None:
    engine = FakeEngine()
    answering = group(engine, 2, conditions=[["isnotnull", ["answer", 0]]], grant=engine.limited(1000))
    outputs = answering.run(
        RowSource([[pa.array(["p0"] * 9), pa.array(["p1"] * 9), pa.array(list("abcdefghi")), pa.nulls(9, pa.bool_())]])
    )
    assert [texts.tolist() for texts in next(outputs)] == [["p0: a"], ["p1: a"]]
    engine.stopped = True  # by hits of other tasks, which this one hears of with its next answers
    engine.limited = None  # type: ignore[assignment,method-assign]
    rest = [list(zip(*(texts.tolist() for texts in window), strict=True)) for window in outputs]
    assert [row for window in rest for row in window] == [(None, None)] * 8
    assert answering.askers[0].counts.skipped == 8
    assert all(stream.closed for stream in engine.streams)


def test_windows_under_a_limit_are_handed_out_before_the_next_is_asked() -> None:
    engine = FakeEngine(says_yes(1))
    answering = group(engine, 1, conditions=all_yes(1), grant=engine.limited(100))
    seen: list[int] = []
    answering.on_wait = lambda: seen.append(answering.askers[0].counts.rows)
    source = RowSource([[pa.array(["p0"] * 15), pa.array([str(row) for row in range(15)]), pa.nulls(15, pa.bool_())]])
    for _ in answering.run(source):
        assert len(engine.asked) == answering.askers[0].counts.rows
    assert sorted(set(seen)) == [0, 1, 3, 7, 11, 15]


def test_rows_beyond_the_budget_are_null_and_counted_apart() -> None:
    engine = FakeEngine(budget=6)
    answering = group(engine, 1, window_rows=5)
    rows: list[Row] = [(value, True) for value in "abcdefgh"]
    found = run(answering, [*rows, *rows])
    counts = answering.askers[0].counts
    assert sum(text is None for (text,) in found) == counts.over_budget
    assert (counts.calls, counts.failed, counts.errors) == (6, 0, [])


def test_rows_beyond_the_budget_fail_the_query_with_the_budgets_own_error() -> None:
    engine = FakeEngine(budget=2)
    with pytest.raises(LlmError) as raised:
        run(group(engine, 1, partial=False), values(9))
    assert str(raised.value) == OVER_BUDGET
    assert raised.value.parameters["limit"] == "9"
    assert all(stream.closed for stream in engine.streams)


def test_answers_of_the_result_cache_and_of_other_tasks_are_no_calls() -> None:
    engine = FakeEngine()
    answering = group(engine, 1)
    run(answering, [("stored1", True), ("folded1", True), ("x", True), ("stored1", True)])
    counts = answering.askers[0].counts
    assert (counts.calls, counts.stored, counts.duplicates) == (1, 1, 2)


def test_a_group_tells_how_far_each_call_is() -> None:
    engine = FakeEngine(says_yes(1, 2))
    answering = group(engine, 2, conditions=all_yes(2), order=PredicateOrder(2))
    seen: list[tuple[int, int]] = []
    answering.on_progress = lambda is_due: seen.append((answering.answered(0), answering.answered(1)))
    run(answering, values(20))
    assert seen[-1] == (20, 20)
    assert all(0 <= part <= 20 for told in seen for part in told)


@given(
    lefts=st.lists(st.integers(0, 5), max_size=80),
    is_by_left=st.booleans(),
    nulls=st.sets(st.integers(0, 80)),
    hidden=st.sets(st.integers(0, 80)),
    shares=st.tuples(st.integers(1, 12), st.integers(1, 3)),
    calls=st.integers(1, 2),
    window_rows=st.integers(1, 30),
    in_flight=st.integers(1, 3),
    seed=st.integers(0, 20),
)
@settings(deadline=None)
def test_pairs_are_asked_until_one_of_their_left_row_matches(
    lefts: list[int],
    is_by_left: bool,
    nulls: set[int],
    hidden: set[int],
    shares: tuple[int, int],
    calls: int,
    window_rows: int,
    in_flight: int,
    seed: int,
) -> None:
    """The left rows with a match are those that asking all pairs finds, within the bound of first_match.py."""
    lefts = sorted(lefts) if is_by_left else lefts
    rows: list[Row] = [(None if n in nulls else str(n), n not in hidden) for n in range(len(lefts))]
    answer = says_yes(*shares)
    engine = FakeEngine(answer, seed)
    answering = group(
        engine,
        calls,
        masked=True,
        window_rows=window_rows,
        windows_in_flight=in_flight,
        conditions=all_yes(calls),
        order=PredicateOrder(calls) if calls > 1 else None,
        pair=calls + 2,
    )
    found = run(answering, rows, 7, lefts)
    asked = {value for _, value in engine.asked}
    for left in set(lefts):
        pairs = [number for number in range(len(lefts)) if lefts[number] == left]
        askable = [n for n in pairs if n not in nulls and n not in hidden]
        matches = [n for n in askable if all(answer(f"p{call}", str(n)) == "yes" for call in range(calls))]
        assert any(found[n] == ("yes",) * calls for n in pairs) == bool(matches)
        first = pairs.index(matches[0]) + 1 if matches else len(pairs)
        asked_here = [n for n in pairs if str(n) in asked]
        assert len(asked_here) <= 2 * first - 1
        assert set(asked_here) >= {n for n in askable if pairs.index(n) < first}
    assert len(engine.asked) == len(set(engine.asked))
    assert all(stream.closed for stream in engine.streams)


def test_left_rows_have_their_rounds_side_by_side() -> None:
    """1,000 left rows of 8 pairs, in windows of 100 pairs: what is asked first is a pair of hundreds of them."""
    engine = FakeEngine(says_yes(10_000_000))
    answering = group(engine, 1, window_rows=100, windows_in_flight=4, conditions=all_yes(1), pair=3)
    pairs: list[Row] = [(str(1 + number), True) for number in range(8000)]
    run(answering, pairs, 1000, [number // 8 for number in range(8000)])
    assert len(engine.asked) == 8000
    assert len({(int(value) - 1) // 8 for _, value in engine.asked[:250]}) == 250


@given(st.data(), st.integers(1, 3))
def test_a_task_that_forgets_left_rows_gets_all_windows_done(data: st.DataObject, remembered: int) -> None:
    matches = FirstMatches(remembered=remembered)
    ids = st.lists(st.integers(0, 5), min_size=1, max_size=6)
    windows = [matches.window(np.array(drawn)) for drawn in data.draw(st.lists(ids, min_size=2, max_size=5))]
    alive = [np.ones(len(window.left), np.bool_) for window in windows]
    asked: dict[int, np.ndarray] = {}
    for _ in range(200):
        for number, window in enumerate(windows):
            if number not in asked and window.stuck != matches.changes:
                turn = matches.next_round(window, alive[number])
                if turn.any():
                    asked[number] = turn
        waiting = [n for n, window in enumerate(windows) if (alive[n] & ~window.had).any() or n in asked]
        if not waiting:
            return
        assert asked, "windows wait for each other"
        number = data.draw(st.sampled_from(sorted(asked)))
        hits = np.flatnonzero(asked.pop(number) & alive[number])
        if len(hits) and data.draw(st.booleans()):
            matches.found(windows[number], hits[:1], alive[number])
    raise AssertionError("never done")


def test_what_a_task_forgets_of_a_left_row_is_asked_again_at_most() -> None:
    matches = FirstMatches(remembered=1)
    windows = [matches.window(np.array([1, 2, 3, 1, 2, 3])) for _ in range(2)]
    alive = [np.ones(6, np.bool_) for _ in windows]
    assert matches.next_round(windows[0], alive[0]).sum() == 3
    for _ in range(9):
        for window, left in zip(windows, alive, strict=True):
            matches.next_round(window, left)
    assert all(window.had.all() for window in windows)


def test_windows_that_wait_for_others_are_not_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 left rows in each window of 8 pairs: all windows but the first wait, and no more are read than may be."""
    looked = []
    next_round = FirstMatches.next_round
    monkeypatch.setattr(FirstMatches, "next_round", lambda *given: looked.append(given[1].number) or next_round(*given))
    engine = FakeEngine(says_yes(10_000_000), seed=3)
    answering = group(engine, 1, window_rows=8, windows_in_flight=2, conditions=all_yes(1), pair=3)
    seen = []
    answering.on_progress = lambda is_due: seen.append(answering.read - answering.askers[0].counts.rows)
    found = run(answering, [(str(1 + number), True) for number in range(800)], 100, [n % 4 for n in range(800)])
    assert {text for (text,) in found} == {"no"}
    assert max(seen) <= 4 * 8
    assert len(looked) < 8 * 100
