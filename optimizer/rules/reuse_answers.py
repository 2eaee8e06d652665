"""A call that stands in several places of a query runs once.

before                                                    after
------                                                    -----
Project [id, pythonUDF0#10 AS r]                          Project [id, pythonUDF0#9 AS r]
+- ArrowEvalPython [llm(.., 'p', text)], [#10]            +- Filter (pythonUDF0#9 = 'yes')
   +- Project [id, text]                                     +- ArrowEvalPython [llm(.., 'p', text)], [#9]
      +- Filter (pythonUDF0#9 = 'yes')                          +- Relation [id, text]
         +- ArrowEvalPython [llm(.., 'p', text)], [#9]
            +- Relation [id, text]

Spark makes the left plan of a call in WHERE and SELECT, of a filter on the alias of a subquery's call, of a join on an
answer. The answer of the lower call is carried up instead, through whatever keeps a row's values: filters, sorts,
exchanges, limits, windows, generators, joins (from a side that they do not fill with NULLs). Arguments are compared by
what they are made of. A call without a mask serves one with a mask; where both see exactly the same rows, the lower
call asks for the rows of both. Calls that draw their answers without a seed are left alone.

Branches of a plan that ask the same of the same rows (a CTE used twice, a join of a DataFrame with itself) have no node
in common; there each gets an exchange above the call, and Spark runs equal exchanges once:

Join (r = r2)                                             Join (r = r2)
:- Project [id, #9 AS r]                                  :- RepartitionByExpression [id, r]
:  +- ArrowEvalPython [llm(.., 'p', text)], [#9]          :  +- Project [id, #9 AS r]
:     +- Relation [id, text]                              :     +- ArrowEvalPython [llm(.., 'p', text)], [#9]
+- Project [id2, #11 AS r2]                               :        +- Relation [id, text]
   +- ArrowEvalPython [llm(.., 'p', text2)], [#11]        +- (the same with id2, r2)
      +- Relation [id2, text2]

Branches that differ in the columns that they need, or by a filter that one has and another has not, are made alike
first: the filter goes above the exchange.
"""

from __future__ import annotations

from spark_llm.call import CallSpec
from spark_llm.optimizer.catalyst.bridge import Jvm, Node, elements
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import label_of

_NAME = "reuseAnswers"


def reuse_answers(plan: Node, context: Context) -> Node:
    """Let each call of ``plan`` take the answers of an equal call below it, where there is one."""
    keys = _repeated(plan, context)
    if not keys:
        return plan
    catalyst = context.catalyst
    changed, prompts = catalyst.questions("Reuse").reused(plan, catalyst.seq(keys), catalyst.seq(keys.values()))
    return _noted(plan, changed, prompts, "takes the answers of the same call below it", context)


def share_answers(plan: Node, context: Context) -> Node:
    """Let branches of ``plan`` that ask the same of the same rows end in the same exchange."""
    keys = _repeated(plan, context)
    if not keys:
        return plan
    changed, prompts = context.catalyst.questions("Sharing").shared(plan, context.catalyst.seq(keys))
    return _noted(plan, changed, prompts, "runs once for several branches, which read one exchange", context)


def _repeated(plan: Node, context: Context) -> dict[str, str]:
    """The specs of the calls of ``plan``, and what each asks for; empty where no two ask for the same."""
    if plan.isStreaming():
        return {}
    texts = str(context.catalyst.questions("Reuse").texts(plan)).split("\x1e")
    if len(texts) < 2:
        return {}
    keys = {text: _key(CallSpec.decode(text)) for text in dict.fromkeys(texts)}
    asked = [keys[text] for text in texts if keys[text]]
    if len({key[1:] for key in asked}) == len(asked):
        return {}
    return {text: key for text, key in keys.items() if key}


def _noted(plan: Node, changed: Node, prompts: Jvm, why: str, context: Context) -> Node:
    labels = [label_of(str(prompt)) for prompt in elements(prompts)]
    for label in labels:
        context.notes.fired(_NAME, label, why)
    return changed if labels else plan


def _key(spec: CallSpec) -> str:
    """What a call asks for, beside its arguments; after a sign of whether it has a mask. "": it may not be reused."""
    if not spec.is_repeatable:
        return ""
    return f"{'m' if spec.masked else '-'}{spec.order or ''} {spec.canonical().decode()}"
