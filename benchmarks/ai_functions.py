"""Rows a second of each AI function through Spark SQL, beside a naive pandas UDF with transformers in the same run.

    .venv/bin/python benchmarks/ai_functions.py                     60 film reviews, the naive UDF a quarter of them
    .venv/bin/python benchmarks/ai_functions.py --rows 400 --threads 2 --only ai_classify,ai_extract

Both use the packaged model in float32 with the same threads and ask about the same reviews in one Spark task; both have
answered once before time counts (engine and worker have their model). The result cache is off. The naive UDF generates
freely up to the same number of tokens; where ours is held to a form, its answers are shorter, which is the point.
Embeddings are of 40 times as many reviews, by the packaged encoder; their naive UDF embeds them all, 32 at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpu_engine import revision
from machine import Machine, this_machine
from peer_model import MODEL_FOLDER, convert, packaged_gguf

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "artifacts" / "ai_functions.json"
NAIVE_SHARE = 4  # the naive UDF answers every fourth row: its rate does not depend on how many
EMBEDDED_TIMES = 40  # as many rows: an embedding costs a small part of an answer
LIKENESS = "the acting is wooden"


@dataclass(frozen=True)
class Task:
    """A function: its call about ``quote``, what the naive UDF is told, and the most tokens of an answer.

    embeds: there is neither, it makes vectors.
    """

    name: str
    call: str
    instruction: str = ""
    max_tokens: int = 0
    embeds: bool = False


TASKS = (
    Task("ai_classify", "ai_classify(quote, array('positive', 'negative'))", "Is the text positive or negative?", 8),
    Task("ai_analyze_sentiment", "ai_analyze_sentiment(quote)", "What is the sentiment of the text?", 8),
    Task("ai_filter", "ai_filter('Is it about the actors?', quote)", "Is it about the actors? true or false", 8),
    Task(
        "ai_extract",
        "ai_extract(quote, array('person', 'film'))",
        'Extract as JSON: {"person": text or null, "film": text or null}',
        112,
    ),
    Task("ai_summarize", "ai_summarize(quote, 15)", "Summarize the text in at most 15 words.", 46),
    Task(
        "ai_translate",
        "ai_translate(quote, 'es', max_tokens => 48)",
        "Translate the text to Spanish. Answer with the translation only.",
        48,
    ),
    Task(
        "ai_fix_grammar",
        "ai_fix_grammar(quote, max_tokens => 48)",
        "Correct the grammar of the text. Answer with the corrected text only.",
        48,
    ),
    Task(
        "ai_mask",
        "ai_mask(quote, array('person'), max_tokens => 48)",
        "Replace every person in the text by [MASKED] and leave the rest. Answer with the text only.",
        48,
    ),
    Task(
        "ai_query",
        "ai_query('default', 'Write a headline: ' || quote, modelParameters => named_struct('max_tokens', 24))",
        "Write a headline:",
        24,
    ),
    Task("ai_embed", "ai_embed(quote)", embeds=True),
    Task("ai_similarity", f"ai_similarity(quote, '{LIKENESS}')", embeds=True),
)


@dataclass(frozen=True)
class Rates:
    """Rows a second. answered: share of rows that have an answer, as not all do where tokens run out."""

    name: str
    ours: float
    naive: float
    answered: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="names of functions, separated by commas")
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    tasks = [task for task in TASKS if not only or task.name in only]

    machine = this_machine()
    convert(packaged_gguf(), MODEL_FOLDER)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as scratch:
        rates = measure(tasks, arguments.rows, arguments.threads, scratch)
    record = {
        "machine": asdict(machine),
        "date": time.strftime("%Y-%m-%d"),
        "revision": revision(),
        "rows": arguments.rows,
        "threads": arguments.threads,
        "rates": [asdict(rate) for rate in rates],
    }
    print(report(record))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(record, indent=1))


def report(record: dict[str, Any]) -> str:
    """The table."""
    many = f"{record['rows']} rows, {record['rows'] * EMBEDDED_TIMES} of embeddings"
    made = f"{many}, {record['threads']} threads each, float32; {record['date']}, {record['revision']}"
    lines = [str(Machine(**record["machine"])), made, ""]
    lines.append(f"{'function':22} {'rows/s':>8} {'naive':>8} {'ratio':>7} {'answered':>9}")
    for rate in (Rates(**found) for found in record["rates"]):
        ratio = rate.ours / rate.naive
        lines.append(f"{rate.name:22} {rate.ours:8.2f} {rate.naive:8.2f} {ratio:6.1f}x {rate.answered:9.0%}")
    return "\n".join(lines)


def naive_column(task: Task, threads: int) -> Any:
    """What the naive UDF makes of ``quote``."""
    import naive_embedding
    from naive_udf import naive_udf
    from pyspark.sql import functions as F

    from spark_llm.engine.model.source import packaged_encoder

    quote = F.col("quote")
    if not task.embeds:
        message = F.concat(F.lit(f"{task.instruction}\ntext: "), quote)
        return naive_udf(str(MODEL_FOLDER), threads, task.max_tokens)(message)
    folder = str(packaged_encoder())
    if task.name == "ai_embed":
        return naive_embedding.embed_udf(folder, threads)(quote)
    return naive_embedding.similarity_udf(folder, threads, LIKENESS)(quote)


def measure(tasks: list[Task], rows: int, threads: int, scratch: str) -> list[Rates]:
    """The rates of all functions, ours and naive one after the other."""

    import spark_llm
    from spark_llm import datasets

    conf = {"spark.ui.enabled": "false", "spark.log.level": "ERROR", "spark.local.dir": scratch}
    spark = spark_llm.session(
        "local[1]", conf=conf, engine_dtype="float32", engine_threads=threads, cache_enabled=False, progress="false"
    )
    datasets.register(spark, "movies")
    most = rows * (EMBEDDED_TIMES if any(task.embeds for task in tasks) else 1)
    quotes = spark.sql(f"SELECT DISTINCT quote FROM reviews ORDER BY quote LIMIT {most}").toPandas()
    one = spark.createDataFrame(quotes[:1]).repartition(1)  # no limit(1): a worker that is not read to its end ends

    found = []
    for task in tasks:
        asked = quotes if task.embeds else quotes[:rows]
        every = spark.createDataFrame(asked).repartition(1).cache()
        few = spark.createDataFrame(asked[:: 1 if task.embeds else NAIVE_SHARE]).repartition(1).cache()
        every.createOrReplaceTempView("quotes")
        every.count()
        few.count()
        naive = naive_column(task, threads)
        spark.sql(f"SELECT {task.call} FROM (SELECT 'A warm film.' AS quote)").collect()
        one.select(naive).collect()
        start = time.perf_counter()
        answers = spark.sql(f"SELECT {task.call} AS answer FROM quotes").collect()
        ours = time.perf_counter() - start
        start = time.perf_counter()
        naive_rows = len(few.select(naive).collect())
        seconds = time.perf_counter() - start
        answered = sum(row.answer is not None for row in answers) / len(answers)
        found.append(Rates(task.name, len(answers) / ours, naive_rows / seconds, answered))
        print(
            f"{task.name}: {len(answers)} rows in {ours:.1f} s, naive {naive_rows} in {seconds:.1f} s", file=sys.stderr
        )
    spark.stop()
    return found


if __name__ == "__main__":
    main()
