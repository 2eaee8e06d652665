"""Twenty analytic queries with one to three calls, and how an expert writes each for a Spark that knows no calls.

``sql`` is what a user writes. ``by_hand`` makes the same rows in steps: filter first, ask each distinct text once, keep
the answers, join them back. Both go by ``Hand``, which puts the options into calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from call_count_hand import Hand


@dataclass(frozen=True)
class Query:
    """limit: how many rows it has, whichever; 0: all of them. refused: stock Spark does not run it."""

    name: str
    sql: str
    by_hand: Callable[[Hand], Sequence[Any]]
    limit: int = 0
    refused: bool = False


def steps(*kept: tuple[str, str], last: str) -> Callable[[Hand], Sequence[Any]]:
    """Views kept one after the other, then the query."""

    def run(hand: Hand) -> Sequence[Any]:
        for name, sql in kept:
            hand.keep(name, sql)
        return hand.rows(last)

    return run


def first_complaints(hand: Hand) -> Sequence[Any]:
    """Ask in portions that double until there are ten."""
    found: list[Any] = []
    start, size = 0, 8
    while len(found) < 10:
        hand.keep(
            "portion", f"SELECT review_id, review FROM reviews WHERE review_id BETWEEN {start} AND {start + size - 1}"
        )
        hand.keep("asked", "SELECT review, <POSITIVE> AS p FROM (SELECT DISTINCT review FROM portion)")
        portion = hand.rows("SELECT review_id, review FROM portion JOIN asked USING (review) WHERE p = 'No'")
        found += portion
        start, size = start + size, size * 2
        if start > 1_000_000:
            break
    return found[:10]


DISTINCT_REVIEWS = "(SELECT DISTINCT review FROM reviews)"

QUERIES = (
    Query(
        "revenue by kind of item",
        "SELECT <KIND> AS kind, round(sum(quantity * price), 2) AS revenue FROM sales"
        " JOIN items USING (item_id) GROUP BY 1",
        steps(
            ("k", "SELECT item_id, <KIND> AS kind FROM items LEFT SEMI JOIN sales USING (item_id)"),
            last="SELECT kind, round(sum(quantity * price), 2) AS revenue FROM sales JOIN k USING (item_id) GROUP BY 1",
        ),
    ),
    Query(
        "luxuries sold in spring",
        "SELECT city, sum(quantity) AS sold FROM sales JOIN items USING (item_id) JOIN customers USING (customer_id)"
        " WHERE <LUXURY> = 'Yes' AND day BETWEEN 60 AND 75 AND city <> 'Oslo' GROUP BY city",
        steps(
            (
                "spring",
                "SELECT item_id, city, quantity FROM sales JOIN customers USING (customer_id)"
                " WHERE day BETWEEN 60 AND 75 AND city <> 'Oslo'",
            ),
            ("l", "SELECT item_id, <LUXURY> AS l FROM items LEFT SEMI JOIN spring USING (item_id)"),
            last="SELECT city, sum(quantity) AS sold FROM spring JOIN l USING (item_id) WHERE l = 'Yes' GROUP BY city",
        ),
    ),
    Query(
        "share of good reviews by category",
        "SELECT category, avg(CASE WHEN <POSITIVE> = 'Yes' THEN 1.0 ELSE 0.0 END) AS share"
        " FROM reviews JOIN items USING (item_id) GROUP BY category",
        steps(
            ("p", f"SELECT review, <POSITIVE> AS p FROM {DISTINCT_REVIEWS}"),
            last="SELECT category, avg(CASE WHEN p = 'Yes' THEN 1.0 ELSE 0.0 END) AS share"
            " FROM reviews JOIN items USING (item_id) JOIN p USING (review) GROUP BY category",
        ),
    ),
    Query(
        "slogans of the best sellers",
        "SELECT name, slogan, sold FROM (SELECT item_id, name, <SLOGAN> AS slogan, sum(quantity) AS sold"
        " FROM sales JOIN items USING (item_id) GROUP BY item_id, name, description)"
        " ORDER BY sold DESC, item_id LIMIT 10",
        steps(
            (
                "best",
                "SELECT item_id, name, description, sum(quantity) AS sold FROM sales JOIN items USING (item_id)"
                " GROUP BY ALL ORDER BY sold DESC, item_id LIMIT 10",
            ),
            last="SELECT name, <SLOGAN> AS slogan, sold FROM (SELECT * FROM best ORDER BY sold DESC, item_id)",
        ),
    ),
    Query(
        "ten complaints",
        "SELECT review_id, review FROM reviews WHERE <POSITIVE> = 'No' LIMIT 10",
        first_complaints,
        limit=10,
    ),
    Query(
        "happy about the price",
        "SELECT review_id FROM reviews WHERE <POSITIVE> = 'Yes' AND <TOPIC> = 'price' AND stars > 1",
        steps(
            ("d", "SELECT DISTINCT review FROM reviews WHERE stars > 1"),
            ("x", "SELECT review, <TOPIC> AS t FROM d"),
            ("y", "SELECT review, <POSITIVE> AS p FROM x WHERE t = 'price'"),
            last="SELECT review_id FROM reviews JOIN y USING (review) WHERE p = 'Yes' AND stars > 1",
        ),
    ),
    Query(
        "what to do about each review",
        "SELECT review_id, CASE WHEN stars >= 4 THEN 'nothing' WHEN stars = 3 THEN <TOPIC> ELSE <URGENCY> END AS what"
        " FROM reviews",
        steps(
            ("x", "SELECT review, <TOPIC> AS t FROM (SELECT DISTINCT review FROM reviews WHERE stars = 3)"),
            ("y", "SELECT review, <URGENCY> AS u FROM (SELECT DISTINCT review FROM reviews WHERE stars < 3)"),
            last="SELECT review_id, CASE WHEN stars >= 4 THEN 'nothing' WHEN stars = 3 THEN t ELSE u END AS what"
            " FROM reviews LEFT JOIN x USING (review) LEFT JOIN y USING (review)",
        ),
    ),
    Query(
        "categories, the missing ones guessed",
        "SELECT coalesce(category, <KIND>) AS c, count(*) AS n FROM items GROUP BY 1",
        steps(
            ("k", "SELECT item_id, <KIND> AS kind FROM items WHERE category IS NULL"),
            last="SELECT coalesce(category, kind) AS c, count(*) AS n FROM items"
            " LEFT JOIN k USING (item_id) GROUP BY 1",
        ),
    ),
    Query(
        "topics in order",
        "SELECT <TOPIC> AS topic, review_id FROM reviews WHERE <TOPIC> <> 'design' ORDER BY topic, review_id",
        steps(
            ("x", f"SELECT review, <TOPIC> AS topic FROM {DISTINCT_REVIEWS}"),
            last="SELECT topic, review_id FROM reviews JOIN x USING (review) WHERE topic <> 'design' ORDER BY 1, 2",
        ),
    ),
    Query(
        "topics of an item against all",
        "WITH c AS (SELECT item_id, <TOPIC> AS topic FROM reviews)"
        " SELECT item_id, topic, x.n, y.n AS of_all FROM (SELECT item_id, topic, count(*) AS n FROM c GROUP BY ALL) x"
        " JOIN (SELECT topic, count(*) AS n FROM c GROUP BY ALL) y USING (topic)",
        steps(
            ("x", f"SELECT review, <TOPIC> AS topic FROM {DISTINCT_REVIEWS}"),
            ("c", "SELECT item_id, topic FROM reviews JOIN x USING (review)"),
            last="SELECT item_id, topic, x.n, y.n AS of_all"
            " FROM (SELECT item_id, topic, count(*) AS n FROM c GROUP BY ALL) x"
            " JOIN (SELECT topic, count(*) AS n FROM c GROUP BY ALL) y USING (topic)",
        ),
    ),
    Query(
        "luxuries that are reviewed often",
        "SELECT item_id, count(*) AS n FROM reviews JOIN items USING (item_id) GROUP BY item_id, description"
        " HAVING count(*) >= 15 AND <LUXURY> = 'Yes'",
        steps(
            ("often", "SELECT item_id, count(*) AS n FROM reviews GROUP BY item_id HAVING count(*) >= 15"),
            last="SELECT item_id, n FROM often JOIN items USING (item_id) WHERE <LUXURY> = 'Yes'",
        ),
    ),
    Query(
        "the same item twice",
        "SELECT x.item_id, y.item_id AS other FROM items x JOIN items y"
        " ON x.brand = y.brand AND x.item_id < y.item_id AND <SAME> = 'Yes'",
        steps(
            (
                "pairs",
                "SELECT x.item_id, y.item_id AS other, x.description, y.description AS second FROM items x JOIN items y"
                " ON x.brand = y.brand AND x.item_id < y.item_id",
            ),
            last="SELECT item_id, other FROM pairs WHERE <SAME_PAIR> = 'Yes'",
        ),
    ),
    Query(
        "segments and what suits them",
        "SELECT x.segment, y.category FROM (SELECT DISTINCT segment FROM customers) x"
        " LEFT JOIN (SELECT DISTINCT category FROM items WHERE category IS NOT NULL) y ON <SUITS> = 'Yes'",
        steps(
            ("x", "SELECT DISTINCT segment FROM customers"),
            ("y", "SELECT DISTINCT category FROM items WHERE category IS NOT NULL"),
            ("p", "SELECT x.segment, y.category FROM x CROSS JOIN y WHERE <SUITS> = 'Yes'"),
            last="SELECT x.segment, p.category FROM x LEFT JOIN p ON x.segment = p.segment",
        ),
        refused=True,
    ),
    Query(
        "loyal customers who never complained",
        "SELECT customer_id FROM (SELECT customer_id, <LOYAL> AS loyal FROM customers) c LEFT ANTI JOIN"
        " (SELECT customer_id FROM reviews WHERE stars < 4) r USING (customer_id) WHERE loyal = 'Yes'",
        steps(
            (
                "quiet",
                "SELECT * FROM customers LEFT ANTI JOIN (SELECT customer_id FROM reviews WHERE stars < 4) r"
                " USING (customer_id)",
            ),
            last="SELECT customer_id FROM quiet WHERE <LOYAL> = 'Yes'",
        ),
    ),
    Query(
        "urgency of each item's newest review",
        "SELECT item_id, urgency FROM (SELECT item_id, <URGENCY> AS urgency,"
        " row_number() OVER (PARTITION BY item_id ORDER BY review_id DESC) AS n FROM reviews) WHERE n = 1",
        steps(
            (
                "newest",
                "SELECT item_id, review FROM (SELECT item_id, review,"
                " row_number() OVER (PARTITION BY item_id ORDER BY review_id DESC) AS n FROM reviews) WHERE n = 1",
            ),
            ("u", "SELECT review, <URGENCY> AS urgency FROM (SELECT DISTINCT review FROM newest)"),
            last="SELECT item_id, urgency FROM newest JOIN u USING (review)",
        ),
    ),
    Query(
        "topics of two lists that overlap",
        "SELECT 'bad' AS list, <TOPIC> AS topic FROM reviews WHERE stars < 4 UNION ALL"
        " SELECT 'business', <TOPIC> FROM reviews JOIN customers USING (customer_id) WHERE segment = 'business'",
        steps(
            (
                "listed",
                "SELECT 'bad' AS list, review FROM reviews WHERE stars < 4 UNION ALL"
                " SELECT 'business', review FROM reviews JOIN customers USING (customer_id) WHERE segment = 'business'",
            ),
            ("x", "SELECT review, <TOPIC> AS topic FROM (SELECT DISTINCT review FROM listed)"),
            last="SELECT list, topic FROM listed JOIN x USING (review)",
        ),
    ),
    Query(
        "kinds of items that each city buys",
        "SELECT city, count(DISTINCT <KIND>) AS kinds FROM sales JOIN items USING (item_id)"
        " JOIN customers USING (customer_id) WHERE quantity = 5 GROUP BY city",
        steps(
            ("five", "SELECT item_id, city FROM sales JOIN customers USING (customer_id) WHERE quantity = 5"),
            ("k", "SELECT item_id, <KIND> AS kind FROM items LEFT SEMI JOIN five USING (item_id)"),
            last="SELECT city, count(DISTINCT kind) AS kinds FROM five JOIN k USING (item_id) GROUP BY city",
        ),
    ),
    Query(
        "good reviews of dear audio items",
        "SELECT review_id, p FROM (SELECT *, <POSITIVE> AS p FROM reviews) r JOIN items USING (item_id)"
        " JOIN (SELECT item_id FROM sales GROUP BY item_id HAVING max(price) > 80) USING (item_id)"
        " WHERE p = 'Yes' AND category = 'audio' AND stars > 3",
        steps(
            (
                "r",
                "SELECT review_id, review FROM reviews JOIN items USING (item_id)"
                " JOIN (SELECT item_id FROM sales GROUP BY item_id HAVING max(price) > 80) USING (item_id)"
                " WHERE category = 'audio' AND stars > 3",
            ),
            ("x", "SELECT review, <POSITIVE> AS p FROM (SELECT DISTINCT review FROM r)"),
            last="SELECT review_id, p FROM r JOIN x USING (review) WHERE p = 'Yes'",
        ),
    ),
    Query(
        "items that please more than all do",
        "SELECT item_id FROM reviews GROUP BY item_id HAVING avg(CASE WHEN <POSITIVE> = 'Yes' THEN 1.0 ELSE 0.0 END)"
        " > (SELECT avg(CASE WHEN <POSITIVE> = 'Yes' THEN 1.0 ELSE 0.0 END) FROM reviews)",
        steps(
            ("x", f"SELECT review, CASE WHEN <POSITIVE> = 'Yes' THEN 1.0 ELSE 0.0 END AS p FROM {DISTINCT_REVIEWS}"),
            ("r", "SELECT item_id, p FROM reviews JOIN x USING (review)"),
            last="SELECT item_id FROM r GROUP BY item_id HAVING avg(p) > (SELECT avg(p) FROM r)",
        ),
    ),
    Query(
        "letters to business customers",
        "SELECT customer_id, loyal, reason,"
        " CASE WHEN loyal = 'Yes' THEN llm('Write a short greeting.', reason<o>) END AS text"
        " FROM (SELECT customer_id, segment, <LOYAL> AS loyal, <REASON> AS reason FROM customers)"
        " WHERE segment = 'business'",
        steps(
            ("c", "SELECT customer_id, <LOYAL> AS loyal, <REASON> AS reason FROM customers WHERE segment = 'business'"),
            (
                "t",
                "SELECT reason, llm('Write a short greeting.', reason<o>) AS text"
                " FROM (SELECT DISTINCT reason FROM c WHERE loyal = 'Yes')",
            ),
            last="SELECT customer_id, loyal, c.reason, text FROM c"
            " LEFT JOIN t ON c.reason = t.reason AND loyal = 'Yes'",
        ),
    ),
)
