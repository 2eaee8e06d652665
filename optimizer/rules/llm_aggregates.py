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
import math
from collections.abc import Sequence

from spark_llm.aggregate import AggregateSpec, Option
from spark_llm.errors import LlmError
from spark_llm.optimizer.catalyst.bridge import Expression, Jvm, Node, items, module
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.runner import Refusal
from spark_llm.optimizer.rules.calls import literal_text

NAME = "llmAggregates"
_GRADES = 10
_PACKED = 16  # bytes of text for each byte that a table says it has, at most: files are compressed
_MOST_CHUNKS = 1 << 20  # of a group of unknown size
_LEAST_CHUNKS = 64
_TASK_SHARE = 4  # partitions of the first level for each task slot, so that a lost task loses little


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


def _rewritten(plan: Node, marks: Jvm, context: Context) -> Node:
    if not marks.holds(plan):
        return plan
    children = [_rewritten(child, marks, context) for child in items(plan.children())]
    plan = context.catalyst.with_children(plan, children)
    return _planned(plan, marks, context) if marks.isOne(plan) else plan


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
        spec, text = items(marker.children())
        found.append(_Answers(AggregateSpec.decode(literal_text(spec)), aggregate, text))
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
        chunks = _chunks(spec, int(str(source.stats().sizeInBytes())))
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


def _chunks(spec: AggregateSpec, table_bytes: int) -> int:
    """Most chunks that a group may have, by what Spark knows of its table."""
    size = _size(spec)
    return max(_LEAST_CHUNKS, min(_MOST_CHUNKS, _PACKED * table_bytes // size))


def _size(spec: AggregateSpec) -> int:
    """Bytes between the beginnings of two chunks: a chunk's last text may stand over its end."""
    return max(1, spec.chunk_bytes * 2 // 3)


def reduced(spec: AggregateSpec, keys: Sequence[str], is_distinct: bool, chunks: int, slots: int) -> str:
    """The query of ``ai_agg`` over the table ``input``: the keys, ``_text`` -> the keys, ``_answer``.

    chunks: as many as a group may have need levels; one that has more fails before its first call.
    """
    size = _size(spec)
    longest = max(1, spec.chunk_bytes - size)
    levels = max(1, math.ceil(math.log(chunks, spec.fan_in) - 1e-9))
    too_large = LlmError(
        "LLM_AGGREGATE_TOO_LARGE",
        function=spec.function,
        size=size * spec.fan_in**levels,
        key="spark.llm.aggregate.chunkLength",
    )
    group = "".join(f"{key}, " for key in keys)
    by = f"PARTITION BY {', '.join(keys)} " if keys else ""
    line = (
        f"if(octet_length(_text) <= {longest}, _text, "
        f"concat(substring(_text, 1, CAST({longest}L * length(_text) DIV octet_length(_text) AS INT)), '…'))"
    )
    if not is_distinct:
        line = f"if(_n = 1, {line}, concat('(', _n, ' times) ', {line}))"
    query = f"SELECT {group}CAST(_text AS STRING) AS _text FROM input"
    query = f"SELECT {group}_text, count(*) AS _n FROM ({query}) GROUP BY {group}_text"
    query = f"SELECT {group}_text, {line} AS _line FROM ({query})"
    start = f"sum(octet_length(_line) + 3) OVER ({by}ORDER BY _text ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)"
    query = f"SELECT {group}_line, coalesce({start}, 0) DIV {size} AS _chunk FROM ({query})"
    query = (
        f"SELECT {group}_line, if(_chunk < {spec.fan_in**levels}, _chunk, raise_error({_literal(str(too_large))})) "
        f"AS _chunk FROM ({query})"
    )
    query = (
        f"SELECT {_spread(keys, min(chunks, _TASK_SHARE * slots))}{group}_chunk, "
        f"sort_array(collect_list(_line)) AS _texts FROM ({query}) GROUP BY {group}_chunk"
    )
    call = _call(spec, spec.prompt, "texts => if(size(_texts) = 0, NULL, _texts)")
    query = f"SELECT {group}_chunk, {call} AS _answer FROM ({query})"
    for _ in range(levels):
        chunks = math.ceil(chunks / spec.fan_in)
        query = (
            f"SELECT {_spread(keys, min(chunks, slots))}{group}_chunk DIV {spec.fan_in} AS _chunk, "
            f"sort_array(collect_list(struct(_chunk, _answer))) AS _parts FROM ({query}) "
            f"GROUP BY {group}_chunk DIV {spec.fan_in}"
        )
        call = _call(spec, spec.combine, "answers => transform(_parts, p -> p._answer)")
        query = (
            f"SELECT {group}_chunk, CASE WHEN size(_parts) = 1 THEN _parts[0]._answer "
            f"WHEN exists(_parts, p -> p._answer IS NULL) THEN NULL ELSE {call} END AS _answer FROM ({query})"
        )
    return f"SELECT {group}_answer FROM ({query})" if keys else f"SELECT max(_answer) AS _answer FROM ({query})"


def top_k(spec: AggregateSpec, keys: Sequence[str]) -> str:
    """The query of ``ai_top_k`` over the table ``input``: the keys, ``_text`` -> the keys, ``_answer``."""
    group = "".join(f"{key}, " for key in keys)
    by = f"PARTITION BY {', '.join(keys)} " if keys else ""
    grades = ", ".join(f"'{grade}'" for grade in range(_GRADES + 1))
    call = _call(spec, spec.prompt, "text => _text", f"choices => array({grades})")
    query = f"SELECT {group}CAST(_text AS STRING) AS _text FROM input"
    query = f"SELECT {group}_text FROM ({query}) GROUP BY {group}_text"
    query = f"SELECT {group}_text, CAST({call} AS INT) AS _grade FROM ({query})"
    query = (
        f"SELECT {group}_text, _grade, row_number() OVER ({by}ORDER BY _grade DESC NULLS LAST, _text) AS _rank "
        f"FROM ({query})"
    )
    best = "sort_array(collect_list(if(_grade IS NULL, NULL, struct(_rank, _text))))"
    last = f"GROUP BY {', '.join(keys)}" if keys else ""
    return f"SELECT {group}transform({best}, p -> p._text) AS _answer FROM ({query}) WHERE _rank <= {spec.k} {last}"


def _spread(keys: Sequence[str], partitions: int) -> str:
    """Chunks go to partitions by hash: those of one group are in one task before."""
    return f"/*+ REPARTITION({partitions}, {', '.join([*keys, '_chunk'])}) */ "


def _call(spec: AggregateSpec, prompt: str, field: str, *more: str) -> str:
    options = [f"{name} => {_literal(value)}" for name, value in spec.options.items()]
    return f"llm({', '.join([_literal(prompt), field, *more, *options])})"


def _literal(value: Option) -> str:
    """A constant in SQL."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, tuple | list):
        return f"array({', '.join(map(_literal, value))})"
    return f"{value!r}D" if isinstance(value, float) else str(value)
