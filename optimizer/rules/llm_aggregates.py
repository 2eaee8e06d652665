"""An aggregate over answers becomes levels of calls: about chunks of texts, then about the answers, until one is left.

before                                    after
------                                    -----
Aggregate [g], [g, ai_agg(text), n]       Project [g, answer, n]
+- Relation [g, text]                     +- Join LeftOuter, (g <=> g)
                                             :- Aggregate [g], [g, count(1) AS n]
                                             :  +- Relation [g, text]
                                             +- (the calls, below) over Relation [g, text]

The calls of ``ai_agg`` are this query, with one more of its middle part for each level (``reduced`` writes it):

    SELECT g, CASE WHEN size(parts) = 1 THEN parts[0].answer ELSE llm(combine, parts' answers) END  -- chunk DIV fan_in
    FROM (SELECT g, sort_array(collect_list(struct(chunk, answer))) AS parts
          FROM (SELECT g, chunk, llm(prompt, texts) AS answer                                         -- first level
                FROM (SELECT g, chunk, sort_array(collect_list(line)) AS texts
                      FROM (SELECT g, line, sum(size of line) OVER (PARTITION BY g ORDER BY text) DIV size AS chunk
                            FROM (SELECT g, text, count(*) FROM input GROUP BY g, text))
                      GROUP BY g, chunk))
          GROUP BY g, chunk DIV fan_in)

So which chunk a text is in depends on the group's texts alone, not on partitions or the order of rows; equal texts are
one line with their number. A chunk has at most ``chunk_bytes``, so no row of any level is larger than a prompt, however
large a group is: what grows with it are sorts, which spill. ``ai_top_k`` asks about each text once and takes the best.

A chunk that fails (NULL) makes its group's answer NULL: an answer about a part would pass for one about all.

Without other aggregates beside it there is no join, and the input is read once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from spark_llm.aggregate import AggregateSpec
from spark_llm.errors import LlmError
from spark_llm.optimizer.catalyst.bridge import Expression, Jvm, Node, items, module
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.runner import Refusal
from spark_llm.optimizer.rules.aggregate_queries import most_chunks, reduced, top_k
from spark_llm.optimizer.rules.calls import literal_text

NAME = "llmAggregates"

logger = logging.getLogger("spark_llm.optimizer")


def llm_aggregates(plan: Node, context: Context) -> Node:
    """Plan the calls of each aggregate over answers. LLM_AGGREGATE_UNSUPPORTED where one cannot be planned."""
    marks = context.catalyst.questions("LlmAggregates")
    if not marks.holds(plan):
        return plan
    if plan.isStreaming():
        raise _refusal("it stands in a streaming query")
    plan = _rewritten(plan, marks, context)
    if marks.holds(plan):
        raise _refusal("it stands in a window (OVER) or where Spark has rewritten it (PIVOT)")
    return plan


def aggregates_left(plan: Node, context: Context) -> Node:
    """``plan``, which has no aggregate over answers left. LLM_AGGREGATE_NOT_PLANNED if it has one."""
    marks = context.catalyst.questions("LlmAggregates")
    if marks.holds(plan):
        raise Refusal(_spec_of(marks.anyIn(plan)).not_planned("the rule is switched off"))
    return plan


def _rewritten(plan: Node, marks: Jvm, context: Context) -> Node:
    if not marks.holds(plan):
        return plan
    children = [_rewritten(child, marks, context) for child in items(plan.children())]
    plan = context.catalyst.with_children(plan, children)
    return _sound(plan, marks, context) if marks.isOne(plan) else plan


def _sound(node: Node, marks: Jvm, context: Context) -> Node:
    """``node``, an Aggregate, with calls. LLM_AGGREGATE_NOT_PLANNED where that fails: it cannot stay as it is."""
    try:
        planned = _planned(node, marks, context)
        problem = context.catalyst.problem(node, planned)
    except Refusal:
        raise
    except Exception as error:
        logger.warning("Rule %s failed.", NAME, exc_info=True)
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
    if problem:
        raise Refusal(_spec_of(marks.anyIn(node)).not_planned(f"the rule failed ({problem})"))
    return planned


def _spec_of(marker: Expression) -> AggregateSpec:
    return AggregateSpec.decode(literal_text(marker.children().head()))


def _refusal(reason: str) -> Refusal:
    return Refusal(LlmError("LLM_AGGREGATE_UNSUPPORTED", reason=reason))


@dataclasses.dataclass(frozen=True)
class _Answers:
    """An aggregate over answers: ``aggregate`` is its AggregateExpression, ``text`` what it is about."""

    spec: AggregateSpec
    aggregate: Expression
    text: Expression


def _planned(node: Node, marks: Jvm, context: Context) -> Node:
    """``node``, an Aggregate, with calls."""
    catalyst = context.catalyst
    taken = catalyst.jvm.org.apache.spark.sql.catalyst.planning.PhysicalAggregation.unapply(node).get()
    keys, aggregates, results, child = items(taken._1()), items(taken._2()), taken._3(), taken._4()
    found: list[_Answers] = []
    others: list[Expression] = []
    for aggregate in aggregates:
        if not marks.holds(aggregate):
            others.append(aggregate)
            continue
        if (marker := marks.input(aggregate)) is None:
            raise _refusal("Spark has rewritten its argument (PIVOT)")
        found.append(_Answers(_spec_of(marker), aggregate, marker.children().last()))
    for answers in found:
        context.notes.fired(NAME, answers.spec.function, "calls about chunks of each group, level by level")
    short = [each.aggregate.resultAttribute().withName("_answer") for each in found]
    results = marks.renamed(results, catalyst.seq(short))
    if len(found) == 1 and not others:
        return catalyst.plans.Project(results, _calls(found[0], keys, child, marks, context))
    if not child.deterministic():
        raise _refusal("other aggregates stand beside it, and what it is over differs each time that it is read")
    columns = [catalyst.expressions.Alias(each, "_a", each.resultId(), *_no_details(context)) for each in others]
    grouping = [key.child() if key.nodeName() == "Alias" else key for key in keys]
    joined = catalyst.questions("Aggregates").aggregate(catalyst.seq(grouping), catalyst.seq([*keys, *columns]), child)
    for answers in found:
        copies = [catalyst.named(each, "_key") for each in grouping]
        right = _calls(answers, copies, child, marks, context)
        joined = _left_join(joined, right, [key.toAttribute() for key in keys], copies, context)
        if answers.spec.function == "ai_top_k":
            joined = _without_null(joined, answers, context)
    return catalyst.plans.Project(results, joined)


def _no_details(context: Context) -> tuple[Jvm, Jvm, Jvm]:
    """The rest of an Alias: no qualifier, no metadata."""
    catalyst = context.catalyst
    return catalyst.seq([]), catalyst.none, catalyst.seq([])


def _left_join(
    left: Node, right: Node, keys: Sequence[Expression], copies: Sequence[Expression], context: Context
) -> Node:
    """Rows of ``left`` with those of ``right`` whose keys are equal, or both NULL."""
    catalyst = context.catalyst
    condition = None
    for key, copy in zip(keys, copies, strict=True):
        equal = catalyst.expressions.EqualNullSafe(key, copy.toAttribute())
        condition = equal if condition is None else catalyst.expressions.And(condition, equal)
    outer = module(catalyst.jvm.org.apache.spark.sql.catalyst.plans, "LeftOuter")
    hint = module(catalyst.plans, "JoinHint").NONE()
    return catalyst.plans.Join(
        left, right, outer, catalyst.none if condition is None else catalyst.some(condition), hint
    )


def _calls(answers: _Answers, keys: Sequence[Expression], child: Node, marks: Jvm, context: Context) -> Node:
    """The calls of one aggregate over ``child``: rows of the keys, which keep their ids, and the aggregate's result."""
    catalyst = context.catalyst
    text = answers.text
    if answers.aggregate.filter().isDefined():
        text = catalyst.expressions.If(answers.aggregate.filter().get(), text, catalyst.literal(None))
    column = catalyst.named(text, "_text")
    source = catalyst.plans.Project(catalyst.seq([*keys, column]), child)
    names = [f"_k{number}" for number in range(len(keys))]
    columns = [key.toAttribute().withName(name) for key, name in zip(keys, names, strict=True)]
    spec = answers.spec
    if spec.function == "ai_top_k":
        query = top_k(spec, names)
    else:
        rows = int(marks.mostRows(child))
        chunks = most_chunks(spec, None if rows < 0 else rows, float(marks.sourceBytes(child, text)))
        query = reduced(spec, names, bool(answers.aggregate.isDistinct()), chunks, context.slots)
    plan = marks.planned(context.session, query, source, catalyst.seq([*columns, column.toAttribute()]))
    *_, result = items(plan.output())
    if spec.function == "ai_top_k":
        result = catalyst.expressions.KnownNotContainsNull(result)
    named = catalyst.expressions.Alias(result, "_answer", answers.aggregate.resultId(), *_no_details(context))
    return catalyst.plans.Project(catalyst.seq([*(key.toAttribute() for key in keys), named]), plan)


def _without_null(joined: Node, answers: _Answers, context: Context) -> Node:
    """``joined`` with an empty array where the join found none."""
    catalyst = context.catalyst
    *rest, found = items(joined.output())
    nothing = catalyst.jvm.org.apache.spark.sql.catalyst.util.GenericArrayData(catalyst.seq([]))
    empty = catalyst.expressions.Literal(nothing, found.dataType())
    filled = catalyst.expressions.Coalesce(catalyst.seq([found, empty]))
    named = catalyst.expressions.Alias(filled, "_answer", answers.aggregate.resultId(), *_no_details(context))
    return catalyst.plans.Project(catalyst.seq([*rest, named]), joined)
