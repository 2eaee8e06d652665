"""A query does not spend more than its budget.

before                                         after
------                                         -----
ArrowEvalPython [llm({spec}, 'p', info)]       ArrowEvalPython [llm({spec, budget: {calls: 250}}, 'p', info)]
+- Relation [info]                             +- Relation [info]

(With ``spark.llm.budget.maxCalls = 1000`` and four engines. Each engine counts what it does for the query, in all its
calls, and stops at its share.) Where rows were counted, by the catalog or a job, and what they come to is beyond the
budget, the query is refused before its first call, unless the user takes what the budget pays for
(``onExceeded = partial``). An estimate knows nothing of the result cache. Bounds and guesses refuse nothing: the
engines see to the budget then.

Runs last, as the plan then has the calls that will be asked; and wherever there is a budget, whatever other rules do.
"""

from __future__ import annotations

import logging
import math

import msgspec

from spark_llm.call import Budget, CallSpec
from spark_llm.errors import LlmError
from spark_llm.optimizer.catalyst.bridge import Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.runner import Refusal
from spark_llm.optimizer.cost import Number, total
from spark_llm.optimizer.estimates import estimates
from spark_llm.optimizer.rules.calls import Call, change_specs, no_function

logger = logging.getLogger("spark_llm.optimizer")

RULE = "keepBudget"
_SLACK = 1.1  # by which an estimate that is not exact must be beyond a limit
_TIME_SLACK = 2.0


def keep_budget(plan: Node, context: Context) -> Node:
    """Write the budget into the calls of ``plan``. Raises Refusal where counted rows are beyond it."""
    budget = context.budget
    if not (budget.calls or budget.length or budget.seconds):
        return plan
    share = engine_share(budget, context.engines)

    def kept(call: Call) -> CallSpec:
        return msgspec.structs.replace(call.spec, budget=share)

    changed = change_specs(plan, context.catalyst, kept, no_function)
    if changed is not plan:
        context.notes.fired(RULE, "", f"each engine stops at {_said(share)}")
        if not (context.explaining or budget.partial or plan.isStreaming()):
            _refuse_beyond(budget, changed, context)
    return changed


def engine_share(budget: Budget, engines: int) -> Budget:
    """What one of so many engines may spend; all of them have the same time."""
    return msgspec.structs.replace(
        budget, calls=math.ceil(budget.calls / engines), length=math.ceil(budget.length / engines)
    )


def _said(share: Budget) -> str:
    limits = [f"{share.calls:,} calls"] if share.calls else []
    limits += [f"{share.length:,} tokens"] if share.length else []
    limits += [f"{share.seconds:g} s"] if share.seconds else []
    return ", ".join(limits) + (", the rest is NULL" if share.partial else ", the query fails then")


def _refuse_beyond(budget: Budget, plan: Node, context: Context) -> None:
    """Answers may be short and rows masked: what is sure is the length of the prompts of calls that were counted."""
    try:
        found = estimates(plan, context)
    except Exception:  # the budget must stand in the plan whatever an estimate runs into
        logger.warning("The query's cost is not known; its budget is kept while it runs.", exc_info=True)
        return
    costs = [estimate.cost for estimate in found]
    timed = [each.cost for each in found if each.call.spec.task == "generate"]  # the speed of encoders is not measured
    calls = _counted([cost.calls for cost in costs])
    length = _counted([cost.prompt_tokens for cost in costs])
    computed = _counted([cost.prompt_tokens.minus(cost.hits) for cost in timed if cost.prompt_tokens.is_counted])
    said = f"it would make {_plain(calls)} calls"
    if is_beyond(calls, budget.calls, _SLACK):
        _refuse("maxCalls", f"{budget.calls:,}", said)
    if is_beyond(length, budget.length, _SLACK):
        _refuse("maxLength", f"{budget.length:,}", f"{said}, whose prompts have {_plain(length)} tokens")
    seconds = context.speed.seconds(computed)
    if context.is_speed_measured and is_beyond(computed, budget.seconds * _rate(context), _TIME_SLACK):
        _refuse("maxTime", f"{budget.seconds:g} s", f"{said}, which take {_plain(seconds)} s")


def _rate(context: Context) -> float:
    return context.speed.tokens_per_second * context.speed.engines


def _refuse(key: str, limit: str, spent: str) -> None:
    spent += " by an estimate, which leaves the result cache out"
    raise Refusal(LlmError("LLM_BUDGET_EXCEEDED", key=f"spark.llm.budget.{key}", limit=limit, spent=spent))


def _counted(numbers: list[Number]) -> Number:
    """The sum of those that were counted."""
    return total([number for number in numbers if number.is_counted])


def is_beyond(estimate: Number, limit: float, slack: float) -> bool:
    """Is what was counted beyond the limit? 0 is no limit. slack: by how much, where the estimate is not exact."""
    if not limit or not estimate.is_counted or estimate.value is None:
        return False
    return estimate.value > limit * (1 if estimate.kind == "exact" else slack)


def _plain(number: Number) -> str:
    return ("" if number.kind == "exact" else "about ") + f"{number.value or 0:,.0f}"
