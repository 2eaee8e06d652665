"""What the order of fields does to the demo model's answers: agreement, and accuracy where people have judged.

    .venv/bin/python benchmarks/order_quality.py            (a few minutes on two cores)

Each question is asked about the same rows in three orders: fields as written, in the order that the rules choose, and
turned around. Writes artifacts/order_quality.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cpu_engine import ROOT, revision
from machine import this_machine

import spark_llm
from spark_llm import datasets

SYSTEM = "You are a sentiment classifier. You reply with one word: positive or negative."
PROMPT = "Classify the sentiment of the review as positive or negative. Reply with one word only."


@dataclass(frozen=True)
class Question:
    """``rows``: SQL for the columns ``id``, ``first``, ``second`` (texts, in this order as written), ``gold``, and
    ``whole``, of which ``second`` is the text: the sample has all rows of some of these."""

    name: str
    dataset: str
    first: str
    second: str
    rows: str


@dataclass(frozen=True)
class Quality:
    """Of one question in one order: shares of the rows, 0 to 1. agrees: with the answer as written."""

    question: str
    order: str
    fields: str
    rows: int
    labels: float
    accuracy: float
    agrees: float
    hits: float


QUESTIONS = (
    Question(
        "movie reviews",
        "movies",
        "review",
        "plot",
        "SELECT quote AS first, plot AS second, verdict = 'fresh' AS gold, review_id AS id, movie_id AS whole "
        "FROM reviews JOIN movies USING (movie_id)",
    ),
    Question(
        "product sentences",
        "products",
        "sentence",
        "whole_review",
        "SELECT sentence AS first, body AS second, s.score > 0 AS gold, s.review_id * 1000 + sentence_no AS id, "
        "s.review_id AS whole "
        "FROM review_sentences s JOIN product_reviews r USING (review_id) WHERE abs(s.score) > 1",
    ),
)


def ask(spark: Any, question: Question, order: str) -> tuple[dict[int, str | None], float]:
    """Each row's answer in one order, and the share of prompt tokens that the cache had."""
    first, second = f"{question.first} => first", f"{question.second} => second"
    fields = f"{second}, {first}" if order == "turned" else f"{first}, {second}"
    option = "auto" if order == "rules" else "as_written"
    call = f"llm('{PROMPT}', {fields}, system => '{SYSTEM}', max_tokens => 3, order => '{option}')"
    answers = dict(spark.sql(f"SELECT id, {call} FROM sampled").collect())
    report = spark_llm.last_report(spark)
    assert report is not None
    return answers, report.prefix_hit_rate


def measure(rows: int, say: Callable[[str], None]) -> list[Quality]:
    spark = spark_llm.session("local[1]", progress="false", cache_enabled=False, engine_dtype="float32")
    spark.sparkContext.setLogLevel("ERROR")
    found = []
    for question in QUESTIONS:
        datasets.register(spark, question.dataset)
        chosen = f"SELECT first, second, gold, id FROM ({question.rows}) ORDER BY xxhash64(whole, 7), id LIMIT {rows}"
        sampled = spark.sql(chosen).collect()
        table = spark.createDataFrame(sampled, "first STRING, second STRING, gold BOOLEAN, id BIGINT")
        table.createOrReplaceTempView("sampled")
        gold = {row.id: row.gold for row in sampled}
        written: dict[int, str | None] = {}
        for order in ("written", "rules", "turned"):
            answers, hits = ask(spark, question, order)
            written = written or answers
            found.append(quality(question, order, answers, written, gold, hits))
            say(line(found[-1]))
    return found


def quality(
    question: Question,
    order: str,
    answers: dict[int, str | None],
    written: dict[int, str | None],
    gold: dict[int, bool],
    hits: float,
) -> Quality:
    labels = {row: label(answer) for row, answer in answers.items()}
    count = len(answers)
    names = (question.first, question.second)
    fields = {"written": ", ".join(names), "turned": ", ".join(reversed(names)), "rules": "by the rules"}[order]
    return Quality(
        question=question.name,
        order=order,
        fields=fields,
        rows=count,
        labels=sum(one is not None for one in labels.values()) / count,
        accuracy=sum(labels[row] == gold[row] for row in labels) / count,
        agrees=sum(answers[row] == written[row] for row in answers) / count,
        hits=hits,
    )


def label(answer: str | None) -> bool | None:
    """True for positive, False for negative, None for another answer."""
    text = (answer or "").strip().lower()
    return True if text.startswith("positive") else False if text.startswith("negative") else None


def line(one: Quality) -> str:
    return (
        f"{one.question:18} {one.order:8} {one.fields:24} {one.rows:5} {one.agrees:8.0%} {one.labels:8.0%} "
        f"{one.accuracy:9.0%} {one.hits:9.0%}"
    )


def report(record: dict[str, Any]) -> str:
    """The table of a record."""
    head = (
        f"{'question':18} {'order':8} {'fields':24} {'rows':>5} {'agrees':>8} {'labels':>8} {'accuracy':>9} {'hits':>9}"
    )
    lines = [line(Quality(**one)) for one in record["quality"]]
    return "\n".join([f"{record['machine']}", f"revision {record['revision']}, {record['date']}", "", head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100, help="rows of each question")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    machine = this_machine()
    record = {
        "machine": str(machine),
        "revision": revision(),
        "date": datetime.date.today().isoformat(),
        "quality": [asdict(one) for one in measure(arguments.rows, print)],
    }
    target = ROOT / "artifacts" / "order_quality.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1))
    print("\n" + report(record))


if __name__ == "__main__":
    main()
