"""What is known of the rows that reach a call: from the catalog, from a sampled Spark job, or from the plan alone.

``Statistics.of(call, context)`` is the door; planning never calls a model (CONTRACTS.md 11).
"""

from spark_llm.optimizer.statistics.service import Statistics
from spark_llm.optimizer.statistics.values import ColumnCounts, InputStatistics

__all__ = ["ColumnCounts", "InputStatistics", "Statistics"]
