"""Constraints on their way through the service: per stream and per row, folded, stored, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from fake_service import Service, answers, batch_of

from spark_llm.engine.request import Completion, Constraint, FinishReason, SamplingParams
from spark_llm.engine.service import segments
from spark_llm.engine.service.protocol import ResultCache, StreamOpen
from spark_llm.engine.service.results import Results
from spark_llm.engine.service.segments import StoredAnswer
from spark_llm.errors import LlmError

CHOICES = Constraint(kind="choices", choices=("good", "bad"))


def ask(service: Service, header: StreamOpen, *batches: pa.RecordBatch) -> dict[int, dict[str, Any]]:
    with service.client.stream(header) as stream:
        for batch in batches:
            stream.send(batch)
        return answers(stream)


def test_a_choice_comes_back_as_given_with_its_confidence(service: Service) -> None:
    found = ask(service, StreamOpen(constraint=CHOICES), batch_of({1: ["g?"], 2: ["b?"]}))
    assert {i: (row["text"], row["confidence"], row["error"]) for i, row in found.items()} == {
        1: ("good", 0.75, None),
        2: ("bad", 0.75, None),
    }
    assert {row["output_tokens"] for row in found.values()} == {1}
    assert all(request.params.max_tokens == 1 for request in service.engine.seen), "the choices bound the answer"


def test_rows_may_have_choices_of_their_own(service: Service) -> None:
    batch = batch_of({1: ["g?"], 2: ["x?"], 3: ["good"]}, choices=[None, ["xa", "y"], None])
    found = ask(service, StreamOpen(constraint=CHOICES), batch)
    assert {i: row["text"] for i, row in found.items()} == {1: "good", 2: "xa", 3: "good"}
    found = ask(service, StreamOpen(), batch)
    assert {i: (row["text"], row["confidence"]) for i, row in found.items()} == {
        1: ("?g", None),
        2: ("xa", 0.75),
        3: ("doog", None),
    }


def test_a_row_that_leaves_no_choice_fails_alone(service: Service) -> None:
    batch = batch_of({1: ["g?"], 2: ["x?"], 3: ["y?"]}, choices=[None, [], ["a", None]])  # type: ignore[list-item]
    found = ask(service, StreamOpen(constraint=CHOICES), batch)
    assert found[1]["text"] == "good"
    for row, reason in ((2, "the row has none"), (3, "one of the row's is NULL")):
        assert found[row]["text"] is None
        assert found[row]["error"].startswith("[LLM_INVALID_CONSTRAINT]")
        assert reason in found[row]["error"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (StreamOpen(constraint=Constraint(kind="regex", text="(")), "LLM_INVALID_CONSTRAINT"),
        (StreamOpen(constraint=CHOICES, params=SamplingParams(stop=(".",))), "stop strings would end"),
    ],
)
def test_a_constraint_that_cannot_be_kept_ends_the_stream(service: Service, header: StreamOpen, message: str) -> None:
    with pytest.raises(LlmError, match=message):
        ask(service, header, batch_of({1: ["g?"]}))


def test_equal_rows_under_equal_constraints_fold(service: Service) -> None:
    """Not under other ones, of the stream or of the row, whatever the key says."""
    header = StreamOpen(query="q", constraint=CHOICES)
    rows = {1: ["g"], 2: ["g"]}
    found = ask(service, header, batch_of(rows, keys=[b"k", b"k"]))
    assert [found[i]["folded"] for i in (1, 2)] == [False, True]
    assert {found[i]["text"] for i in (1, 2)} == {"good"}
    assert {found[i]["confidence"] for i in (1, 2)} == {0.75}
    other = StreamOpen(query="q", constraint=Constraint(kind="choices", choices=("great", "bad")))
    assert ask(service, other, batch_of({1: ["g"]}, keys=[b"k"]))[1]["text"] == "great"
    own = batch_of(
        {1: ["g"], 2: ["g"], 3: ["g"]}, keys=[b"k"] * 3, choices=[["gone", "x"], ["gold", "x"], ["gone", "x"]]
    )
    found = ask(service, header, own)
    assert [(found[i]["text"], found[i]["folded"]) for i in (1, 2, 3)] == [
        ("gone", False),
        ("gold", False),
        ("gone", True),
    ]
    assert len(service.engine.seen) == 4


def test_the_result_cache_keeps_choices_and_confidence(service: Service, tmp_path: Path) -> None:
    cache = ResultCache(path=str(tmp_path))
    for query in ("first", "second"):
        header = StreamOpen(query=query, constraint=CHOICES, cache=cache)
        found = ask(service, header, batch_of({1: ["b"]}, keys=[b"k"]))
        assert (found[1]["text"], found[1]["confidence"]) == ("bad", 0.75)
        assert found[1]["stored"] is (query == "second")
    assert service.results.flush(10)
    again = Results(lambda: "unknown")
    again.begin(cache, "third")
    key = next(iter(service.results._answers))
    archived = again._archives[cache.path].find([key[1]], 0.0, 1 << 20)
    assert (archived[0].text, archived[0].confidence) == ("bad", 0.75)


def test_segments_from_before_there_were_choices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, one = pafs.LocalFileSystem(), StoredAnswer(b"\x07\0\0\0", "stop", 1e6)
    old, columns = segments._OLD_SCHEMA, pa.RecordBatch.from_arrays
    with monkeypatch.context() as patch:

        class Older:
            """pyarrow's record batches as they were written then."""

            @staticmethod
            def from_arrays(arrays: list[pa.Array], schema: pa.Schema) -> pa.RecordBatch:
                return columns(arrays[: len(old)], schema=old.with_metadata(schema.metadata))

        patch.setattr(segments.pa, "RecordBatch", Older)
        name, _ = segments.write(files, str(tmp_path), [(b"k" * segments.DIGEST_BYTES, one)])
    read = segments.read(files, f"{tmp_path}/{name}")
    assert read.answer(0, 1e6) == one
    assert segments.read_keys(files, f"{tmp_path}/{name}") == b"k" * segments.DIGEST_BYTES


def test_a_damaged_confidence_is_found_out(tmp_path: Path) -> None:
    files = pafs.LocalFileSystem()
    one = StoredAnswer(b"\x07\0\0\0", "stop", 1e6, "bad", 0.75)
    name, _ = segments.write(files, str(tmp_path), [(b"k" * segments.DIGEST_BYTES, one)])
    path = tmp_path / name
    assert segments.read(files, str(path)).answer(0, 1e6) == one
    whole = path.read_bytes()
    at = whole.index(pa.array([0.75]).buffers()[1].to_pybytes()[:8])
    path.write_bytes(whole[:at] + pa.array([0.25]).buffers()[1].to_pybytes()[:8] + whole[at + 8 :])
    with pytest.raises(segments.BadSegment):
        segments.read(files, str(path))


def test_a_failed_answer_tells_equal_rows_and_is_not_computed_again(service: Service) -> None:
    error = ("LLM_ANSWER_INCOMPLETE", {"kind": "JSON schema", "max_tokens": "3"})
    service.engine._answer = lambda request: Completion(  # type: ignore[method-assign]
        request.id, [1, 2, 3], FinishReason.ERROR, 5, 2, 3, error=error
    )
    found = ask(service, StreamOpen(query="q"), batch_of({1: ["g"], 2: ["g"]}, keys=[b"k", b"k"]))
    assert all(row["text"] is None and "max_tokens = 3" in row["error"] for row in found.values())
    assert len(service.engine.seen) == 1
