"""The catalogue of error conditions in Spark's own reader, for errors that the JVM makes of ours."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spark_llm.errors import catalogue


def know_conditions(jvm: Any, seq: Callable[[Iterable[Any]], Any]) -> None:
    """Make our conditions known to ``jvm``, so that our errors have message, condition and SQLSTATE everywhere that
    Spark's have. The reader's map is immutable and has no door: it is replaced as a whole. seq: makes a Scala Seq."""
    rows = {name: {"message": [e["message"]], "sqlState": e["sqlState"]} for name, e in catalogue().items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "error-conditions.json"
        file.write_text(json.dumps(rows), "utf-8")
        url = jvm.java.net.URL(file.as_uri())
        ours = jvm.org.apache.spark.ErrorClassesJsonReader(seq([url])).errorInfoMap()
    helper = getattr(getattr(jvm.org.apache.spark, "SparkThrowableHelper$"), "MODULE$")
    reader = _private(helper, "errorReader").get(helper)
    _private(reader, "errorInfoMap").set(reader, reader.errorInfoMap().concat(ours))


def _private(value: Any, field: str) -> Any:
    found = value.getClass().getDeclaredField(field)
    found.setAccessible(True)
    return found
