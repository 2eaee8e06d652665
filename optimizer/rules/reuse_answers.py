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
"""

from __future__ import annotations

from spark_llm.call import CallSpec
from spark_llm.optimizer.catalyst.bridge import Node
from spark_llm.optimizer.catalyst.context import Context

_NAME = "reuseAnswers"


def reuse_answers(plan: Node, context: Context) -> Node:
    """Let each call of ``plan`` take the answers of an equal call below it, where there is one."""
    if plan.isStreaming():
        return plan
    catalyst = context.catalyst
    questions = catalyst.questions("Reuse")
    texts = str(questions.texts(plan)).split("\x1e")
    if len(texts) < 2:
        return plan
    keys = {text: _key(CallSpec.decode(text)) for text in texts}
    asked = [keys[text] for text in texts if keys[text]]
    if len({key[1:] for key in asked}) == len(asked):
        return plan
    known = [text for text, key in keys.items() if key]
    changed, prompts = questions.reused(plan, catalyst.seq(known), catalyst.seq(keys[text] for text in known))
    for prompt in prompts:
        label = str(prompt)[:60] or "(a prompt for each row)"
        context.notes.fired(_NAME, label, "takes the answers of the same call below it")
    return changed if len(prompts) else plan


def _key(spec: CallSpec) -> str:
    """What a call asks for, beside its arguments; after a sign of whether it has a mask. "": it may not be reused."""
    if not spec.is_repeatable:
        return ""
    return f"{'m' if spec.masked else '-'}{spec.order or ''} {spec.canonical().decode()}"
