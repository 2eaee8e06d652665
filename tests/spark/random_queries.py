"""Random tables and random queries with llm() calls, for property tests of the rules."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from pyspark.sql import SparkSession

Rows = list[tuple[str | None, str | None, int | None]]

TEXTS = st.sampled_from(["x", "a longer text that is shared", "y z", "1", '"quoted": {', "two\nlines", "", None])
NUMBERS = st.sampled_from([0, 1, 2, None])
TABLE = st.lists(st.tuples(TEXTS, TEXTS, NUMBERS), max_size=14)


@dataclass(frozen=True)
class Case:
    """Tables t(id, a, b, n) and u(k, c), and a query over them; ``is_ordered``: by all its columns."""

    t: Rows
    u: list[tuple[int, str | None]]
    query: str
    is_ordered: bool

    def make(self, spark: SparkSession, partitions: int) -> None:
        """Make the tables as temporary views."""
        columns = [[row[i] for row in self.t] for i in range(3)]
        a, b, n = (_column(values, kind) for values, kind in zip(columns, ("STRING", "STRING", "INT"), strict=True))
        spark.sql(
            f"CREATE OR REPLACE TEMP VIEW t AS SELECT int(id) AS id, {a} AS a, {b} AS b, {n} AS n"
            f" FROM range(0, {len(self.t)}, 1, {partitions})"
        )
        values = ", ".join(f"({k}, {_literal(c)})" for k, c in self.u)
        spark.sql(f"CREATE OR REPLACE TEMP VIEW u AS SELECT * FROM VALUES {values} AS u(k, c)")


def _column(values: list[str | int | None] | list[str | None], kind: str) -> str:
    return f"get(CAST(array({', '.join(map(_literal, values))}) AS ARRAY<{kind}>), int(id))"


def _literal(value: str | int | None) -> str:
    if value is None:
        return "NULL"
    return f"r'{value}'" if isinstance(value, str) and "\n" not in value else repr(value)


@st.composite
def calls(draw: st.DrawFn, columns: tuple[str, ...]) -> str:
    """A call over some of the columns."""
    prompt = draw(st.sampled_from(["'p'", "'p'", "'q'", columns[1], f"concat('r ', {columns[1]})"]))
    fields = draw(st.lists(st.sampled_from([*columns, f"w => upper({columns[1]})"]), max_size=3, unique=True))
    option = draw(st.sampled_from(["", "", "", ", max_tokens => 3", ", temperature => 0.5, seed => 7"]))
    return f"llm({', '.join([prompt, *fields])}{option})"


SOURCES = {
    "t": ("id", "a", "b", "n"),
    "(SELECT * FROM t WHERE n > 0)": ("id", "a", "b", "n"),
    "(SELECT id, a, c AS b, n FROM t JOIN u ON t.n = u.k)": ("id", "a", "b", "n"),
    "(SELECT id, a, c AS b, k AS n FROM t LEFT JOIN u ON t.n = u.k)": ("id", "a", "b", "n"),
    "(SELECT max(id) AS id, a, min(b) AS b, n FROM t GROUP BY a, n)": ("id", "a", "b", "n"),
    "(SELECT id, a, b, n FROM t UNION ALL SELECT id + 100, b, a, n FROM t)": ("id", "a", "b", "n"),
    "(SELECT id, concat(a, b) AS a, b, n FROM t)": ("id", "a", "b", "n"),
}

# Answers are hexadecimal digits, or NULL.
SHAPES = [
    "SELECT id, {0} AS r FROM {s}",
    "SELECT {0} AS r, {1} AS s FROM {s}",
    "SELECT {0} AS r, {0} AS s, {1} AS u FROM {s}",
    "SELECT id, {0} AS r FROM {s} WHERE {0} < 'b'",
    "SELECT id, {0} AS r FROM {s} WHERE {1} > '4' AND n IS NOT NULL",
    "SELECT id FROM {s} WHERE {0} > '4' OR {1} > '4'",
    "SELECT r, count(*) AS s FROM (SELECT {0} AS r FROM {s}) GROUP BY r",
    "SELECT n, max({0}) AS r, count(DISTINCT {1}) AS s FROM {s} GROUP BY n",
    "SELECT DISTINCT {0} AS r FROM {s}",
    "WITH c AS (SELECT id, {0} AS r FROM {s}) SELECT x.id, y.id AS s, x.r FROM c x JOIN c y ON x.r = y.r",
    "WITH c AS (SELECT id, {0} AS r FROM {s}) SELECT id, r FROM c WHERE r < '8' UNION ALL SELECT id, r FROM c",
    "SELECT id, {0} AS r FROM {s} UNION ALL SELECT id, {1} FROM t",
    "SELECT id, llm('outer', answer => r, b) AS r FROM (SELECT id, b, {0} AS r FROM {s})",
    "SELECT id, (SELECT max({0}) FROM t) AS r, {1} AS s FROM {s}",
    "SELECT id, {0} AS r FROM {s} WHERE n IN (SELECT n FROM t WHERE {0} > '6')",
    "SELECT id, rank() OVER (PARTITION BY n ORDER BY r, id) AS r FROM (SELECT id, n, {0} AS r FROM {s})",
    "SELECT x.id, x.r, c FROM (SELECT id, n, {0} AS r FROM {s}) x LEFT JOIN u ON x.n = u.k",
    "SELECT id, CASE WHEN n = 1 THEN {0} WHEN n = 2 THEN {1} END AS r FROM {s}",
    "SELECT id, v AS r FROM {s} LATERAL VIEW explode(array({0}, {1})) e AS v",
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A case; its queries have no LIMIT without an ORDER BY, whose rows are anybody's guess."""
    source = draw(st.sampled_from(sorted(SOURCES)))
    columns = SOURCES[source]
    # In half of the cases the calls ask about the same fields, as those that share do.
    first = draw(calls(columns))
    second = first.replace("llm('p'", "llm('also'") if draw(st.booleans()) else draw(calls(columns))
    query = draw(st.sampled_from(SHAPES)).format(first, second, s=source)
    is_ordered = draw(st.booleans())
    if is_ordered:
        limit = draw(st.sampled_from(["", " LIMIT 3", " LIMIT 2 OFFSET 1"]))
        query = f"SELECT * FROM ({query}) ORDER BY ALL{limit}"
    dimension = draw(st.lists(TEXTS, min_size=1, max_size=3))
    return Case(draw(TABLE), list(enumerate(dimension)), query, is_ordered)
