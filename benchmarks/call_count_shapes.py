"""Query shapes, with the least calls that each query's meaning allows; a test counts them, a page shows them.

The tables are small: ``t`` has 40 rows (id 0 to 39, k = id % 4, ``kind`` of 5 values, ``body`` of 40, ``maybe`` NULL in
every fourth row), ``d`` is a dimension of 8 keys, of which ``t`` has 4, ``s`` has 5 of t's ids, ``big`` has 2,000 rows.
The model is ``call_count_engine.fake_sums``: 'sum mod 4' over id answers 0, 1, 2, 3, 0 ...
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS = 40
BIG_ROWS = 2_000

TABLES = {
    "t": (
        "SELECT int(id) AS id, int(id % 4) AS k, concat('kind ', id % 5) AS kind, concat('text ', id) AS body,"
        f" CASE WHEN id % 4 > 0 THEN concat('known ', id) END AS maybe FROM range(0, {ROWS}, 1, 4)"
    ),
    "d": "SELECT int(id) AS k, concat('dim ', id) AS name FROM range(0, 8, 1, 2)",
    "s": "SELECT int(id * 8) AS id FROM range(0, 5, 1, 1)",
    "big": f"SELECT int(id) AS id FROM range(0, {BIG_ROWS}, 1, 4)",
}

A = "llm('sum mod 4', id)"
B = "llm('sum mod 3', id)"
KIND = "llm('echo', kind)"
PAIR = "llm('sum mod 4', x.id, y.k)"
R = f"(SELECT *, {A} AS r FROM t)"
SIX = "(SELECT id FROM t WHERE id < 6)"


@dataclass(frozen=True)
class Shape:
    """One query.

    least: calls that its meaning allows; most: the bound where a rule may spend more to learn, 0: ``least``. stock:
    calls that Spark makes without rules, None: it refuses the query. evaluated: rows for which the function may run at
    most, where the plan itself has to do better than let the engine fold equal rows. is_ordered: its rows have an
    order. whole: where a LIMIT may take any rows, the query that has all of them. means: the same rows without a call,
    where Spark refuses.
    """

    name: str
    sql: str
    least: int
    stock: int | None
    most: int = 0
    evaluated: int | None = None
    is_ordered: bool = False
    whole: str = ""
    means: str = ""

    @property
    def bound(self) -> int:
        return self.most or self.least


def make_tables(spark: SparkSession, folder: Path) -> None:
    """Write the tables as Parquet and make them temporary views of the session."""
    for name, sql in TABLES.items():
        spark.sql(sql).write.mode("overwrite").parquet(str(folder / name))
        spark.read.parquet(str(folder / name)).createOrReplaceTempView(name)


SHAPES = (
    # the same call in several places
    Shape("WHERE and SELECT", f"SELECT id, {A} AS r FROM t WHERE {A} > '0'", 40, 70, evaluated=40),
    Shape(
        "filter on the alias and a cheap filter", f"SELECT id, r FROM {R} WHERE r > '0' AND id < 4", 4, 7, evaluated=4
    ),
    Shape(
        "two filters on the alias",
        f"SELECT id, r FROM (SELECT * FROM {R} WHERE r > '0') WHERE r < '3'",
        40,
        60,
        evaluated=40,
    ),
    Shape("join on the alias", f"SELECT x.id, name FROM {R} x JOIN d ON int(x.r) = d.k", 40, 80, evaluated=40),
    Shape(
        "CTE joined with itself",
        f"WITH c AS (SELECT id, {A} AS r FROM t) SELECT x.id, y.id AS other FROM c x JOIN c y ON x.r = y.r",
        40,
        160,
        evaluated=40,
    ),
    Shape(
        "CTE used twice in a union",
        f"WITH c AS (SELECT id, {A} AS r FROM t) SELECT id, r FROM c WHERE r < '2' UNION ALL SELECT id, r FROM c",
        40,
        100,
        evaluated=40,
    ),
    Shape(
        "fields of a parsed answer",
        "SELECT id, p.a, p.b FROM (SELECT id, from_json(llm('json', id), 'a STRING, b STRING') AS p FROM t)",
        40,
        40,
    ),
    Shape(
        "an answer tested twice in CASE", f"SELECT CASE {A} WHEN '1' THEN 'x' WHEN '2' THEN 'y' END AS c FROM t", 40, 40
    ),
    Shape("nullif of the answer", f"SELECT id, nullif({A}, '1') AS r FROM t", 40, 40),
    Shape("answer that nobody reads", f"SELECT id FROM {R}", 0, 0),
    Shape("count over an answer that nobody reads", f"SELECT count(*) AS n FROM {R}", 0, 0),
    Shape("constant arguments", "SELECT id, llm('echo') AS r FROM t", 1, 40),
    # order and limit
    Shape(
        "ORDER BY another column", f"SELECT id, {A} AS r FROM t ORDER BY id DESC", 40, 80, is_ordered=True, evaluated=40
    ),
    Shape("ORDER BY the answer", f"SELECT id, {A} AS r FROM t ORDER BY r, id", 40, 80, is_ordered=True, evaluated=40),
    Shape(
        "ORDER BY another column LIMIT 3",
        f"SELECT id, {A} AS r FROM t ORDER BY id DESC LIMIT 3",
        3,
        40,
        is_ordered=True,
    ),
    Shape(
        "ORDER BY the answer LIMIT 3",
        f"SELECT id, {A} AS r FROM t ORDER BY r DESC, id LIMIT 3",
        40,
        40,
        is_ordered=True,
    ),
    Shape("LIMIT 3", f"SELECT id, {A} AS r FROM t LIMIT 3", 3, 3, whole=f"SELECT id, {A} AS r FROM t"),
    Shape(
        "WHERE on the answer LIMIT 3",
        "SELECT id FROM big WHERE llm('sum mod 2', id) = '1' LIMIT 3",
        5,
        1_000,
        most=2 * 6 + 2 * 8,
        whole="SELECT id FROM big WHERE id % 2 = 1",
    ),
    Shape(
        "LIMIT 3 over UNION ALL",
        f"SELECT id, {A} AS r FROM t UNION ALL SELECT id, {A} AS r FROM s LIMIT 3",
        3,
        3,
        whole=f"SELECT id, {A} AS r FROM t UNION ALL SELECT id, {A} AS r FROM s",
    ),
    Shape("LIMIT 3 OFFSET 5", f"SELECT id, {A} AS r FROM t ORDER BY id LIMIT 3 OFFSET 5", 3, 40, is_ordered=True),
    Shape("OFFSET 35", f"SELECT id, {A} AS r FROM t ORDER BY id OFFSET 35", 5, 80, is_ordered=True, evaluated=5),
    Shape(
        "LIMIT below a join on the answer's row",
        f"SELECT x.id, r, name FROM (SELECT * FROM {R} ORDER BY id LIMIT 4) x JOIN d ON x.k = d.k",
        4,
        40,
    ),
    Shape(
        "one row of each group by another column",
        f"SELECT id, r FROM (SELECT id, r, row_number() OVER (PARTITION BY k ORDER BY id) AS n FROM {R}) WHERE n = 1",
        4,
        40,
    ),
    # conditions around a call
    Shape("CASE", f"SELECT id, CASE WHEN k = 1 THEN {A} ELSE body END AS r FROM t", 10, 40),
    Shape("CASE with two calls", f"SELECT id, CASE WHEN k = 1 THEN {A} WHEN k = 2 THEN {B} END AS r FROM t", 20, 80),
    Shape("IF", f"SELECT id, if(k = 1, {A}, body) AS r FROM t", 10, 40),
    Shape("coalesce", f"SELECT id, coalesce(maybe, {A}) AS r FROM t", 10, 40),
    Shape("nvl", f"SELECT id, nvl(maybe, {A}) AS r FROM t", 10, 40),
    Shape("nvl2", f"SELECT id, nvl2(maybe, {A}, body) AS r FROM t", 30, 40),
    Shape("AND in SELECT", f"SELECT id, k = 1 AND {A} = '1' AS r FROM t", 10, 40),
    Shape("OR in SELECT", f"SELECT id, k = 1 OR {A} = '2' AS r FROM t", 30, 40),
    Shape("OR in WHERE", f"SELECT id FROM t WHERE k = 1 OR {A} = '2'", 30, 40),
    Shape("OR of two calls", f"SELECT id FROM t WHERE {A} = '1' OR {B} = '1'", 67, 80, most=70),
    Shape("AND with cheap conditions", f"SELECT id FROM t WHERE k = 1 AND {A} = '1' AND id < 12", 3, 3),
    Shape("count with a FILTER on the answer", f"SELECT count(*) FILTER (WHERE {A} = '1') AS n FROM t", 40, 40),
    Shape(
        "count with a cheap condition in its FILTER",
        f"SELECT count(*) FILTER (WHERE k = 1 AND {A} = '1') AS n FROM t",
        10,
        40,
    ),
    Shape("max of the answer with a FILTER", f"SELECT max({A}) FILTER (WHERE k = 1) AS r FROM t", 10, 40),
    Shape("sum of CASE", f"SELECT sum(CASE WHEN k = 1 THEN int({A}) ELSE 0 END) AS n FROM t", 10, 40),
    # several calls
    Shape(
        "two conditions on calls, the better one last",
        "SELECT id FROM big WHERE llm('sum mod 2', id) = '1' AND llm('sum mod 20', id) = '1'",
        BIG_ROWS + BIG_ROWS // 20,
        BIG_ROWS + BIG_ROWS // 2,
        most=BIG_ROWS + BIG_ROWS // 20 + (BIG_ROWS + BIG_ROWS // 20) // 20,
    ),
    Shape("two calls over the same fields", f"SELECT id, {A} AS r, {B} AS q FROM t", 80, 80),
    Shape("a call over the answer of another", f"SELECT id, llm('echo', r) AS q FROM {R}", 44, 80),
    Shape(
        "a call over two answers",
        f"SELECT id, llm('echo', r, q) AS a FROM (SELECT id, {A} AS r, {B} AS q FROM t)",
        92,
        120,
    ),
    # equal arguments
    Shape("GROUP BY the answer", f"SELECT {KIND} AS r, count(*) AS n FROM t GROUP BY 1", 5, 40, evaluated=5),
    Shape("DISTINCT answers", f"SELECT DISTINCT {KIND} AS r FROM t", 5, 40, evaluated=5),
    Shape("count of distinct answers", f"SELECT count(DISTINCT {KIND}) AS n FROM t", 5, 40, evaluated=5),
    Shape(
        "HAVING on a call over the key",
        f"SELECT kind, count(*) AS n FROM t GROUP BY kind HAVING {KIND} > 'kind 1'",
        5,
        40,
    ),
    Shape("max of answers by group", f"SELECT k, max({A}) AS r FROM t GROUP BY k", 40, 40),
    Shape("UNION of the same call", f"SELECT {KIND} AS r FROM t UNION SELECT {KIND} FROM t WHERE k = 1", 5, 50),
    Shape(
        "UNION ALL of the same call",
        f"SELECT id, {KIND} AS r FROM t UNION ALL SELECT k, {KIND} FROM t WHERE k = 1",
        5,
        50,
    ),
    Shape("explode", f"SELECT {A} AS r, e FROM t LATERAL VIEW explode(array(1, 2, 3)) v AS e", 40, 120),
    # joins beside a call
    Shape("dimension's column in SELECT", "SELECT id, llm('echo', name) AS r FROM t JOIN d ON t.k = d.k", 4, 40),
    Shape(
        "dimension's column in WHERE", "SELECT id FROM t JOIN d ON t.k = d.k WHERE llm('echo', name) > 'dim 1'", 4, 8
    ),
    Shape(
        "dimension's column below a selective join",
        "SELECT id, r FROM t JOIN (SELECT k, llm('echo', name) AS r FROM d) d ON t.k = d.k WHERE id < 2",
        2,
        8,
    ),
    Shape(
        "dimension's column in a LEFT JOIN",
        "SELECT id, llm('echo', name) AS r FROM t LEFT JOIN d ON t.k + 2 = d.k AND d.k < 4",
        2,
        20,
    ),
    Shape("call below a selective join", f"SELECT x.id, r FROM {R} x JOIN s ON x.id = s.id", 5, 40),
    Shape("call below a semi join", f"SELECT x.id, r FROM {R} x LEFT SEMI JOIN s ON x.id = s.id", 5, 40),
    Shape("call below an anti join", f"SELECT x.id, r FROM {R} x LEFT ANTI JOIN s ON x.id = s.id", 35, 40),
    # joins on a call
    Shape("JOIN ON a call", f"SELECT id, k FROM {SIX} x JOIN d y ON {PAIR} = '0'", 48, 48),
    Shape("JOIN ON a call and an equality", f"SELECT id, name FROM t x JOIN d y ON x.k = y.k AND {PAIR} = '0'", 40, 60),
    Shape(
        "JOIN ON a call over few distinct values",
        "SELECT id, k FROM (SELECT id, kind FROM t) x JOIN d y ON llm('sum mod 4', x.kind, y.name) = '0'",
        40,
        320,
    ),
    *(
        Shape(
            f"{kind} JOIN ON a call",
            f"SELECT * FROM {SIX} x {kind} JOIN d y ON {PAIR} = '0'",
            48,
            None,
            means=f"SELECT * FROM {SIX} x {kind} JOIN d y ON (x.id + y.k) % 4 = 0",
        )
        for kind in ("LEFT", "RIGHT", "FULL")
    ),
    # Of a left row's 8 pairs 2 match, so that rounds of 1, 2 and 4 pairs hold a match, in whichever order they come.
    *(
        Shape(
            f"LEFT {kind} JOIN ON a call",
            f"SELECT * FROM {SIX} x LEFT {kind} JOIN d y ON {PAIR} = '0'",
            6,
            None,
            most=6 * 7,
            means=f"SELECT * FROM {SIX} x LEFT {kind} JOIN d y ON (x.id + y.k) % 4 = 0",
        )
        for kind in ("SEMI", "ANTI")
    ),
    Shape(
        "LEFT SEMI JOIN ON a call that is always true",
        f"SELECT * FROM {SIX} x LEFT SEMI JOIN d y ON {PAIR} >= '0'",
        6,
        None,
        means=f"SELECT * FROM {SIX} x",
    ),
    Shape(
        "LEFT ANTI JOIN ON a call that is never true",
        f"SELECT * FROM {SIX} x LEFT ANTI JOIN d y ON {PAIR} = '4'",
        48,
        None,
        means=f"SELECT * FROM {SIX} x",
    ),
    # windows and subqueries
    Shape("window over the answer", f"SELECT id, rank() OVER (PARTITION BY k ORDER BY {A}, id) AS n FROM t", 40, 40),
    Shape("window by the answer", f"SELECT id, count(*) OVER (PARTITION BY {A}) AS n FROM t", 40, 40),
    Shape("scalar subquery", f"SELECT id, (SELECT max({A}) FROM t) AS r FROM s", 40, 40),
    Shape(
        "the same scalar subquery twice",
        f"SELECT id, (SELECT max({A}) FROM t) AS r FROM s WHERE (SELECT max({A}) FROM t) > '0'",
        40,
        40,
    ),
    Shape(
        "the same call in a scalar subquery",
        f"SELECT id FROM t WHERE {A} > (SELECT min({A}) FROM t)",
        40,
        80,
    ),
    Shape(
        "the same aggregate of a call in a scalar subquery",
        f"SELECT kind FROM t GROUP BY kind HAVING avg(int({A})) > (SELECT avg(int({A})) FROM t)",
        40,
        80,
    ),
    Shape(
        "EXISTS over a call",
        "SELECT id FROM t WHERE EXISTS (SELECT 1 FROM s WHERE s.id = t.id AND llm('sum mod 16', s.id) = '0')",
        5,
        5,
    ),
    Shape(
        "EXISTS over a call on pairs",
        f"SELECT id FROM {SIX} x WHERE EXISTS (SELECT 1 FROM d y WHERE {PAIR} = '0')",
        6,
        None,
        most=6 * 7,
        means=f"SELECT id FROM {SIX} x WHERE EXISTS (SELECT 1 FROM d y WHERE (x.id + y.k) % 4 = 0)",
    ),
    Shape("IN over answers", f"SELECT id FROM t WHERE k IN (SELECT int({A}) FROM t WHERE id < 2)", 2, 2),
)
