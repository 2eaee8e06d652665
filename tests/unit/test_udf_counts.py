"""The counts of rows that no engine computed, on their way into a report."""

from __future__ import annotations

import pytest

from spark_llm.report import Report, _report
from spark_llm.tally import Counts, Tally, TaskUpdate


def test_rows_stored_skipped_and_over_budget_add_up_over_tasks() -> None:
    tally = Tally()
    for task in ("a", "b"):
        counts = Counts(rows=10, calls=1, duplicates=1, stored=2, skipped=3, nulls=1, over_budget=2)
        tally.merge(TaskUpdate(query="7", task=task, number=1, prompt="p", counts=counts))
    found = _report("7", tally.counts("7")["p"], {})
    assert (found.stored, found.skipped, found.over_budget) == (4, 6, 4)
    assert found.rows == found.calls + found.duplicates + found.stored + found.skipped + found.nulls + found.over_budget


def test_a_report_names_them_only_where_there_are_some() -> None:
    text = str(Report(query="1", rows=10, calls=1, stored=2000, skipped=3, over_budget=4))
    for part in ("2,000 from the result cache", "3 not needed", "4 NULL beyond the budget"):
        assert part in text
    plain = str(Report(query="1", rows=10, calls=10))
    assert not any(word in plain for word in ("result cache", "not needed", "budget"))


def test_rows_beyond_the_budget_warn_of_no_failed_rows(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    tally.merge(TaskUpdate(query="7", task="a", number=1, counts=Counts(rows=1, over_budget=1)))
    assert not caplog.records
