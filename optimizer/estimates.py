"""What each call of a finished plan is expected to cost: its calls and their statistics, put into the cost model.

Looks at plans after all rules, so it first takes away what the rules put below calls. No number is made up: what nobody
counted stays unknown, and what masks, conditions and limits may leave out makes a bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import numpy as np

from spark_llm.call import PromptPlan
from spark_llm.optimizer.catalyst.bridge import Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.cost import (
    ENCODER_ENDS,
    NONE,
    TEMPLATE_HEAD,
    TEMPLATE_TAIL,
    UNKNOWN,
    CallCost,
    CallInput,
    Kind,
    Number,
    Source,
    about,
    call_cost,
    exact,
)
from spark_llm.optimizer.reorder.expected import distinct_in
from spark_llm.optimizer.rules.calls import Call, all_calls
from spark_llm.optimizer.shared_tokens import shared_tokens
from spark_llm.optimizer.statistics import InputStatistics
from spark_llm.optimizer.statistics.values import Hashes

_NULL_HASH = np.uint64(42)  # of Spark's xxhash64, whose seed it is
_COUNTED_LEAVES = {"InMemoryRelation", "LocalRelation", "LogicalRDD", "OneRowRelation", "Range"}
_SAME_ROWS = {"ArrowEvalPython", "BatchEvalPython", "Project", "Repartition", "RepartitionByExpression", "Sort"}


@dataclasses.dataclass(frozen=True)
class CallEstimate:
    """A call of the plan and what it is expected to cost. source: where the numbers come from, in words.

    is_repeated: an equal call over the same rows stands in the plan before it, so that its answers are there.
    """

    call: Call
    cost: CallCost
    source: str
    is_repeated: bool = False


def estimates(plan: Node, context: Context) -> list[CallEstimate]:
    """Estimates of all calls of ``plan`` and of its subqueries, those that are evaluated first first.

    Runs a job for statistics where the rules would (``Statistics.of``): never when explaining.
    """
    catalyst = context.catalyst
    found: list[CallEstimate] = []
    for each in [*items(plan.subqueriesAll()), plan]:
        for call in all_calls(each, catalyst):
            found.append(_estimate(call, found, context))
    return found


def _estimate(call: Call, before: Sequence[CallEstimate], context: Context) -> CallEstimate:
    inputs = context.catalyst.questions("Inputs")
    child = call.node.child()
    below = inputs.essence(child)
    plain = dataclasses.replace(
        call,
        node=context.catalyst.plans.Project(below.output(), below),
        prompt=inputs.unplaced(call.prompt, child),
        fields=tuple(inputs.unplaced(field, child) for field in call.fields),
    )
    statistics = _statistics(plain, before, context)
    source = _source(statistics)
    rows = _rows(statistics, source, below, before, context)
    if inputs.dropsByAnswers(child):
        rows = rows.at_most()
    known = _input(call, statistics, source, rows, before, context)
    cost = call_cost(known, context.speed_of(call.spec))
    if not known.folds or not any(_is_equal(call, earlier.call) for earlier in before):
        return CallEstimate(call, cost, statistics.source)
    nothing = dict.fromkeys(("calls", "prompt_tokens", "hits", "output_tokens", "computed_tokens", "seconds"), NONE)
    return CallEstimate(call, dataclasses.replace(cost, **nothing), statistics.source, is_repeated=True)


def _is_equal(call: Call, other: Call) -> bool:
    return call.spec == other.spec and call.member == other.member and bool(call.node.sameResult(other.node))


def _statistics(call: Call, before: Sequence[CallEstimate], context: Context) -> InputStatistics:
    """Statistics of the call's input, asked for as the rules did: they do it once for calls over the same fields."""
    if not call.fields and call.has_constant_prompt:
        return InputStatistics("the plan", None, ())
    order = list(range(len(call.fields)))
    for earlier in before:
        if sorted(earlier.call.names) == sorted(call.names) and len(set(call.names)) == len(order):
            order = [call.names.index(name) for name in earlier.call.names]
            break
    fields, names = tuple(call.fields[i] for i in order), tuple(call.spec.fields[i] for i in order)
    asked = dataclasses.replace(call, fields=fields, spec=msgspec.structs.replace(call.spec, fields=names))
    found = context.statistics.of(asked, context)
    back = np.argsort(order)
    return dataclasses.replace(
        found,
        columns=tuple(found.columns[i] for i in back),
        hashes=None if found.hashes is None else found.hashes[:, back],
        lengths=None if found.lengths is None else found.lengths[:, back],
    )


def _input(
    call: Call,
    statistics: InputStatistics,
    source: Source,
    rows: Number,
    before: Sequence[CallEstimate],
    context: Context,
) -> CallInput:
    layout = call.spec.prompt or PromptPlan()
    system, instruction = context.lengths(call.spec)([call.spec.system or "", call.prompt_text])
    instruction = instruction if call.has_constant_prompt else 0
    distinct, nulls = _distinct(call, statistics, source, rows)
    asked: Number | None = None
    if call.mask is not None or (call.group is not None and (call.group.limit or len(call.group.conditions) > 0)):
        asked = rows.at_most()
    elif nulls:
        asked = rows.minus(float(nulls))
    if call.spec.task == "embed":
        return _embedded(call, statistics, source, rows, asked, distinct, instruction)
    varying_tokens = varying_shared = NONE
    if not call.has_constant_prompt:
        varying_tokens, varying_shared = _varying(statistics, source, rows, layout.instruction_last)
    length = statistics.row_length if call.fields else 0.0
    return CallInput(
        rows=rows,
        asked=asked,
        distinct=distinct,
        field_tokens=UNKNOWN if length is None else about(length, source),
        shared=shared_tokens(call, statistics, source, [earlier.call.spec for earlier in before], context),
        head=TEMPLATE_HEAD + system + (0 if layout.instruction_last else instruction),
        tail=TEMPLATE_TAIL + (instruction if layout.instruction_last else 0),
        varying_tokens=varying_tokens,
        varying_shared=varying_shared,
        max_output=layout.most_output(
            context.max_output_length if call.spec.max_tokens is None else call.spec.max_tokens
        ),
        folds=_folds(call),
        rows_per_prompt=max(1, layout.rows),
        prompts=_prompts(statistics, layout),
        left_tokens=_left_tokens(statistics, layout, source),
    )


def _embedded(
    call: Call,
    statistics: InputStatistics,
    source: Source,
    rows: Number,
    asked: Number | None,
    distinct: Number,
    constant: int,
) -> CallInput:
    """A call that makes vectors: its texts stand alone, without a template, share nothing, and no tokens answer them.

    constant: tokens of a text that is the same for all rows.
    """
    return CallInput(
        rows=rows,
        asked=asked,
        distinct=distinct,
        field_tokens=NONE,
        shared=NONE,
        head=0.0,
        tail=ENCODER_ENDS + constant,
        varying_tokens=NONE if call.has_constant_prompt else _varying(statistics, source, rows, is_last=True)[0],
        folds=_folds(call),
    )


def _folds(call: Call) -> bool:
    """Are rows with equal arguments asked once?"""
    return call.spec.rows is not None and call.spec.rows.fold and call.spec.is_repeatable


def _prompts(statistics: InputStatistics, layout: PromptPlan) -> Number:
    """Prompts that the rows of each left side come to, where all rows were looked at."""
    hashes = statistics.hashes
    if layout.rows < 2 or not layout.left or hashes is None or statistics.rows is None or len(hashes) < statistics.rows:
        return UNKNOWN
    rows = np.unique(hashes, axis=0)
    rows = rows[~(rows == _NULL_HASH).all(axis=1)]
    pairs = np.unique(rows[:, list(layout.left)], axis=0, return_counts=True)[1]
    return about(int((-(-pairs // layout.rows)).sum()), "job")


def _left_tokens(statistics: InputStatistics, layout: PromptPlan, source: Source) -> Number:
    """Tokens of the fields that all rows of a prompt have in common."""
    if statistics.lengths is not None and len(statistics.lengths):
        return about(float(statistics.lengths[:, list(layout.left)].sum(axis=1).mean()), source)
    lengths = [statistics.columns[number].length for number in layout.left if number < len(statistics.columns)]
    if len(lengths) < len(layout.left) or any(length is None for length in lengths):
        return UNKNOWN
    return about(sum(length or 0.0 for length in lengths), source)


def _source(statistics: InputStatistics) -> Source:
    if statistics.source == "the catalog":
        return "catalog"
    return "plan" if statistics.source.startswith(("the plan", "nothing")) else "job"


def _rows(
    statistics: InputStatistics, source: Source, below: Node, before: Sequence[CallEstimate], context: Context
) -> Number:
    """How many rows reach the call whose input is ``below``."""
    if statistics.rows is not None:
        kind: Kind = "exact" if source == "job" else "about"  # the catalog's numbers may be old
        return Number(float(statistics.rows), "catalog" if source == "plan" else source, kind)
    while str(below.nodeName()) in _SAME_ROWS:
        if context.catalyst.is_call(below):
            known = next((e.cost.rows for e in before if e.call.node.fastEquals(below)), UNKNOWN)
            if known.is_known:
                return known
        below = below.child()
    if str(below.nodeName()) in _COUNTED_LEAVES and below.stats().rowCount().isDefined():
        return exact(float(str(below.stats().rowCount().get())), "plan")
    return UNKNOWN


def _distinct(call: Call, statistics: InputStatistics, source: Source, rows: Number) -> tuple[Number, int]:
    """Different argument tuples that are asked; and how many rows are all NULL, where all rows were looked at."""
    if not call.fields:
        if call.has_constant_prompt:
            return exact(1, "plan"), 0
        prompt = statistics.prompt
        return (UNKNOWN if prompt is None or prompt.distinct is None else about(prompt.distinct, source)), 0
    if not call.has_constant_prompt:
        return rows.at_most(), 0
    if statistics.hashes is not None and statistics.rows is not None:
        return _distinct_rows(statistics.hashes, statistics.rows)
    counts = [column.distinct for column in statistics.columns]
    if len(counts) == 1 and counts[0] is not None:
        return about(counts[0], source), 0
    return rows.at_most(), 0


def _distinct_rows(hashes: Hashes, total: int) -> tuple[Number, int]:
    if not len(hashes):
        return exact(0, "job"), 0
    rows = np.unique(hashes, axis=0, return_inverse=True, return_counts=True)
    nulls = (rows[0] == _NULL_HASH).all(axis=1)
    if len(hashes) >= total:
        return exact(int((~nulls).sum()), "job"), int(rows[2][nulls].sum())
    return about(distinct_in(rows[2], total) - int(nulls.sum()), "job"), 0


def _varying(statistics: InputStatistics, source: Source, rows: Number, is_last: bool) -> tuple[Number, Number]:
    """Tokens of a prompt that differs by row, and which share of them a prefix cache finds."""
    prompt = statistics.prompt
    length = UNKNOWN if prompt is None or prompt.length is None else about(prompt.length, source)
    if is_last:
        return length, NONE
    if prompt is None or prompt.distinct is None or not rows.value:
        return length, UNKNOWN
    return length, about(max(0.0, 1 - prompt.distinct / rows.value), source)
