"""clear_cache(): answers from before it count no more, in this session and in later ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

import spark_llm
from spark_llm import LlmError
from spark_llm.config import from_session
from spark_llm.engine.service.archive import Archive
from spark_llm.engine.service.segments import StoredAnswer

pytestmark = pytest.mark.spark


@pytest.fixture
def session(spark: SparkSession) -> SparkSession:
    return spark.newSession()


def test_clearing_counts_from_now_on_also_in_later_sessions(session: SparkSession) -> None:
    before = time.time()
    spark_llm.clear_cache(session)
    first = from_session(session).cache_cleared / 1000
    assert before <= first <= time.time() + 0.001
    assert from_session(session.newSession()).cache_cleared / 1000 == first
    spark_llm.clear_cache(session)
    assert from_session(session).cache_cleared / 1000 >= first


def test_clearing_deletes_the_files_below_the_path(session: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    session.conf.set("spark.llm.cache.path", str(folder))
    spark_llm.clear_cache(session)  # nothing is there yet
    other = tmp_path / "answers" / "notes.txt"
    other.write_text("not ours")
    Archive(str(folder), "model").append([(b"0" * 16, StoredAnswer(b"", "stop", time.time() - 1))])
    assert [file for file in folder.rglob("*") if file.is_file()] != [other]
    spark_llm.clear_cache(session)
    assert [file for file in folder.rglob("*") if file.is_file()] == [other]


def test_a_path_that_cannot_be_used_is_said(session: SparkSession, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    session.conf.set("spark.llm.cache.path", str(blocked))
    with pytest.raises(LlmError, match="LLM_CACHE_UNAVAILABLE"):
        spark_llm.clear_cache(session)
