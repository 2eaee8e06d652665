"""Windows under a limit: how they grow, what counts, and that a query never ends with too few rows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.service.limits import Limits
from spark_llm.engine.service.protocol import WindowRequest


def request(partition: int = 0, rows: int = 0, hits: int = 0, **more: object) -> WindowRequest:
    given: dict[str, object] = {"query": "q", "node": "n", "limit": 10, "attempt": partition}
    return WindowRequest(partition=partition, rows=rows, hits=hits, **(given | more))  # type: ignore[arg-type]


def test_windows_double() -> None:
    limits, rows, grants = Limits(), 0, []
    for _ in range(7):
        grants.append(limits.grant(request(rows=rows)))
        rows += grants[-1]
    assert grants == [1, 2, 4, 8, 16, 32, 64]


def test_no_window_after_the_limit_for_anyone_and_what_is_told_twice_counts_once() -> None:
    limits = Limits()
    assert limits.grant(request(0)) == 1
    assert limits.grant(request(1)) == 1
    assert limits.grant(request(0, rows=30, hits=9)) > 0
    assert limits.grant(request(0, rows=30, hits=9)) > 0
    assert limits.grant(request(1, rows=1, hits=1)) == 0
    assert limits.grant(request(0, rows=30, hits=9)) == 0
    assert limits.grant(request(2)) == 0


def test_queries_and_nodes_are_counted_apart_and_limit_0_is_never_reached() -> None:
    limits = Limits()
    assert limits.grant(request(rows=20, hits=10)) == 0
    assert limits.grant(request(query="p")) == 1
    assert limits.grant(request(node="m")) == 1
    assert limits.grant(request(node="k", limit=0, rows=7, hits=7)) == 8


def test_tasks_that_ask_at_a_time_share_what_may_be_asked() -> None:
    limits = Limits()
    for partition in range(4):
        limits.grant(request(partition))
    assert limits.grant(request(0, rows=99)) == 25
    limits.grant(request(1, ended=True))
    limits.grant(request(2, ended=True))
    assert limits.grant(request(3, rows=1)) == 50


def test_a_partition_that_runs_again_counts_for_what_its_poorest_attempt_has() -> None:
    limits = Limits()
    assert limits.grant(request(0, rows=5, hits=5, ended=True)) > 0
    assert limits.grant(request(1, rows=5, hits=4)) > 0
    assert limits.grant(request(0, attempt=7)) > 0
    assert limits.grant(request(1, rows=20, hits=6)) > 0, "the second attempt at partition 0 has none yet"
    assert limits.grant(request(0, attempt=7, rows=4, hits=4)) == 0


def test_only_the_latest_nodes_are_remembered() -> None:
    limits = Limits(kept=3)
    for n in range(10):
        limits.grant(request(node=str(n), rows=20, hits=10))
    assert limits.grant(request(node="9")) == 0
    assert limits.grant(request(node="0")) == 1


@settings(max_examples=200, deadline=None)
@given(
    partitions=st.lists(st.lists(st.booleans(), max_size=60), min_size=1, max_size=5),
    limit=st.integers(1, 12),
    draw=st.data(),
)
def test_the_bound_and_enough_hits(partitions: list[list[bool]], limit: int, draw: st.DataObject) -> None:
    """Tasks take turns in any order, some are run twice. Each yields the hits of the windows that it was granted."""
    twice = draw.draw(st.sets(st.integers(0, len(partitions) - 1)))
    limits = Limits()
    attempts = [(p, p) for p in range(len(partitions))] + [(p, 100 + p) for p in sorted(twice)]
    running = {attempt: [partition, 0, 0] for partition, attempt in attempts}  # attempt -> partition, rows, window
    finished: list[bool] = []
    asked, last = 0, {}
    while running:
        attempt = draw.draw(st.sampled_from(sorted(running)))
        partition, rows, window = running[attempt]
        finished += partitions[partition][rows : rows + window]
        rows += window
        hits = sum(partitions[partition][:rows])
        ended = rows >= len(partitions[partition])
        enough = not twice and sum(finished) >= limit
        grant = limits.grant(request(partition, rows, hits, attempt=attempt, limit=limit, ended=ended))
        last[attempt] = hits
        if enough:
            assert grant == 0
        if ended or not grant:
            del running[attempt]
            continue
        window = min(grant, len(partitions[partition]) - rows)
        asked += window
        running[attempt] = [partition, rows, window]
    for chosen in (min, max):  # whichever attempt of a partition Spark takes
        taken = {p: last[chosen(a for q, a in attempts if q == p)] for p in range(len(partitions))}
        assert sum(taken.values()) >= min(limit, sum(map(sum, partitions)))
    if not twice:
        rows_to_limit = next((i for i in range(len(finished) + 1) if sum(finished[:i]) >= limit), len(finished))
        assert asked <= 2 * rows_to_limit + (len(partitions) - 1) * max(1, rows_to_limit)
    if not twice and len(partitions) == 1:
        assert asked <= 2 * rows_to_limit
