"""Budgets of queries: what is admitted, what is refused and why."""

from __future__ import annotations

from spark_llm.engine.service import budgets
from spark_llm.engine.service.budgets import Budgets
from spark_llm.engine.service.protocol import Budget


def refusal(key: str, limit: str, spent: str) -> tuple[str, dict[str, str]]:
    return "LLM_BUDGET_EXCEEDED", {"key": f"spark.llm.budget.{key}", "limit": limit, "spent": spent}


def test_calls_end_at_the_limit_over_all_streams_of_a_query() -> None:
    spending, budget = Budgets(), Budget(calls=5)
    assert spending.exceeded("q", budget) is None
    assert spending.admit("q", budget, [1, 1, 1]) == (3, None)
    why = refusal("maxCalls", "5", "the engine has made 5 calls")
    assert spending.admit("q", budget, [1, 1, 1]) == (2, why)
    assert spending.exceeded("q", budget) == why
    assert spending.admit("p", budget, [1]) == (1, None)


def test_tokens_count_when_a_prompt_is_admitted_and_when_an_answer_is_there() -> None:
    spending, budget = Budgets(), Budget(length=100)
    assert spending.admit("q", budget, [40, 40]) == (2, None)
    spending.answered("q", 19)
    assert spending.admit("q", budget, [10, 10]) == (1, refusal("maxLength", "100", "the engine has taken 109 tokens"))
    spending.answered("without a budget", 10**6)
    assert spending.exceeded("without a budget", budget) is None


def test_time_begins_with_the_first_row() -> None:
    now = [1000.0]
    spending, budget = Budgets(clock=lambda: now[0]), Budget(seconds=60)
    assert spending.exceeded("q", budget) is None
    now[0] += 59
    assert spending.exceeded("p", budget) is None
    assert spending.admit("q", budget, [1]) == (1, None)
    now[0] += 1
    assert spending.exceeded("q", budget) == refusal("maxTime", "60 s", "60.0 s have passed since its first row")
    assert spending.exceeded("p", budget) is None


def test_only_the_latest_queries_are_remembered(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(budgets, "KEPT_QUERIES", 2)
    spending, budget = Budgets(), Budget(calls=1)
    for query in "abc":
        spending.admit(query, budget, [1])
    assert [spending.exceeded(query, budget) is None for query in "cba"] == [False, False, True]
