"""What the order of fields does to answers: a sample of a query's calls, asked as written and as optimised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from spark_llm.call import CallSpec, PromptPlan
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row

    from spark_llm.functions.registry import Registry
    from spark_llm.optimizer.rules.calls import Call

SHOWN = 10  # rows with different answers that a comparison keeps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One row's fields, and its answers both ways."""

    fields: Mapping[str, str | None]
    written: str | None
    optimised: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallComparison:
    """One call of the query.

    why: what the prompt rules did to it; "" if nothing, and then nothing was asked. rows: that were compared; equal: of
    them with the same answer both ways. differences: the first of the others.
    """

    prompt: str
    why: str
    rows: int = 0
    equal: int = 0
    differences: Sequence[Difference] = ()

    @property
    def agreement(self) -> float:
        """The share of rows with the same answer, 0 to 1; 1 where nothing was changed."""
        return self.equal / self.rows if self.rows else 1.0

    def __str__(self) -> str:
        if not self.why:
            return f"{self.prompt!r}: the prompts are as written"
        lines = [f"{self.prompt!r}: {self.equal} of {self.rows} answers agree ({self.agreement:.0%})", f"  {self.why}"]
        for one in self.differences:
            shown = ", ".join(f"{name}: {(value or 'NULL')[:40]!r}" for name, value in one.fields.items())
            lines.append(f"  {one.written!r} as written, {one.optimised!r} as optimised, for {shown}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderComparison:
    """The calls of a query, in the order in which they are evaluated."""

    calls: Sequence[CallComparison]

    @property
    def agreement(self) -> float:
        """The share of compared rows with the same answer, over all calls."""
        rows = sum(call.rows for call in self.calls)
        return sum(call.equal for call in self.calls) / rows if rows else 1.0

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls))


def compare_orders(df: DataFrame, sample: int = 100) -> OrderComparison:
    """Ask a sample of the rows of each llm() call in ``df`` twice, as the query writes its prompts and as the prompt
    rules make them (``reorderColumns``, ``placeInstruction``), and compare the answers.

    sample: rows of each call, chosen by a hash of their arguments: the same ones each time. Greedy answers or a seed
    make the comparison repeatable; a call that draws without a seed differs by itself. Costs up to 2 x sample calls.

    Raises LLM_INVALID_ARGUMENT where sample is no positive number or ``df`` calls no llm().
    """
    from spark_llm.functions.registry import Registry
    from spark_llm.optimizer.catalyst.bridge import Catalyst
    from spark_llm.optimizer.rules.calls import all_calls

    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 1:
        raise LlmError("LLM_INVALID_ARGUMENT", argument="sample", value=repr(sample), expected="a whole number above 0")
    spark = df.sparkSession
    catalyst = Catalyst.of(spark)
    plan = df._jdf.queryExecution().optimizedPlan()
    found: list[Call] = []
    for call in all_calls(plan, catalyst):
        if not any(other.member == call.member and other.udf.semanticEquals(call.udf) for other in found):
            found.append(call)
    if not found:
        raise LlmError(
            "LLM_INVALID_ARGUMENT", argument="df", value="a query without llm()", expected="one that calls it"
        )
    registry = Registry.of(spark)
    return OrderComparison(calls=[_compare(df, call, sample, registry, catalyst) for call in found])


def _compare(df: DataFrame, call: Call, sample: int, registry: Registry, catalyst: Any) -> CallComparison:
    layout = call.spec.prompt or PromptPlan()
    if not (layout.fields or layout.table or layout.instruction_last):
        return CallComparison(prompt=call.label, why="")
    rows = _sampled(df, call, sample, catalyst)
    optimised = msgspec.structs.replace(call.spec, rows=None, masked=False, budget=None)
    written = msgspec.structs.replace(optimised, prompt=None, order="as_written")
    before = _answers(df, written, rows, registry)
    after = _answers(df, optimised, rows, registry)
    differences = [
        Difference(fields=dict(zip(call.names, row[1:], strict=True)), written=a, optimised=b)
        for row, a, b in zip(rows, before, after, strict=True)
        if a != b
    ]
    return CallComparison(
        prompt=call.label,
        why="; ".join(filter(None, (layout.fields_why, f"instruction {layout.instruction_why}"))),
        rows=len(rows),
        equal=len(rows) - len(differences),
        differences=differences[:SHOWN],
    )


def _sampled(df: DataFrame, call: Call, sample: int, catalyst: Any) -> list[Row]:
    """The arguments of ``sample`` rows of a call: prompt, then fields, all text."""
    from pyspark.sql import functions as F

    from spark_llm.optimizer.catalyst.bridge import frame_of
    from spark_llm.optimizer.statistics.plain import plain_input

    arguments = [call.prompt, *call.fields]
    plain = plain_input(call.node.child(), arguments, 0, catalyst).plan
    source = call.node.child() if plain is None else plain
    columns = [catalyst.named(argument, f"a{number}") for number, argument in enumerate(arguments)]
    frame = frame_of(catalyst.plans.Project(catalyst.seq(columns), source), df.sparkSession, catalyst)
    names = [f"a{number}" for number in range(len(arguments))]
    rows: list[Row] = frame.orderBy(F.xxhash64(F.lit(1), *names), *names).limit(sample).collect()
    return rows


def _answers(df: DataFrame, spec: CallSpec, rows: list[Row], registry: Registry) -> list[str | None]:
    """The answers of ``rows`` under ``spec``, in their order."""
    from pyspark.sql import functions as F

    spark = df.sparkSession
    names = [f"a{number}" for number in range(1 + len(spec.fields))]
    schema = ", ".join(["n INT", *(f"{name} STRING" for name in names)])
    frame = spark.createDataFrame([(number, *row) for number, row in enumerate(rows)], schema)
    ask = registry.udf_for(spark, spec)
    answers = frame.select("n", ask(F.lit(spec.encode()), *names).alias("answer")).collect()
    return [row.answer for row in sorted(answers, key=lambda row: row.n)]
