"""The queries that aggregates over answers become, and their constants."""

from __future__ import annotations

import math

import msgspec
import pytest

from spark_llm.aggregate import AggregateSpec
from spark_llm.call import CallSpec
from spark_llm.optimizer.rules.aggregate_queries import most_chunks, reduced, top_k

SPEC = AggregateSpec(
    function="ai_agg",
    prompt="it's \\ all",
    combine="both",
    options={"stop": ("a", "'"), "top_p": 0.5},
    chunk_bytes=300,
    fan_in=4,
)


def test_no_call_takes_an_aggregate_for_its_spec() -> None:
    assert AggregateSpec.decode(SPEC.encode()) == SPEC
    with pytest.raises(msgspec.ValidationError):
        CallSpec.decode(SPEC.encode())


@pytest.mark.parametrize(("chunks", "levels"), [(1, 1), (4, 1), (5, 2), (16, 2), (17, 3), (4**5, 5), (4**5 + 1, 6)])
def test_levels_are_those_that_so_many_chunks_need(chunks: int, levels: int) -> None:
    query = reduced(SPEC, ["k"], False, chunks, 2)
    assert query.count("llm('both'") == levels
    assert query.count("llm('it\\'s \\\\ all'") == 1
    assert f"_chunk < {4**levels}" in query


@pytest.mark.parametrize(("chunks", "partitions"), [(3, 3), (100, 8), (40_000, 8), (1 << 20, 26)])
def test_chunks_go_to_more_tasks_in_large_groups(chunks: int, partitions: int) -> None:
    assert f"REPARTITION({partitions}, k, _chunk)" in reduced(SPEC, ["k"], False, chunks, 2)


def test_options_and_keys() -> None:
    query = reduced(SPEC, [], True, 4, 2)
    assert "stop => array('a', '\\''), top_p => 0.5D" in query
    assert "PARTITION BY" not in query
    assert " times) " not in query
    assert "PARTITION BY a, b ORDER BY" in top_k(msgspec.structs.replace(SPEC, k=3), ["a", "b"])


def test_chunks_that_a_group_may_have() -> None:
    size = 200  # two thirds of a chunk
    assert most_chunks(SPEC, 0, 0) == most_chunks(SPEC, 1, math.inf)
    rows = 1000
    assert most_chunks(SPEC, rows, 0) * size >= rows * 4 * 100  # each as long as may be, of the longest characters
    assert most_chunks(SPEC, None, 10**6) == 16 * 10**6 // size
    assert most_chunks(SPEC, None, math.inf) == most_chunks(SPEC, None, 1e30) == 1 << 20
    assert 1 < most_chunks(SPEC, None, 0) < 100
