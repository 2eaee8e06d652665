"""What tests of the plan rules look at: optimized plans as text, the specs of their calls, the rules run by hand."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from spark_llm import config
from spark_llm.call import CallSpec, PromptPlan, RowPlan
from spark_llm.functions.planning import Planner
from spark_llm.functions.registry import Registry
from spark_llm.optimizer.catalyst.bridge import Catalyst, Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.runner import Rule, run_rules
from spark_llm.optimizer.rules import RULES
from spark_llm.optimizer.rules.calls import all_calls

SORT = re.compile(r"Sort \[(.*)\], false")
EXCHANGE = re.compile(r"RepartitionByExpression \[(.*)\], (\d+)")


def optimized(df: DataFrame) -> Node:
    return df._jdf.queryExecution().optimizedPlan()


def subplans(plan: Node) -> list[Node]:
    """The plan and those of the subqueries in its expressions, at any depth."""
    return [plan, *(inner for each in items(plan.subqueriesAll()) for inner in [each])]


def specs(df: DataFrame) -> list[CallSpec]:
    """The specs of all calls of the optimized plan, those that are evaluated first first, then its subqueries'."""
    catalyst = Catalyst.of(df.sparkSession)
    return [call.spec for plan in subplans(optimized(df)) for call in all_calls(plan, catalyst)]


def prompts(df: DataFrame) -> list[PromptPlan]:
    return [spec.prompt or PromptPlan() for spec in specs(df)]


def rows(df: DataFrame) -> list[RowPlan]:
    return [spec.rows or RowPlan() for spec in specs(df)]


def orders(df: DataFrame) -> list[list[str]]:
    """For each call its fields' names in the order in which prompts have them (where no group takes a row)."""
    found = []
    for spec, prompt in zip(specs(df), prompts(df), strict=True):
        found.append([spec.fields[number].name for number in prompt.fields or range(len(spec.fields))])
    return found


def text(df: DataFrame) -> str:
    """The optimized plan without the ids of columns, the calls' specs and what differs between runs."""
    shown = optimized(df).toString()
    for spec in specs(df):
        shown = shown.replace(spec.encode(), "spec")
    return re.sub(r"LogicalRDD \[.*", "LogicalRDD", re.sub(r"#\d+L?", "", shown)).strip()


def sorts(df: DataFrame) -> list[str]:
    """The keys of all local sorts of the plan, from the top down."""
    return SORT.findall(text(df))


def exchanges(df: DataFrame) -> list[tuple[str, int]]:
    """The keys and partitions of all hash exchanges of the plan, from the top down."""
    return [(keys, int(count)) for keys, count in EXCHANGE.findall(text(df))]


def golden(plan: str) -> str:
    return textwrap.dedent(plan).strip()


def planner(spark: SparkSession) -> Planner:
    return Registry.of(spark).planner


def context(spark: SparkSession, explaining: bool = False) -> Context:
    return planner(spark).context(spark._jsparkSession, config.from_session(spark), explaining)


def apply(spark: SparkSession, plan: Node, rules: Sequence[Rule] = RULES) -> Node:
    """``plan`` after the rules, all of them enabled; those that go wrong are skipped, as in a query."""
    return run_rules(plan, rules, {rule.name for rule in rules}, context(spark))


def assert_idempotent(df: DataFrame) -> None:
    """Each rule leaves the plan that all of them made as it is."""
    plan, given = optimized(df), context(df.sparkSession)
    for rule in RULES:
        again = rule.apply(plan, given)
        assert again.fastEquals(plan), f"{rule.name} changes its own plan:\n{plan.toString()}\nto\n{again.toString()}"


def spark_jobs(spark: SparkSession) -> int:
    """How many jobs the application has run, for whomever."""
    return int(spark.sparkContext._jsc.sc().dagScheduler().numTotalJobs())


@contextlib.contextmanager
def settings_of_a_test(spark: SparkSession) -> Iterator[None]:
    """What is set in the session goes back afterwards to what it was, where tests share the session."""
    before = dict(spark.conf.getAll)
    yield
    for key, value in dict(spark.conf.getAll).items():
        if key not in before:
            spark.conf.unset(key)
        elif value != before[key]:
            spark.conf.set(key, before[key])


def settings(spark: SparkSession, **values: Any) -> None:
    """Set ``spark.llm.optimizer.*`` keys: ``reorderRows_enabled=False``; the echo session of a test is its own."""
    for name, value in values.items():
        spark.conf.set(f"spark.llm.optimizer.{name.replace('_', '.')}", str(value).lower())
