"""The demo's command: start a session and an engine, run every example, sum up, write the results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import spark_llm
from spark_llm import datasets
from spark_llm.demo import examples, measure, show

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def main() -> None:
    """Run the demo; exits with a message where something that it needs is missing."""
    parser = argparse.ArgumentParser(prog="spark_llm.demo", description=__doc__)
    parser.add_argument("examples", nargs="*", help="names of single examples, for example 01_filter")
    parser.add_argument("--folder", type=Path, default=examples.FOLDER, help="where the *.sql files are")
    parser.add_argument("--json", type=Path, default=Path("build/demo.json"), help="where results go")
    arguments = parser.parse_args()
    if not shutil.which("java") and not os.environ.get("JAVA_HOME"):
        sys.exit("Spark needs Java 17 or 21: install a JRE (for example openjdk-17-jre-headless) or set JAVA_HOME.")
    known = examples.read_all(arguments.folder)
    chosen = [e for e in known if not arguments.examples or e.name in arguments.examples]
    if not chosen:
        sys.exit(f"There are: {', '.join(e.name for e in known)}")
    results = run(chosen)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(
        f"\nThe numbers are in {arguments.json}; sql_examples/ has the queries, docs/quickstart.md goes on from here."
    )


def run(chosen: list[examples.Example]) -> dict[str, Any]:
    """Run examples one after the other, print what they give, return the numbers."""
    started = time.monotonic()
    spark = spark_llm.session(
        "local[2]",
        app_name="spark-llm demo",
        conf={"spark.ui.enabled": "false", "spark.log.level": "ERROR", "spark.ui.showConsoleProgress": "false"},
        progress=True,
    )
    try:
        for name in dict.fromkeys(e.dataset for e in chosen):
            tables = datasets.CATALOGUE[name].tables
            datasets.register(spark, name)
            print(f"{name}: {', '.join(f'{table} ({tables[table].rows:,} rows)' for table in tables)}")
        model = spark.conf.get("spark.llm.model", "default")
        print(f"Starting an engine for the model {model} ...", flush=True)
        first = measure.run(spark, "SELECT llm('Say hello.', max_tokens => 2)")
        print(f"It answers after {first.wall_seconds:.1f} s.")
        compared = [_run_one(spark, example, f"{i}/{len(chosen)}") for i, example in enumerate(chosen, 1)]
    finally:
        spark.stop()
    print("\n=== All queries (naive: per row, measured on the sampled rows of the same run)\n")
    print(show.summary(compared))
    total = time.monotonic() - started
    rows = sum(c.ours.report.rows for c in compared)
    print(f"\n  {rows:,} rows in {len(compared)} queries; the whole demo took {total:.0f} s on {_machine()}")
    return {
        "version": spark_llm.__version__,
        "machine": _machine(),
        "model": model,
        "seconds": total,
        "engine_start_seconds": first.wall_seconds,
        "queries": {
            c.example.name: {
                "title": c.example.title,
                "ours": c.ours.as_json(),
                "naive": c.naive.as_json(),
                "speedup": c.speedup,
                "same": c.same,
                "compared": c.compared,
            }
            for c in compared
        },
    }


def _run_one(spark: SparkSession, example: examples.Example, position: str) -> measure.Comparison:
    print(f"\n=== {position} {example.title}: {example.name}.sql\n\n{example.select}\n")
    spark.sql(example.create_view)
    print(f"Physical plan\n{show.plan(spark, example.select)}\n")
    ours = measure.run(spark, example.select)
    print(f"First rows of {len(ours.rows):,}\n{show.first_rows(ours.rows)}\n", flush=True)
    result = measure.run_naively(spark, example, ours)
    print(f"Report\n{show.comparison(result)}", flush=True)
    return result


def _machine() -> str:
    """Processor and cores, for whoever compares numbers."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text("utf-8").splitlines() if line.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    return f"{os.cpu_count()} x {name}"


if __name__ == "__main__":
    main()
