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
    """Tables t(id, a, b, n) and u(k, c), and a query over them.

    reference: what has the same rows where Spark refuses the query without rules. is_ordered: by all its columns.
    limit: rows that are asked of the query, whichever they are; 0: all. competes: conditions on several calls drop
    rows, and which of them is asked first is for the rules to find out.
    """

    t: Rows
    u: list[tuple[int, str | None]]
    query: str
    reference: str
    is_ordered: bool
    limit: int
    competes: bool

    @property
    def limited(self) -> str:
        """The query with its limit."""
        return f"SELECT * FROM ({self.query}) LIMIT {self.limit}" if self.limit else self.query

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

# Answers are hexadecimal digits, or NULL. Ids are unique in all sources.
SHAPES = [
    # projections, filters, nesting
    "SELECT id, {0} AS r FROM {s}",
    "SELECT {0} AS r, {1} AS s FROM {s}",
    "SELECT {0} AS r, {0} AS s, {1} AS u FROM {s}",
    "SELECT id, {0} AS r FROM {s} WHERE {0} < 'b'",
    "SELECT id, {0} AS r FROM {s} WHERE {1} > '4' AND n IS NOT NULL",
    "SELECT id, r FROM (SELECT * FROM (SELECT id, n, {0} AS r FROM {s}) WHERE r > '2') WHERE r < 'd' AND n < 2",
    "SELECT id, llm('outer', answer => r, b) AS r FROM (SELECT id, b, {0} AS r FROM {s})",
    "SELECT id, llm('outer', r) AS r, r AS s FROM (SELECT id, {0} AS r FROM {s}) WHERE r > '3'",
    "SELECT id, v AS r FROM {s} LATERAL VIEW explode(array({0}, {1})) e AS v",
    "SELECT id, {0} AS r, v AS s FROM {s} LATERAL VIEW explode(array(1, 2, n)) e AS v",
    # conditions around calls
    "SELECT id, CASE WHEN n = 1 THEN {0} WHEN n = 2 THEN {1} END AS r FROM {s}",
    "SELECT id, CASE WHEN n = 1 THEN {0} ELSE coalesce(b, {1}) END AS r FROM {s}",
    "SELECT id, CASE WHEN {0} > '8' THEN {1} ELSE {0} END AS r FROM {s}",
    "SELECT id, if(n > 0, {0}, {1}) AS r, nvl2(a, {0}, b) AS s FROM {s}",
    "SELECT id, n = 1 AND {0} > '6' AS r, nullif({1}, a) AS s FROM {s}",
    "SELECT id, n = 1 OR {0} > '6' AS r, NOT (n = 2 AND {1} < 'a') AS s FROM {s}",
    "SELECT id FROM {s} WHERE {0} > '4' OR {1} > '4'",
    "SELECT id FROM {s} WHERE n = 1 OR {0} > '8'",
    "SELECT id, coalesce(b, {0}, {1}) AS r FROM {s} WHERE {0} > '2' OR n IS NULL",
    "SELECT id FROM {s} WHERE NOT ({0} > '4' AND n > 0)",
    # aggregates
    "SELECT r, count(*) AS s FROM (SELECT {0} AS r FROM {s}) GROUP BY r",
    "SELECT n, max({0}) AS r, count(DISTINCT {1}) AS s FROM {s} GROUP BY n",
    "SELECT n, count(*) FILTER (WHERE n > 0 AND {0} > '6') AS r, max({1}) FILTER (WHERE n = 1) AS s FROM {s}"
    " GROUP BY n",
    "SELECT a, count(*) AS r FROM {s} GROUP BY a HAVING max({0}) > '4'",
    "SELECT a, n FROM {s} GROUP BY a, n HAVING llm('p', a) > '4' AND count(*) > 0",
    "SELECT {0} AS r, sum(CASE WHEN {1} > '6' THEN n ELSE 0 END) AS s FROM {s} GROUP BY 1 HAVING count(*) > 1",
    "SELECT count(DISTINCT {0}) AS r, count({1}) AS s, count(*) AS u FROM {s}",
    "SELECT n, {0} AS r, sum(id) AS s, min(b) AS u FROM {s} GROUP BY n, {0}",
    "SELECT DISTINCT {0} AS r FROM {s}",
    "SELECT DISTINCT n, {0} AS r, {1} AS s FROM {s}",
    # CTEs, unions, subqueries
    "WITH c AS (SELECT id, {0} AS r FROM {s}) SELECT x.id, y.id AS s, x.r FROM c x JOIN c y ON x.r = y.r",
    "WITH c AS (SELECT id, {0} AS r FROM {s}) SELECT id, r FROM c WHERE r < '8' UNION ALL SELECT id, r FROM c",
    "WITH c AS (SELECT id, n, {0} AS r FROM {s}) SELECT id, r FROM c WHERE n IN (SELECT n FROM c WHERE r > '7')",
    "SELECT id, {0} AS r FROM {s} UNION ALL SELECT id, {1} FROM t",
    "SELECT {0} AS r FROM {s} UNION SELECT {0} FROM {s} WHERE n > 0",
    "SELECT id, {0} AS r FROM {s} UNION ALL SELECT id, {0} FROM t WHERE n > 0",
    "SELECT {0} AS r FROM {s} EXCEPT SELECT {1} FROM {s}",
    "SELECT id, (SELECT max({0}) FROM t) AS r, {1} AS s FROM {s}",
    "SELECT id, {0} AS r FROM {s} WHERE n IN (SELECT n FROM t WHERE {0} > '6')",
    "SELECT id, {0} AS r FROM {s} x WHERE EXISTS (SELECT 1 FROM u WHERE u.k = x.n AND llm('p', u.c) > '4')",
    "SELECT id FROM {s} WHERE {0} NOT IN (SELECT {1} FROM t WHERE n = 1)",
    # windows, limits
    "SELECT id, rank() OVER (PARTITION BY n ORDER BY r, id) AS r FROM (SELECT id, n, {0} AS r FROM {s})",
    "SELECT * FROM (SELECT id, {0} AS r, row_number() OVER (PARTITION BY n ORDER BY id) AS s FROM {s}) WHERE s = 1",
    "SELECT id, count(*) OVER (PARTITION BY {0}) AS r, {1} AS s FROM {s}",
    "SELECT id, lag({0}) OVER (PARTITION BY n ORDER BY id) AS r FROM {s} WHERE {1} > '2'",
    "SELECT id, {0} AS r FROM (SELECT * FROM {s} ORDER BY id LIMIT 4)",
    "SELECT id, r FROM (SELECT id, {0} AS r, {1} AS s FROM {s} ORDER BY id DESC LIMIT 5) WHERE s > '4'",
    "SELECT x.id, x.r, c FROM (SELECT id, n, {0} AS r FROM {s} ORDER BY r, id LIMIT 3) x LEFT JOIN u ON x.n = u.k",
    # joins beside calls
    "SELECT x.id, x.r, c FROM (SELECT id, n, {0} AS r FROM {s}) x LEFT JOIN u ON x.n = u.k",
    "SELECT x.id, x.r, c FROM (SELECT id, n, {0} AS r FROM {s}) x FULL JOIN u ON x.n = u.k AND x.r > '4'",
    "SELECT x.id, x.r FROM (SELECT id, n, {0} AS r FROM {s}) x LEFT SEMI JOIN u ON x.n = u.k",
    "SELECT x.id, x.r FROM (SELECT id, n, {0} AS r FROM {s}) x LEFT ANTI JOIN u ON x.n = u.k",
    "SELECT x.id, {0} AS r, llm('p', c) AS s FROM {s} x JOIN u ON x.n = u.k",
    "SELECT x.id, x.r, y.r AS s FROM (SELECT id, n, {0} AS r FROM {s}) x"
    " JOIN (SELECT k, llm('p', c) AS r FROM u) y ON x.n = y.k WHERE y.r > '4'",
    "SELECT x.id, x.r FROM (SELECT id, n, {0} AS r FROM {s}) x RIGHT JOIN (SELECT k FROM u WHERE k = 1) y ON x.n = y.k",
]

COMPETING = [
    "SELECT id, a FROM {s} WHERE {0} > '4' AND {1} > '8'",
    "SELECT id, {0} AS r FROM {s} WHERE {1} > '2' AND n > 0 AND {0} < 'c'",
    "SELECT n, count(*) AS r FROM {s} WHERE {0} > '4' AND {1} > '2' AND llm('third', a) < 'e' GROUP BY n",
    "SELECT x.id, c FROM {s} x JOIN u ON x.n = u.k WHERE {0} > '3' AND llm('p', c) < 'd'",
]

# Joins on a call: the query, and the same rows without a join on a call. c: the condition.
PAIRS = "WITH p AS (SELECT x.id, y.k FROM {s} x CROSS JOIN u y WHERE {c})"
JOINS = [
    ("SELECT x.id, y.k FROM {s} x JOIN u y ON {c}", "SELECT id, k FROM p"),
    ("SELECT x.id, y.k FROM {s} x LEFT JOIN u y ON {c}", "SELECT x.id, p.k FROM {s} x LEFT JOIN p ON x.id = p.id"),
    ("SELECT x.id, y.k FROM {s} x RIGHT JOIN u y ON {c}", "SELECT p.id, y.k FROM p RIGHT JOIN u y ON p.k = y.k"),
    (
        "SELECT x.id, y.k FROM {s} x FULL JOIN u y ON {c}",
        "SELECT id, k FROM p UNION ALL SELECT id, NULL FROM {s} WHERE id NOT IN (SELECT id FROM p)"
        " UNION ALL SELECT NULL, k FROM u WHERE k NOT IN (SELECT k FROM p)",
    ),
    ("SELECT id, a FROM {s} x LEFT SEMI JOIN u y ON {c}", "SELECT id, a FROM {s} WHERE id IN (SELECT id FROM p)"),
    ("SELECT id, a FROM {s} x LEFT ANTI JOIN u y ON {c}", "SELECT id, a FROM {s} WHERE id NOT IN (SELECT id FROM p)"),
]
CONDITIONS = [
    "llm('pair', x.a, y.c) > '6'",
    "llm('pair', x.a, y.c) > '6' AND x.n = y.k",
    "llm('pair', x.id, x.b, c => y.c) < 'a' AND x.id > y.k",
    "llm('pair', x.b, y.k) > '4' AND llm('left', x.a) > '3'",
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A case; its queries have no LIMIT without an ORDER BY, whose rows are anybody's guess, but for ``limit``."""
    source = draw(st.sampled_from(sorted(SOURCES)))
    columns = SOURCES[source]
    dimension = draw(st.lists(TEXTS, min_size=1, max_size=3))
    shape = draw(st.sampled_from([*SHAPES, *COMPETING, *JOINS]))
    competes = shape in COMPETING
    if isinstance(shape, tuple):
        condition = draw(st.sampled_from(CONDITIONS))
        query = shape[0].format(s=source, c=condition)
        reference = f"{PAIRS} {shape[1]}".format(s=source, c=condition)
        competes = condition.count("llm") > 1
    else:
        # In half of the cases the calls ask about the same fields, as those that share do.
        first = draw(calls(columns))
        second = first.replace("llm('p'", "llm('also'") if draw(st.booleans()) else draw(calls(columns))
        query = reference = shape.format(first, second, s=source)
    end = draw(st.sampled_from(["", "", "", "limit", "order", "order", "top", "offset"]))
    if end in ("order", "top", "offset"):
        rest = {"order": "", "top": " LIMIT 3", "offset": " LIMIT 2 OFFSET 1"}[end]
        query, reference = (f"SELECT * FROM ({each}) ORDER BY ALL{rest}" for each in (query, reference))
    limit = draw(st.integers(1, 4)) if end == "limit" else 0
    return Case(
        t=draw(TABLE),
        u=list(enumerate(dimension)),
        query=query,
        reference=reference,
        is_ordered=end in ("order", "top", "offset"),
        limit=limit,
        competes=competes,
    )
