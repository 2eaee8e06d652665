"""Regular expressions and JSON Schemas of calls, checked while the query is analysed and not when it runs."""

from __future__ import annotations

import functools

from spark_llm.call import AnswerForm
from spark_llm.call_settings import constraint


@functools.lru_cache(maxsize=512)
def check(form: AnswerForm) -> None:
    """Raises LLM_INVALID_CONSTRAINT for a form that an engine could not keep answers to: malformed, with a keyword of
    JSON Schema that is not known, or one that no text keeps to.

    The engines' own library says so, which needs no model. Where the driver is without it, engines say the same later.
    """
    held = constraint(form)
    if held is None or held.kind == "choices":
        return
    try:
        from spark_llm.engine.constraints import schema
    except ImportError:
        return
    schema.check(held)
