"""``explain``: what each llm() call of a query is expected to cost, what rules did about it, and what it came to."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

from spark_llm import config
from spark_llm.errors import LlmError
from spark_llm.explaining_text import layout
from spark_llm.optimizer.cost import CallCost, Speed

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_llm.report import Report

Mode = Literal["plan", "analyze"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleNote:
    """What a plan rule did about a call (fired), or why it did nothing."""

    rule: str
    fired: bool
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallExplanation:
    """One call of the plan that runs.

    prompt: shortened. placement: which rows it is asked for, and what is done with its answers. estimate: what it is
    expected to cost; source: where that comes from. notes: of the rules that fired, and of those that looked at it and
    did not; idle: the other rules. actual: what its prompt came to, in ``analyze``; None where another call of the
    query with the same prompt has it, or nothing was counted. embeds: an encoder answers it.
    """

    prompt: str
    placement: str
    estimate: CallCost
    source: str
    notes: Sequence[RuleNote] = ()
    idle: Sequence[str] = ()
    actual: Report | None = None
    embeds: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """The calls of a query, those that are evaluated first first; ``str()`` is what ``explain`` prints.

    total: the calls' estimates together. speed: of the engines. notes: of rules about the query as a whole. off: rules
    that the configuration switches off. report: of the run, in ``analyze``.
    """

    mode: Mode
    calls: Sequence[CallExplanation]
    total: CallCost
    speed: Speed
    notes: Sequence[RuleNote] = ()
    off: Sequence[str] = ()
    report: Report | None = None

    def __str__(self) -> str:
        return layout(self)


def explain(df: DataFrame, mode: Mode = "plan", file: TextIO | None = None) -> Explanation:
    """Print, for each llm() call of ``df``, what it is expected to cost and what the plan rules did; and return it.

    mode: ``plan`` asks no model and runs no job, so that numbers which nobody counted are not known; ``analyze``
    runs the query, throws its rows away and puts what happened beside the estimate. file: where to print, None is
    stdout. ``df`` itself keeps the plan that it has, or has none yet.

    Raises LLM_INVALID_ARGUMENT for another mode or a streaming ``df``, LLM_NEEDS_DRIVER for one of Spark Connect; in
    ``analyze`` whatever the query raises.
    """
    from spark_llm.optimizer.catalyst.bridge import Catalyst

    if mode not in get_args(Mode):
        raise LlmError("LLM_INVALID_ARGUMENT", argument="mode", value=repr(mode), expected="'plan' or 'analyze'")
    catalyst = Catalyst.of(df.sparkSession)
    if df.isStreaming:
        raise LlmError("LLM_INVALID_ARGUMENT", argument="df", value="a streaming query", expected="a query that ends")
    found = _explained(df, mode, catalyst)
    print(found, file=file)
    return found


def _explained(df: DataFrame, mode: Mode, catalyst: Any) -> Explanation:
    from spark_llm.explaining_calls import described
    from spark_llm.functions.planning import enabled_rules
    from spark_llm.functions.registry import Registry
    from spark_llm.optimizer.catalyst.bridge import frame_of
    from spark_llm.optimizer.cost import sum_of_costs
    from spark_llm.optimizer.rules import EARLY_RULES, RULES

    spark = df.sparkSession
    conf = config.from_session(spark)
    planner = Registry.of(spark).planner
    # A plan of its own: that of df may be there already, made by other rules or with other statistics.
    frame = frame_of(df._jdf.queryExecution().analyzed(), spark, catalyst)
    execution = frame._jdf.queryExecution()
    with planner.noting() as noted:
        if mode == "plan":  # from within EXPLAIN, for which the rules run no job
            spark.sparkContext._jvm.PythonSQLUtils.explainString(execution, "simple")
        plan = execution.optimizedPlan()
    context = planner.context(spark._jsparkSession, conf, explaining=mode == "plan")
    rules = list(dict.fromkeys(rule.name for rule in (*EARLY_RULES, *RULES)))
    enabled = enabled_rules(conf)
    found, notes = described(plan, noted.all(), [rule for rule in rules if rule in enabled], conf, context)
    calls = [call for call, _ in found]
    report = _run(frame, spark) if mode == "analyze" and calls else None
    if report is not None:  # which knows calls by their prompts
        rest = dict(report.by_call)
        calls = [dataclasses.replace(call, actual=rest.pop(key, None)) for call, key in found]
    return Explanation(
        mode=mode,
        calls=calls,
        total=sum_of_costs([call.estimate for call in calls]),
        speed=context.speed,
        notes=notes,
        off=[rule for rule in rules if rule not in enabled],
        report=report,
    )


def _run(frame: DataFrame, spark: SparkSession) -> Report | None:
    """Run a query to its end; its report, None where it had no row to ask."""
    from spark_llm import report

    with _described(spark) as description:
        frame.write.format("noop").mode("overwrite").save()
    shared = spark._jsparkSession.sharedState()
    spark.sparkContext._jsc.sc().listenerBus().waitUntilEmpty()
    for execution in _items(shared.statusStore().executionsList()):
        if execution.description() == description:
            return report.install(spark).report(str(execution.executionId()))
    return None


@contextlib.contextmanager
def _described(spark: SparkSession) -> Iterator[str]:
    """Jobs of the block have a description of their own, by which Spark knows the query afterwards."""
    key = "spark.job.description"
    context = spark.sparkContext
    before = context.getLocalProperty(key)
    description = f"spark_llm.explain {secrets.token_hex(8)}"
    context.setLocalProperty(key, description)
    try:
        yield description
    finally:
        context.setLocalProperty(key, before)


def _items(scala_seq: Any) -> list[Any]:
    return [scala_seq.apply(i) for i in range(scala_seq.size())]
