"""Rows that share prompts in a task: keys, seeds, faults, budgets, and how the counts add up."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.asking import AnswerSettings, Asker
from spark_llm.call import CallSpec, FieldSpec, PromptPlan, RowPlan
from spark_llm.call_settings import answer_settings, shared_header, stream_header, together
from spark_llm.canonical import row_keys
from spark_llm.config import LlmConf
from spark_llm.engine.request import Client
from spark_llm.engine.service.protocol import ANSWER_SCHEMA
from spark_llm.errors import LlmError
from spark_llm.shared_prompt import Together, shared_key

OVER_BUDGET = str(LlmError("LLM_BUDGET_EXCEEDED", key="spark.llm.budget.maxCalls", limit="9", spent="10 calls"))
TOO_LONG = "[LLM_PROMPT_TOO_LONG] too long SQLSTATE: 54000"

Pair = tuple[str | None, str | None]


class FakeStream:
    """Answers in a random order: a pair by ``answer``, several as ``tell`` says; is_shared: takes only the latter."""

    def __init__(self, engine: FakeEngine, is_shared: bool) -> None:
        self.engine = engine
        self.is_shared = is_shared
        self.waiting: list[dict[str, Any]] = []
        self.closed = 0

    def send(self, batch: pa.RecordBatch) -> None:
        for row in batch.to_pylist():
            assert row["segments"][-1].startswith("Answer for each of the ") == self.is_shared
            self.waiting.append(row)
            self.engine.sent.append(row)

    def receive(self) -> pa.RecordBatch:
        assert self.waiting
        self.engine.random.shuffle(self.waiting)
        found = []
        for _ in range(self.engine.random.randint(1, len(self.waiting))):
            row = self.waiting.pop()
            text, error, reason = self.engine.tell(row["segments"])
            counts = {field.name: 0 for field in ANSWER_SCHEMA if field.type == pa.int64()}
            found.append(
                counts
                | {"id": row["id"], "text": text, "error": error, "finish_reason": reason}
                | {"folded": False, "stored": self.engine.stored}
            )
        return pa.RecordBatch.from_pylist(found, ANSWER_SCHEMA)

    def close(self) -> None:
        self.closed += 1


def about(segments: Sequence[str]) -> list[str]:
    """What is right for each pair of a message: its right value."""
    return [segment.rpartition("r: ")[2].strip() for segment in segments if "r: " in segment]


Told = tuple[str | None, str | None, str]


def rightly(segments: Sequence[str]) -> Told:
    texts = about(segments)
    if len(texts) == 1:
        return texts[0], None, "stop"
    return "\n".join(f"{number}: {text}" for number, text in enumerate(texts, 1)), None, "stop"


class FakeEngine:
    def __init__(self, tell: Callable[[Sequence[str]], Told] = rightly, stored: bool = False) -> None:
        self.tell = tell
        self.stored = stored
        self.random = random.Random(1)
        self.sent: list[dict[str, Any]] = []
        self.streams: list[FakeStream] = []

    def open(self, is_shared: bool) -> Callable[[], Any]:
        def opened() -> Any:
            self.streams.append(FakeStream(self, is_shared))
            return self.streams[-1]

        return opened

    def ask(self, pairs: Sequence[Pair], **settings: Any) -> tuple[list[str | None], Asker]:
        own = {
            "fields": (FieldSpec("l"), FieldSpec("r")),
            "window_rows": 100,
            "fold": True,
            "call": b"call",
            "together": Together(rows=3, left=(0,), right=(1,)),
        }
        asker = Asker(AnswerSettings(**(own | settings)), self.open(False), self.open(True))  # type: ignore[arg-type]
        rows = asker.rows(columns(pairs))
        asker.ask(rows, np.ones(len(pairs), np.bool_))
        while rows.open:
            asker.receive()
        asker.count(rows)
        assert asker.unanswered == 0
        counts = asker.counts
        found = counts.calls + counts.shared + counts.duplicates + counts.stored + counts.nulls + counts.failed
        assert counts.rows + counts.asked_again == found + counts.over_budget + counts.skipped
        return rows.texts().tolist(), asker


def columns(pairs: Sequence[Pair]) -> list[pa.Array]:
    left, right = zip(*pairs, strict=True)
    return [pa.array(["p"] * len(pairs)), pa.array(left, pa.utf8()), pa.array(right, pa.utf8())]


def pairs(left: str, rights: str) -> list[Pair]:
    return [(left, right) for right in rights]


value = st.one_of(st.none(), st.sampled_from("abcdef"))


@settings(deadline=None)  # the first example imports what is slow
@given(st.lists(st.tuples(value, value), min_size=1, max_size=30), st.data())
def test_whatever_comes_back_each_row_has_its_answer(rows: list[Pair], data: st.DataObject) -> None:
    def badly(segments: Sequence[str]) -> Told:
        text, _, _ = rightly(segments)
        assert text is not None
        if len(about(segments)) == 1:
            return text, None, "stop"
        lines = text.splitlines()
        fault = data.draw(st.sampled_from(["none", "lost", "twice", "cut", "error", "all"]))
        place = data.draw(st.integers(0, len(lines) - 1))
        if fault == "error":
            return None, TOO_LONG, "error"
        if fault == "lost":
            lines.pop(place)
        if fault == "twice":
            lines.insert(place, lines[place])
        return "" if fault == "all" else "\n".join(lines), None, "length" if fault == "cut" else "stop"

    found, _ = FakeEngine(badly).ask(rows)
    expected = [None if left is None and right is None else right or "null" for left, right in rows]
    assert found == expected


def test_a_prompt_with_several_rows_has_a_key_of_its_own() -> None:
    engine = FakeEngine()
    rows = [*pairs("x", "abcd"), ("y", "a")]
    engine.ask(rows)
    keys = dict(zip(rows, row_keys(columns(rows), b"call"), strict=True))
    expected = {shared_key([keys["x", right] for right in "abc"]), keys["x", "d"], keys["y", "a"]}
    assert {row["key"] for row in engine.sent} == expected
    again = FakeEngine()
    again.ask(rows[::-1])
    assert {row["key"] for row in again.sent} == expected


def test_equal_pairs_are_shown_once_unless_nothing_folds() -> None:
    rows = pairs("x", "aab")
    engine = FakeEngine()
    assert engine.ask(rows)[0] == ["a", "a", "b"]
    assert [about(row["segments"]) for row in engine.sent] == [["a", "b"]]
    engine = FakeEngine()
    assert engine.ask(rows, fold=False)[0] == ["a", "a", "b"]
    assert [about(row["segments"]) for row in engine.sent] == [["a", "a", "b"]]
    assert engine.sent[0]["key"] is None


def test_draws_that_repeat_have_a_seed_for_each_prompt() -> None:
    engines = [FakeEngine(), FakeEngine(), FakeEngine()]
    for engine, rights in zip(engines, ("abc", "cba", "abd"), strict=True):
        engine.ask(pairs("x", rights), seed=7, drawn=b"drawn")
    seeds = [engine.sent[0]["seed"] for engine in engines]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_stored_prompt_answers_all_its_rows_from_the_cache() -> None:
    _, asker = FakeEngine(stored=True).ask(pairs("x", "abcde"))
    assert (asker.counts.stored, asker.counts.calls, asker.counts.shared) == (5, 0, 0)


def test_prompts_that_are_too_long_are_split_and_nothing_counts_as_asked_again() -> None:
    def short(segments: Sequence[str]) -> Told:
        return (None, TOO_LONG, "error") if len(about(segments)) > 2 else rightly(segments)

    engine = FakeEngine(short)
    found, asker = engine.ask(pairs("x", "abcdefg"), together=Together(rows=7, left=(0,), right=(1,)))
    assert found == list("abcdefg")
    assert (asker.counts.calls, asker.counts.shared, asker.counts.asked_again, asker.counts.failed) == (4, 3, 0, 0)


def test_all_rows_of_a_prompt_beyond_the_budget_are_null() -> None:
    found, asker = FakeEngine(lambda segments: (None, OVER_BUDGET, "error")).ask(pairs("x", "abcd"), partial=True)
    assert found == [None] * 4
    assert asker.counts.over_budget == 4
    with pytest.raises(LlmError, match="LLM_BUDGET_EXCEEDED"):
        FakeEngine(lambda segments: (None, OVER_BUDGET, "error")).ask(pairs("x", "abcd"))


def test_a_task_that_has_enough_leaves_both_streams() -> None:
    engine = FakeEngine()
    own = AnswerSettings(
        fields=(FieldSpec("l"), FieldSpec("r")),
        window_rows=9,
        fold=True,
        together=Together(rows=3, left=(0,), right=(1,)),
    )
    asker = Asker(own, engine.open(False), engine.open(True))
    rows = asker.rows(columns([*pairs("x", "abc"), ("y", "a")]))
    asker.ask(rows, np.ones(4, np.bool_))
    asker.stop()
    assert (rows.open, asker.unanswered) == (0, 0)
    assert [stream.closed for stream in engine.streams] == [1, 1]
    asker.count(rows)
    assert asker.counts.skipped == 4


# Specs


def test_a_pair_asked_alone_is_known_as_without_shared_prompts() -> None:
    plain = CallSpec(fields=(FieldSpec("l"), FieldSpec("r")), prompt=PromptPlan(fields=(1, 0)))
    shared = CallSpec(fields=plain.fields, prompt=PromptPlan(fields=(1, 0), rows=4, left=(1,)))
    assert (plain.canonical(), plain.drawn()) == (shared.canonical(), shared.drawn())
    assert CallSpec.decode(shared.encode()) == shared
    assert together(plain) is None
    assert together(shared) == Together(rows=4, left=(1,), right=(0,))
    assert answer_settings(shared, LlmConf(), {}).together == together(shared)


def test_the_stream_for_several_rows_has_room_for_all_answers_and_no_stop_strings() -> None:
    plan = PromptPlan(rows=4, left=(0,), instruction_last=True, later_calls=1)
    spec = CallSpec(fields=(FieldSpec("l"), FieldSpec("r")), stop=(";",), max_tokens=3, prompt=plan, rows=RowPlan())
    one = stream_header(spec, LlmConf(), Client("", "7"), "n", 5)
    found = shared_header(one, plan)
    assert found.params.max_tokens == plan.most_output(3)
    assert (found.params.stop, one.params.stop) == ((), (";",))
    assert (found.node, found.limit, found.query, found.instruction_segments) == ("n", 5, "7", 0)
    assert (found.later_calls, found.shared_segments) == (0, 0)
