"""Runs the rules over one plan so that a rule can cost a query time, but never its result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

from spark_llm.errors import LlmError
from spark_llm.optimizer.catalyst.bridge import Node
from spark_llm.optimizer.catalyst.context import Context

logger = logging.getLogger("spark_llm.optimizer")


class Refusal(Exception):
    """A rule refuses to run the query, as the user asked for (a budget, a limit of pairs); ``error`` is what they see.

    Not for plans that are only explained.
    """

    def __init__(self, error: LlmError) -> None:
        super().__init__(str(error))
        self.error = error


class Rule(NamedTuple):
    """A plan rule; it runs where ``spark.llm.optimizer.<name>.enabled`` holds.

    ``apply`` is total and idempotent, and returns the plan that it got where it has nothing to do.
    """

    name: str
    apply: Callable[[Node, Context], Node]


def run_rules(plan: Node, rules: Iterable[Rule], enabled: Container[str], context: Context) -> Node:
    """``plan`` after those ``rules`` that are enabled. A rule that throws, or whose plan is unsound, is skipped.

    Raises the LlmError of a Refusal.
    """
    for rule in rules:
        if rule.name not in enabled:
            continue
        try:
            changed = rule.apply(plan, context)
            problem = context.catalyst.problem(plan, changed)
        except Refusal as refusal:
            raise refusal.error from None
        except Exception:
            logger.warning("Rule %s failed; the plan stays as it was.", rule.name, exc_info=True)
            continue
        if problem:
            logger.warning("Rule %s made a wrong plan (%s); the plan stays as it was.", rule.name, problem)
        else:
            plan = changed
    return plan
