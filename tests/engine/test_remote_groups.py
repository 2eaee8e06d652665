"""Windows as runs of rows that share segments, and which of these prefixes an engine's cache has evicted."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.prefix import shared_with_next
from spark_llm.engine.request import TokenIds
from spark_llm.engine.service.dispatch_groups import SegmentTable, part
from spark_llm.engine.service.dispatch_held import Held
from spark_llm.engine.service.protocol import REQUEST_SCHEMA, request_rows
from spark_llm.engine.service.routing import path_of

SEGMENTS = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=40).map(sorted)


def batch(rows: list[list[str]]) -> pa.RecordBatch:
    return request_rows(range(len(rows)), pa.array(rows, REQUEST_SCHEMA.field("segments").type))


def blocks(row: list[str]) -> list[int]:
    return [block.hash for block in path_of(row, [1] * len(row), SegmentTable.of(batch([row]), None).start)]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(SEGMENTS)
def test_runs_are_all_rows_in_order_and_share_their_path(rows: list[list[str]]) -> None:
    runs = SegmentTable.of(batch(rows), None).runs()
    assert [row for run in runs for row in range(run.start, run.end)] == list(range(len(rows)))
    for run in runs:
        for row in range(run.start, run.end):
            assert [block.hash for block in run.path] == blocks(rows[row])[: len(run.path)]


@settings(derandomize=True, max_examples=40, deadline=None)
@given(SEGMENTS, st.data())
def test_a_part_has_its_rows_and_their_segments_only(rows: list[list[str]], data: st.DataObject) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    own = part(batch(rows), np.array(chosen))
    assert own.schema == REQUEST_SCHEMA
    assert own.column("id").to_pylist() == chosen
    assert own.column("segments").to_pylist() == [rows[row] for row in chosen]
    assert set(own.column("segments").values.dictionary.to_pylist()) == {text for row in chosen for text in rows[row]}


def test_a_slice_of_a_batch_is_read_as_it_is() -> None:
    rows = [["i", f"g{k // 3}", str(k)] for k in range(12)]
    table = SegmentTable.of(batch(rows).slice(3, 6), None)
    assert table.shared.tolist() == [2, 2, 1, 2, 2]
    assert [(run.start, run.end) for run in table.runs()] == [(0, 3), (3, 6)]


def test_what_rows_cost_beyond_their_path_counts_what_neighbours_share_once() -> None:
    text = {name: name * 4 * tokens for name, tokens in {"i": 10, "g": 20, "x": 3, "y": 5}.items()}
    table = SegmentTable.of(batch([[text["i"], text["g"], text[own]] for own in "xy"]), None)
    (run,) = table.runs()
    assert [block.tokens for block in run.path] == [10, 20]
    assert table.own_tokens(run) == 4.0
    deep = SegmentTable.of(batch([[text["i"], text["g"], text["x"]]] * 2 + [[text["i"], text["y"]]] * 2), None)
    whole = deep.runs()[0]._replace(start=0, end=4, path=deep.path(0, 1))
    assert deep.own_tokens(whole) == (23 + 0 + 5 + 0) / 4


def test_many_small_groups_become_few_runs() -> None:
    rows = sorted([["i", f"g{k // 2:04d}", f"{k:04d}"] for k in range(4000)])
    runs = SegmentTable.of(batch(rows), None).runs()
    assert len(runs) <= 150
    assert all(len(run.path) == 1 for run in runs), "the runs share no more than all rows do"
    few = sorted([["i", f"g{k % 20:02d}", f"{k:04d}"] for k in range(4000)])
    assert [len(run.path) for run in SegmentTable.of(batch(few), None).runs()] == [2] * 20


def tokens(*parts: int) -> TokenIds:
    """Some tokens for each part: equal parts, equal tokens."""
    return np.concatenate([np.arange(100 * part, 100 * part + 10, dtype=np.int32) for part in parts])


def test_evicted_prefixes_are_told_by_the_blocks_that_lie_beyond_what_is_left() -> None:
    cache, held = CacheManager(200, 1), Held()
    cache.tree.on_evict = held.evicted
    rows = [["aaaa" * 10, "bbbb" * 10, "1"], ["aaaa" * 10, "bbbb" * 10, "2"], ["aaaa" * 10, "cccc" * 10, "3"]]
    prompts = [tokens(1, 2, 11), tokens(1, 2, 12), tokens(1, 3, 13)]
    held.note(None, batch(rows), prompts, shared_with_next(prompts))
    for step, prompt in enumerate(prompts):
        node, found = cache.tree.match(prompt)
        start = sum(map(len, found))
        pages = cache.allocate(len(prompt) - start)
        assert pages is not None
        cache.tree.insert(node, prompt[start:], pages, step)
        cache.tree.commit(step)
    one, two = blocks(rows[0])[:2]
    assert held.take() == []
    kept, _ = cache.tree.match(tokens(1, 3, 13))
    cache.tree.lock(kept)
    cache.clear()  # all but the third row's
    assert held.take() == [two]
    cache.tree.unlock(kept)
    cache.clear()
    assert held.take() == [one]
    held.note(None, batch(rows), prompts, shared_with_next(prompts))
    held.evicted(b"".join(int(t).to_bytes(4, "big") for t in prompts[0]), 0, 30)  # a run through both borders
    assert held.take() == [one, one, two]


def test_borders_used_longest_ago_are_forgotten() -> None:
    held = Held(most_borders=2)
    for number in range(4):
        prompts = [tokens(number, 8), tokens(number, 9)]
        held.note(None, batch([[str(number), "x"], [str(number), "y"]]), prompts, shared_with_next(prompts))
    for number in range(4):
        held.evicted(b"".join(int(t).to_bytes(4, "big") for t in tokens(number, 8)), 0, 20)
    assert held.take() == [blocks(["2"])[0], blocks(["3"])[0]]
