"""The plan rules, one a file. This tuple is what the optimizer does, in this order."""

from __future__ import annotations

from spark_llm.optimizer.catalyst.runner import Rule
from spark_llm.optimizer.rules.order_rows import order_rows

RULES: tuple[Rule, ...] = (Rule("orderRows", order_rows),)
