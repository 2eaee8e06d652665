"""A call on one side's columns runs below the join where the join repeats that side's rows, above where it drops them.

before                                              after: 40 of 1,000,000 products were sold
------                                              -----
Join Inner, (product = id)                          Project [product, id, name]
:- Filter (week = 7)                                +- Filter (pythonUDF0 = yes)
:  +- Relation [product, week]                         +- ArrowEvalPython [llm(.., 'p', text)], [pythonUDF0]
+- Project [id, name]                                     +- Join Inner, (product = id)
   +- Filter (pythonUDF0 = yes)                              :- Filter (week = 7)
      +- ArrowEvalPython [llm(.., 'p', text)]                :  +- Relation [product, week]
         +- Relation [id, name, text]                        +- Relation [id, name, text]

before                                              after: each of 4 dimensions has its row of 1,000,000 facts
------                                              -----
Project [fact, pythonUDF0 AS answer]                Project [fact, pythonUDF0 AS answer]
+- ArrowEvalPython [llm(.., 'p', text)]             +- Join Inner, (k = id)
   +- Join Inner, (k = id)                             :- Relation [fact, k]
      :- Relation [fact, k]                            +- ArrowEvalPython [llm(.., 'p', text)], [pythonUDF0]
      +- Relation [id, text]                              +- Relation [id, text]

Rows with equal arguments are asked once wherever they meet, so a call above a join asks about the tuples that survive
it, never more than below; but the join may repeat rows, which all go through Python. Each place that a call may stand
in, past as many joins as there are, is counted in one job (rows, and distinct tuples that would be asked), and the
cheapest one is taken. Where nothing can be counted, a call goes above a join whose other side is filtered, and above
semi and anti joins; else it stays where Spark has it. A call stays below a join that compares its answers, and on the
side of an outer join that is filled with NULLs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from spark_llm.optimizer.catalyst.bridge import Catalyst, Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.placing import Moved, drops_rows, is_plain, join_type, kept_sides, pulled, pushed
from spark_llm.optimizer.cost import ask_seconds, move_seconds
from spark_llm.optimizer.rules.calls import Call, calls_of
from spark_llm.optimizer.statistics.joins import Key, Question, Tuples, count_tuples

NAME = "placeCallsAroundJoins"
_MOST_MOVES = 100
_LEAST_GAIN = 0.05
_PYTHON_ROW_SECONDS = 10e-6  # a row to a Python worker and back, beside its bytes
_ANSWER_LENGTH = 16  # tokens, a guess
_BYTES_PER_TOKEN = 4.0

Path = list[tuple[Node, int]]  # from the root: nodes, and the number of the child that the next one is


class Place(NamedTuple):
    """A place of a call: ``moved.plan`` replaces the node that ``depth`` steps of the path lead to.

    is_thumb: nothing need be known for it to be better than a place below.
    """

    moved: Moved
    depth: int
    words: str
    is_thumb: bool = False


def place_calls_around_joins(plan: Node, context: Context) -> Node:
    """Move the calls of ``plan`` past joins, up or down, where that makes the query cheaper."""
    catalyst = context.catalyst
    pattern = catalyst.jvm.org.apache.spark.sql.catalyst.trees.TreePattern.JOIN()
    if plan.isStreaming() or not plan.containsPattern(pattern):
        return plan
    settled: set[int] = set()
    for _ in range(_MOST_MOVES):
        moved = _next_move(plan, settled, context)
        if moved is None:
            return plan
        plan = moved
    return plan


def _next_move(plan: Node, settled: set[int], context: Context) -> Node | None:
    """The plan after a move of the first call that gains by one; None where none does."""
    for path, node in _call_nodes(plan, [], context.catalyst):
        identity = int(node.resultAttrs().apply(0).exprId().id())
        if identity in settled:
            continue
        settled.add(identity)
        if (best := _best_place(path, node, context)) is not None:
            settled.clear()  # what stood in another call's way may be gone
            settled.add(identity)
            return _with_subtree(path[: best.depth], best.moved.plan, context.catalyst)
    return None


def _call_nodes(plan: Node, path: Path, catalyst: Catalyst) -> Iterator[tuple[Path, Node]]:
    """The nodes of calls with the paths to them, from the top down."""
    if not catalyst.holds_call(plan):
        return
    if catalyst.is_call(plan):
        yield path, plan
    for number, child in enumerate(items(plan.children())):
        yield from _call_nodes(child, [*path, (plan, number)], catalyst)


def _with_subtree(path: Path, subtree: Node, catalyst: Catalyst) -> Node:
    for node, number in reversed(path):
        children = [subtree if i == number else child for i, child in enumerate(items(node.children()))]
        subtree = catalyst.with_children(node, children)
    return subtree


def _best_place(path: Path, node: Node, context: Context) -> Place | None:
    """Where the call gains by standing instead; None: it stays."""
    calls = calls_of(node)
    if any(call.group is not None and call.group.limit for call in calls):
        return None  # a limit counts the rows of this very place
    here = Place(Moved(node, node), len(path), "where it stands")
    catalyst = context.catalyst
    above = _places_above(path, node, catalyst)
    below = [Place(moved, len(path), "below the join") for moved in pushed(node, catalyst)]
    if not above and not below:
        return None
    label = calls[0].label
    if not all(call.spec.is_repeatable and call.udf.deterministic() for call in calls):
        _decline(context, label, "its answers are drawn without a seed")
        return None
    places = [here, *above, *below]
    counted = count_tuples([Question(p.moved.node.child(), _asked(p.moved.node, catalyst)) for p in places], context)
    if counted is None:
        return _by_thumb(above, label, context)
    return _by_numbers(places, counted, calls, context)


def _places_above(path: Path, node: Node, catalyst: Catalyst) -> list[Place]:
    """The places above one join, above two, ... that the call may be pulled to."""
    found = []
    subtree = node
    for depth in range(len(path) - 1, -1, -1):
        above, number = path[depth]
        if not is_plain(above, catalyst):
            break
        if subtree is not node:
            above = _with_subtree([(above, number)], subtree, catalyst)
        if above.nodeName() in ("Project", "Filter"):
            subtree = above
            continue
        if above.nodeName() != "Join" or (moved := pulled(above, number, catalyst)) is None:
            break
        kind = join_type(above)
        is_thumb = kind in ("LeftSemi", "LeftAnti") or (
            len(kept_sides(above)) == 2 and drops_rows(items(above.children())[1 - number], catalyst)
        )
        found.append(Place(moved, depth, f"above the join ({kind})", is_thumb))
        subtree = moved.plan
    return found


def _asked(node: Node, catalyst: Catalyst) -> tuple[Key, ...]:
    """For each call of a node the tuples that it asks about: not those without a prompt or without a value in any
    field, and not the rows that its mask leaves out."""
    make = catalyst.expressions
    keys = []
    for call in calls_of(node):
        condition = make.IsNotNull(call.prompt)
        if call.fields:
            condition = make.And(condition, make.IsNotNull(make.Coalesce(catalyst.seq(call.fields))))
        if call.mask is not None:
            condition = make.And(condition, call.mask)
        keys.append(Key((call.prompt, *call.fields), condition))
    return tuple(keys)


def _by_thumb(above: list[Place], label: str, context: Context) -> Place | None:
    """The highest place above a join whose other side is filtered."""
    best = next((place for place in reversed(above) if place.is_thumb), None)
    if best is None:
        _decline(context, label, "nothing is known of the rows around the join, and no side is filtered")
    else:
        context.notes.fired(NAME, label, f"{best.words}, whose other side is filtered; nothing is counted")
    return best


def _by_numbers(places: list[Place], counted: list[Tuples], calls: list[Call], context: Context) -> Place | None:
    asked = [
        float(sum(known.distinct)) if context.deduplicates else float(known.rows * len(calls)) for known in counted
    ]
    row_bytes = counted[0].row_bytes
    tokens = _tokens_per_call(calls, row_bytes, context)
    speed = context.speed_of(calls[0].spec)
    seconds = [
        ask_seconds(number, tokens, speed)
        + move_seconds(known.rows, row_bytes, context.slots)
        + known.rows * _PYTHON_ROW_SECONDS / context.slots
        for number, known in zip(asked, counted, strict=True)
    ]
    best = 0
    for i in range(1, len(places)):
        fewer_calls = asked[i] < asked[0] and (counted[0].is_counted or asked[i] < (1 - _LEAST_GAIN) * asked[0])
        fewer_rows = asked[i] <= asked[0] and counted[i].rows < (1 - _LEAST_GAIN) * counted[0].rows
        # Hardly any more calls, for rows that would cost far more.
        far_fewer = asked[i] <= (1 + _LEAST_GAIN) * asked[0] and seconds[i] < seconds[0] / 2
        if (fewer_calls or fewer_rows or far_fewer) and seconds[i] < seconds[best]:
            best = i
    how = "" if counted[0].is_counted else " by the catalog's statistics"
    label = calls[0].label
    here = f"{asked[0]:,.0f} calls in {counted[0].rows:,} rows"
    if best:
        there = f"{asked[best]:,.0f} calls in {counted[best].rows:,} rows"
        context.notes.fired(NAME, label, f"{places[best].words}: {there} instead of {here}{how}")
        return places[best]
    others = zip(places[1:], asked[1:], counted[1:], strict=True)
    seen = ", ".join(f"{place.words} {number:,.0f} in {known.rows:,}" for place, number, known in others)
    _decline(context, label, f"{here} where it stands{how}; {seen}")
    return None


def _decline(context: Context, label: str, why: str) -> None:
    """Note why the call stays; not of one that was moved before, for rules run until nothing changes any more."""
    if not any(note.rule == NAME and note.call == label and note.fired for note in context.notes.all()):
        context.notes.declined(NAME, label, why)


def _tokens_per_call(calls: list[Call], row_bytes: float | None, context: Context) -> float:
    """About the tokens that a call computes: its prompt and its answer."""
    texts = [call.prompt_text for call in calls]
    prompts = sum(context.lengths(calls[0].spec)(texts))
    answer = 0 if calls[0].spec.task == "embed" else _ANSWER_LENGTH
    return (prompts + (row_bytes or 0) / _BYTES_PER_TOKEN) / len(calls) + answer
