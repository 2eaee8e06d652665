"""Tables of the shape of those in Liu et al., "Optimizing LLM Queries in Relational Data Analytics Workloads"
(MLSys 2025, arXiv 2403.05821), which cannot ship, and the paper's 16 queries.

>>> from spark_llm.datasets import paper
>>> paper.table("beer", rows=3)["beer/name"].tolist()  # doctest: +SKIP
>>> paper.QUERIES["T1 movies"].sql  # doctest: +SKIP
"""

from spark_llm.datasets.paper.groups import disjoint_groups
from spark_llm.datasets.paper.queries import QUERIES, PaperQuery, instruction
from spark_llm.datasets.paper.tables import DISJOINT, TABLES, PaperTable, table

__all__ = [
    "DISJOINT",
    "QUERIES",
    "TABLES",
    "PaperQuery",
    "PaperTable",
    "disjoint_groups",
    "instruction",
    "table",
]
