"""The result cache: what is found again, in memory and in a folder, what is not, and what damaged files do."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.request import Completion, FinishReason
from spark_llm.engine.service import archive, segments
from spark_llm.engine.service.answer_index import ENTRY_BYTES
from spark_llm.engine.service.archive import Archive
from spark_llm.engine.service.protocol import ResultCache
from spark_llm.engine.service.results import Results
from spark_llm.engine.service.segments import StoredAnswer
from spark_llm.errors import LlmError

MB = 1 << 20


def completion(output: list[int], reason: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(3, output, reason, 5, 2, 3)


def key(n: int) -> bytes:
    return b"scope and key %d" % n


def outputs(found: list[Completion | None]) -> list[list[int] | None]:
    return [None if answer is None else answer.output for answer in found]


def written(results: Results, cache: ResultCache, numbers: range, query: str = "q") -> None:
    results.begin(cache, query)
    for n in numbers:
        results.keep(cache, key(n), completion([n, n + 1]))
    assert results.flush(10)


def files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.arrow"))


def test_answers_are_found_whole_and_cost_nothing() -> None:
    results, cache = Results(lambda: "model"), ResultCache()
    results.keep(cache, key(1), completion([7, 2**31 - 1], FinishReason.LENGTH))
    results.keep(cache, key(2), completion([]))
    found = results.find(cache, [key(2), None, key(3), key(1)])
    assert outputs(found) == [[], None, None, [7, 2**31 - 1]]
    assert found[3] is not None
    assert (found[3].finish_reason, found[3].prompt_tokens, found[3].computed_tokens) == (FinishReason.LENGTH, 0, 0)
    assert (results.sizes().answers, results.sizes().segments) == (2, 0)


def test_memory_is_bounded_and_keeps_what_was_used_last() -> None:
    results, cache = Results(lambda: "model"), ResultCache(memory=50_000)
    for n in range(1000):
        results.keep(cache, key(n), completion([1] * 20))
        results.find(cache, [key(0)])
        assert results.sizes().bytes <= 50_000
    assert results.sizes().answers > 50
    assert [answer is not None for answer in results.find(cache, [key(0), key(1), key(999)])] == [True, False, True]


def test_another_engine_finds_them_when_its_query_begins(tmp_path: Path) -> None:
    cache = ResultCache(path=str(tmp_path))
    first, second, other = Results(lambda: "model"), Results(lambda: "model"), Results(lambda: "other model")
    second.begin(cache, "early")
    other.begin(cache, "q")
    written(first, cache, range(100))
    assert outputs(second.find(cache, [key(5)])) == [None]
    second.begin(cache, "early")
    assert outputs(second.find(cache, [key(5)])) == [None], "a query's streams see the same"
    second.begin(cache, "later")
    assert outputs(second.find(cache, [key(5), key(100), key(99)])) == [[5, 6], None, [99, 100]]
    other.begin(cache, "later")
    assert outputs(other.find(cache, [key(5)])) == [None], "another model's answers"
    assert second.sizes().segments == 1


def test_paths_are_kept_apart(tmp_path: Path) -> None:
    results, first, second = Results(lambda: "m"), ResultCache(path=f"file://{tmp_path}/1"), ResultCache()
    written(results, first, range(3))
    assert outputs(results.find(first, [key(1)])) == [[1, 2]]
    assert outputs(results.find(second, [key(1)])) == [None]
    assert len(files(tmp_path / "1")) == 1


def test_what_was_given_before_the_clearing_does_not_count(tmp_path: Path) -> None:
    now = [1_000_000.0]
    results, cache = Results(lambda: "m", clock=lambda: now[0]), ResultCache(path=str(tmp_path))
    written(results, cache, range(3))
    now[0] += 10
    cleared = ResultCache(path=str(tmp_path), cleared=1_000_005.0)
    assert outputs(results.find(cleared, [key(1)])) == [None]
    fresh = Results(lambda: "m")
    fresh.begin(cleared, "q")
    assert outputs(fresh.find(cleared, [key(1)])) == [None]
    written(results, cleared, range(1, 2), "q2")
    assert [segments.given_at(path.name) for path in files(tmp_path)] == [1_000_010.0], "the old segment is deleted"
    assert outputs(results.find(cleared, [key(0), key(1)])) == [None, [1, 2]]


def test_clear_forgets_memory_and_indexes(tmp_path: Path) -> None:
    results, cache = Results(lambda: "m"), ResultCache()
    results.keep(cache, key(1), completion([1]))
    written(results, ResultCache(path=str(tmp_path)), range(3))
    results.clear()
    assert results.sizes() == (0, 0, 0)
    assert outputs(results.find(cache, [key(1)])) == [None]
    results.begin(ResultCache(path=str(tmp_path)), "q")
    assert outputs(results.find(ResultCache(path=str(tmp_path)), [key(1)])) == [[1, 2]], "the folder is still there"


def test_the_oldest_segments_go_where_there_is_too_much(tmp_path: Path) -> None:
    now = [1_000_000.0]
    results, cache = Results(lambda: "m", clock=lambda: now[0]), ResultCache(path=str(tmp_path), max_size=20_000)
    for n in range(20):
        now[0] += 1
        written(results, cache, range(10 * n, 10 * n + 10), f"q{n}")
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 20_000
    kept = [segments.given_at(path.name) for path in files(tmp_path)]
    assert len(kept) > 3
    assert kept == [1_000_020.0 - n for n in reversed(range(len(kept)))]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped key", "flipped token", "not arrow", "gone"])
def test_damaged_segments_hold_nothing_and_spoil_nothing(tmp_path: Path, damage: str) -> None:
    cache, first = ResultCache(path=str(tmp_path)), Results(lambda: "m")
    written(first, cache, range(50))
    written(first, cache, range(50, 60), "q2")
    broken = max(files(tmp_path), key=lambda path: path.stat().st_size)
    data = bytearray(broken.read_bytes())
    second = Results(lambda: "m")
    late = damage in ("flipped token", "gone")  # what the keys do not show is found when the answers are read
    if late:
        second.begin(cache, "q")
    if damage == "gone":
        broken.unlink()
    elif damage == "empty":
        broken.write_bytes(b"")
    elif damage == "cut":
        broken.write_bytes(data[: len(data) // 2])
    elif damage == "not arrow":
        broken.write_bytes(os.urandom(3000))
    else:
        place = (
            data.index(archive_digest(20))
            if damage == "flipped key"
            else data.index(np.array([20, 21], "<i4").tobytes())
        )
        data[place] ^= 1
        broken.write_bytes(data)
    second.begin(cache, "q")
    found = outputs(second.find(cache, [key(n) for n in range(60)]))
    assert found == [None] * 50 + [[n, n + 1] for n in range(50, 60)]
    assert second.sizes().segments == 1


def archive_digest(n: int) -> bytes:
    from spark_llm.engine.service.results import _digest

    return _digest(key(n))


def test_half_written_files_are_not_seen_and_go_when_their_engine_is_long_dead(tmp_path: Path) -> None:
    cache, results = ResultCache(path=str(tmp_path), cleared=1.0), Results(lambda: "m")
    written(results, cache, range(5))
    folder = files(tmp_path)[0].parent
    old, young = folder / f"{segments.TEMPORARY}old", folder / f"{segments.TEMPORARY}young"
    for path in (old, young):
        path.write_bytes(files(tmp_path)[0].read_bytes()[:100])
    os.utime(old, (time.time() - 7200,) * 2)
    fresh = Results(lambda: "m")
    written(fresh, cache, range(5, 6))
    assert fresh.sizes().segments == 2
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize("path", ["{tmp}/file/below", "nope://host/x", "file://relative"])
def test_a_path_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = ResultCache(path=path.format(tmp=tmp_path))
    with pytest.raises(LlmError) as raised:
        Results(lambda: "m").begin(cache, "q")
    assert raised.value.condition == "LLM_CACHE_UNAVAILABLE"
    assert raised.value.parameters["path"] == cache.path
    assert len(raised.value.parameters["reason"]) > 10


def test_a_model_whose_files_are_gone_has_no_durable_answers(tmp_path: Path) -> None:
    def gone() -> str:
        raise FileNotFoundError("model.safetensors")

    with pytest.raises(LlmError, match=r"LLM_CACHE_UNAVAILABLE.*model\.safetensors"):
        Results(gone).begin(ResultCache(path=str(tmp_path)), "q")


def test_what_cannot_be_written_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    results, cache = Results(lambda: "m"), ResultCache(path=str(tmp_path))
    monkeypatch.setattr(segments, "write", full)
    written(results, cache, range(3))
    assert outputs(results.find(cache, [key(1)])) == [[1, 2]]
    assert files(tmp_path) == []
    monkeypatch.undo()
    written(results, cache, range(3, 5))
    assert len(files(tmp_path)) == 1, "the thread that writes lives on"


def test_no_more_waits_to_be_written_than_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, cache = Results(lambda: "model"), ResultCache(path=str(tmp_path))
    monkeypatch.setattr("spark_llm.engine.service.results._MOST_WAITING", 10_000)
    monkeypatch.setattr("spark_llm.engine.service.results.SEGMENT_BYTES", 3_000)
    write, writing, gate = segments.write, threading.Event(), threading.Event()

    def waits(*given: Any) -> Any:
        writing.set()
        assert gate.wait(30)
        return write(*given)

    monkeypatch.setattr(segments, "write", waits)
    results.begin(cache, "q")

    def keep(numbers: range) -> None:
        for n in numbers:
            results.keep(cache, key(n), replace(completion([]), text="x" * 600))

    keep(range(3))
    assert writing.wait(4), "as many bytes as a segment has are not written before their time"
    keep(range(3, 50))
    assert len([answer for answer in results.find(cache, [key(n) for n in range(50)]) if answer]) == 50
    gate.set()
    assert results.flush(10)
    keep(range(50, 53))
    assert results.flush(10)
    later = Results(lambda: "model")
    later.begin(cache, "later")
    found = [n for n, answer in enumerate(later.find(cache, [key(n) for n in range(53)])) if answer]
    assert found == [*range(10), 50, 51, 52]


def test_an_index_larger_than_its_share_leaves_the_oldest_out(tmp_path: Path) -> None:
    now = [1_000_000.0]
    results, cache = Results(lambda: "m", clock=lambda: now[0]), ResultCache(path=str(tmp_path))
    for n in range(4):
        now[0] += 1
        written(results, cache, range(100 * n, 100 * n + 100), f"q{n}")
    small = ResultCache(path=str(tmp_path), memory=4 * 250 * ENTRY_BYTES)
    fresh = Results(lambda: "m")
    fresh.begin(small, "q")
    found = fresh.find(small, [key(n) for n in (50, 150, 250, 350)])
    assert [answer is not None for answer in found] == [False, False, True, True]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 200), min_size=1, max_size=40, unique=True), min_size=1, max_size=12),
    collide=st.booleans(),
)
def test_an_archive_finds_what_was_put_into_it(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], collide: bool
) -> None:
    """Also where many digests begin alike, and where a key is in several segments."""
    folder = str(tmp_path_factory.mktemp("archive"))

    def digest(n: int) -> bytes:
        return (b"same half" if collide else b"%8d" % n)[:8].ljust(8) + b"%8d" % n

    one = Archive(folder, "m")
    for part in parts:
        one.append([(digest(n), StoredAnswer(np.arange(n % 5, dtype=np.int32).tobytes(), "stop", 1e6)) for n in part])
    two = Archive(folder, "m")
    two.refresh(MB, 0.0)
    expected = {n for part in parts for n in part}
    for reader in (one, two):
        found = reader.find([digest(n) for n in range(201)], 0.0, MB)
        assert set(found) == expected
        assert all(len(answer.output) == 4 * (n % 5) for n, answer in found.items())
        assert reader.num_segments == len(parts)


def test_a_segment_is_plain_arrow(tmp_path: Path) -> None:
    written(Results(lambda: "m"), ResultCache(path=str(tmp_path)), range(3))
    (path,) = files(tmp_path)
    table = pa.ipc.open_file(path).read_all()
    assert table.column_names == ["key", "finish_reason", "output", "text", "confidence"]
    assert table.column("output").to_pylist() == [[0, 1], [1, 2], [2, 3]]


def digest_of(n: int) -> bytes:
    return b"%8d" % n + b"%8d" % n


def put(one: Archive, numbers: range, at: float = 1e6) -> None:
    one.append([(digest_of(n), StoredAnswer(np.array([n], np.int32).tobytes(), "stop", at)) for n in numbers])


def found_in(one: Archive, numbers: range) -> dict[int, StoredAnswer]:
    return one.find([digest_of(n) for n in numbers], 0.0, MB)


def test_many_small_segments_become_few_and_readers_of_the_old_ones_find_all(tmp_path: Path) -> None:
    writer, reader, holder = (Archive(str(tmp_path), "m") for _ in range(3))
    for n in range(archive.MOST_SMALL):
        put(writer, range(3 * n, 3 * n + 3), 1e6 + n)
        writer.merge(0.0)
    assert len(files(tmp_path)) == archive.MOST_SMALL
    for other in (reader, holder):
        other.refresh(MB, 0.0)
    numbers = range(3 * archive.MOST_SMALL)
    assert len(found_in(holder, numbers)) == len(numbers)
    put(writer, range(1000, 1003))
    put(writer, range(2000, 2000 + 2 * archive.SMALL_ANSWERS))
    writer.merge(0.0)
    assert [segments.given_at(path.name) for path in files(tmp_path)] == [1e6, 1e6], "one is too large to be merged"
    for one in (writer, reader, holder):
        found = found_in(one, numbers)
        assert [int(np.frombuffer(found[n].output, np.int32)[0]) for n in numbers] == list(numbers)
    assert writer.num_segments == reader.num_segments == 2
    assert set(found_in(reader, range(1000, 1003))) == {0, 1, 2}, "of a segment that it had never heard of"
    assert writer.num_bytes < ENTRY_BYTES * 3000 + 64 * 3000


def test_two_engines_that_merge_the_same_lose_nothing(tmp_path: Path) -> None:
    one, two = Archive(str(tmp_path), "m"), Archive(str(tmp_path), "m")
    for n in range(archive.MOST_SMALL + 1):
        put(one, range(n, n + 1))
    two.refresh(MB, 0.0)
    names = files(tmp_path)
    copies = {path: path.read_bytes() for path in names}
    one.merge(0.0)
    for path, data in copies.items():
        path.write_bytes(data)  # as if the other had read them before they were deleted, or a merge had been cut short
    two.merge(0.0)
    assert len(files(tmp_path)) == 2
    for reader in (one, two, fresh := Archive(str(tmp_path), "m")):
        reader.refresh(MB, 0.0)
        assert len(found_in(reader, range(archive.MOST_SMALL + 1))) == archive.MOST_SMALL + 1
    for n in range(100, 100 + archive.MOST_SMALL):
        put(fresh, range(n, n + 1))
    fresh.merge(0.0)
    assert len(files(tmp_path)) == 1
    assert fresh.num_segments == 1


def test_a_reader_under_whose_eyes_segments_are_merged_finds_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = (Archive(str(tmp_path), "m") for _ in range(2))
    count = archive.MOST_SMALL + 6
    for n in range(count):
        put(writer, range(n, n + 1), 1e6 + n)
    read_keys, merged = segments.read_keys, []

    def merging(files: object, path: str) -> bytes:
        if not merged:
            merged.append(path)
            writer.merge(0.0)
        return read_keys(files, path)  # type: ignore[arg-type]

    monkeypatch.setattr(archive, "_READERS", 1)
    monkeypatch.setattr(archive.segments, "read_keys", merging)
    reader.refresh(MB, 0.0)
    assert merged
    assert len(found_in(reader, range(count))) == count


def test_what_is_damaged_or_cleared_is_not_merged(tmp_path: Path) -> None:
    one = Archive(str(tmp_path), "m")
    for n in range(archive.MOST_SMALL + 2):
        put(one, range(n, n + 1), 1e6 + n)
    damaged = files(tmp_path)[5]
    damaged.write_bytes(b"no segment")
    one.merge(1e6 + 2)
    assert len(files(tmp_path)) == archive.MOST_SMALL + 2, "two were cleared: no more than the most that may be"
    one.merge(1e6 + 1)
    assert [segments.given_at(path.name) for path in files(tmp_path)] == [1e6, 1e6 + 1, 1e6 + 5]
    assert damaged in files(tmp_path)
    assert set(found_in(one, range(archive.MOST_SMALL + 2))) == set(range(archive.MOST_SMALL + 2)) - {5}


def test_flushes_of_few_answers_leave_few_files(tmp_path: Path) -> None:
    results, cache = Results(lambda: "m"), ResultCache(path=str(tmp_path))
    for n in range(2 * archive.MOST_SMALL):
        written(results, cache, range(n, n + 1), f"q{n}")
    assert len(files(tmp_path)) <= archive.MOST_SMALL + 1
    fresh = Results(lambda: "m")
    fresh.begin(cache, "q")
    assert outputs(fresh.find(cache, [key(n) for n in range(2 * archive.MOST_SMALL)]))[-1] == [127, 128]
