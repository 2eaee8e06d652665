"""One query end to end through Spark SQL on a GPU: a join of reviews with their film's plot, answered by the engine.

    python benchmarks/gpu_spark.py [--rows 8192] [--model default|8b|1b] [--naive-rows 512]

Text of the shape of the engine benchmark's workload A: plots of about 512 tokens that 32 reviews share, reviews of
about 64 tokens. ``8b`` and ``1b`` have random weights of Llama's shapes and the demo model's tokenizer. Warm (an
earlier query over other rows started the engine); planning, join, shuffle, tokenising and Arrow included. Beside
it the naive run: rules and prefix cache off, on fewer rows. "busy": the share of the time in which the engine stepped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_workload import SHAPES, write_model

import spark_llm
from spark_llm.datasets import generate_movies
from spark_llm.engine.service.client import list_engines

OUT = Path(__file__).resolve().parent.parent / "artifacts" / "gpu_spark.json"
DEMO_VOCABULARY = 49_152
QUERY = """
SELECT count(answer) AS answers, sum(length(answer)) AS characters
FROM (SELECT llm('Why does the critic like or dislike the film? Answer in a few words.', plot, review => quote,
                 max_tokens => 16) AS answer
      FROM {reviews} JOIN {movies} USING (movie_id))
"""


def model_of(name: str) -> str:
    """What ``spark.llm.model`` is set to."""
    if name not in SHAPES:
        return name
    folder = write_model(name, Path(tempfile.gettempdir()) / "spark-llm-text-shapes")
    path = folder / "config.json"
    shape = json.loads(path.read_text())
    path.write_text(json.dumps(shape | {"vocab_size": DEMO_VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}))
    return f"dummy:{folder}"


def register(spark: Any, prefix: str, rows: int, seed: int) -> None:
    tables = generate_movies(rows, reviews_per_movie=32, plot_characters=2300, quote_characters=280, seed=seed)
    for name, table in tables.items():
        spark.createDataFrame(table).createOrReplaceTempView(f"{prefix}_{name}")


def run(spark: Any, prefix: str, label: str) -> dict[str, Any]:
    before = list_engines()
    began = time.perf_counter()
    answers = spark.sql(QUERY.format(reviews=f"{prefix}_reviews", movies=f"{prefix}_movies")).collect()[0].answers
    seconds = time.perf_counter() - began
    report = spark_llm.last_report(spark)
    stepped = sum(e.step_seconds for e in list_engines()) - sum(e.step_seconds for e in before)
    found = {
        "run": label, "rows": report.rows, "answers": answers, "seconds": seconds,
        "rows_per_second": report.rows / seconds, "prompt_tokens_per_second": report.prompt_tokens / seconds,
        "cached": report.prefix_hit_rate, "failed": report.failed, "busy": stepped / seconds,
    }  # fmt: skip
    print(
        f"{label:8} {report.rows:6} rows {seconds:7.2f} s {found['rows_per_second']:8.0f} rows/s "
        f"{found['prompt_tokens_per_second']:10,.0f} prompt tokens/s  cached {found['cached']:5.1%}  "
        f"busy {found['busy']:4.0%}  failed {report.failed} {' '.join(report.errors)[:200]}",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--naive-rows", type=int, default=512)
    parser.add_argument("--model", default="default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cores", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    spark = spark_llm.session(
        f"local[{arguments.cores}]",
        conf={"spark.driver.memory": "4g", "spark.ui.enabled": "false"},
        model=model_of(arguments.model),
        engine_device=arguments.device,
        engine_context_length=2048,
        progress="false",
    )
    spark.sparkContext.setLogLevel("ERROR")
    for prefix, rows, seed in (
        ("warm", min(256, arguments.rows), 1),
        ("bench", arguments.rows, 2),
        ("naive", arguments.naive_rows, 3),
    ):
        register(spark, prefix, rows, seed)
    run(spark, "warm", "start")
    results = [run(spark, "bench", "ours")]
    spark.conf.set("spark.llm.optimizer.enabled", "false")
    spark.conf.set("spark.llm.engine.prefixCache", "false")
    results.append(run(spark, "naive", "naive"))
    ratio = results[0]["rows_per_second"] / results[1]["rows_per_second"]
    print(f"{arguments.model}: ours {ratio:.2f}x the naive run's rows/s")
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(known | {arguments.model: results}, indent=1))
    spark.stop()


if __name__ == "__main__":
    main()
