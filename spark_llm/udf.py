"""The pandas UDF behind ``llm(...)``: in each Spark task it hands rows to the engine beside the executor."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from spark_llm import config
from spark_llm.answering import Answering, AnswerSettings, rechunk
from spark_llm.backchannel import Sender
from spark_llm.call import CallSpec, PromptPlan
from spark_llm.engine.request import SamplingParams
from spark_llm.engine.service import client
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.optimizer.reorder.order_table import OrderTable
from spark_llm.tally import TaskUpdate
from spark_llm.worker_socket import WorkerSocket

if TYPE_CHECKING:
    from pyspark import TaskContext

    from spark_llm.config import LlmConf
    from spark_llm.report import Reports, ReportSink

PROGRESS_SECONDS = 0.5  # how often a task tells the driver how far it is
PROMPT_CHARACTERS = 200  # of a prompt in reports
VARYING_PROMPTS = "(a prompt for each row)"

Batch = tuple[pd.Series, ...]


def make_udf(reports: Reports, tables: Mapping[str, bytes] | None = None, calls: int = 0) -> Any:
    """The UDF for ``reports``' SparkContext: (CallSpec as JSON, prompt, fields ...) STRING -> answer STRING.

    tables: the order tables that specs name, encoded; they travel with the function to every task.
    Returns a pyspark UserDefinedFunction, deterministic; the function builder asks for the other kind where a
    call samples without a seed.
    """
    from pyspark.sql.functions import pandas_udf

    sink = reports.sink
    known = dict(tables or {})

    def llm(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.Series]:
        return answer_task(batches, sink, known)

    # The hints must be objects for Spark to see what kind of UDF this is; here they would be text.
    llm.__annotations__ = {"batches": Iterator[tuple[pd.Series, ...]], "return": Iterator[pd.Series]}
    return pandas_udf(llm, "string")


def answer_task(batches: Iterator[Batch], sink: ReportSink, tables: Mapping[str, bytes]) -> Iterator[pd.Series]:
    """Answer one task's rows in order; contacts no engine unless a row needs one. Raises LlmError."""
    from pyspark import TaskContext

    first = next((batch for batch in batches if len(batch[0])), None)
    if first is None:
        return
    spec = CallSpec.decode(first[0].iloc[0])
    conf = config.from_task()
    context = TaskContext.get()
    assert context is not None
    query = query_id(context)

    def open_stream() -> client.AnswerStream:
        teller.tell(True)  # the engine may have to start first
        engine = client.connect(conf.engine_spec(spec.model), conf.start_timeout)
        return engine.stream(stream_header(spec, conf, query))

    answering = Answering(answer_settings(spec, conf, tables), open_stream)
    update = TaskUpdate(
        query=query,
        task=secrets.token_hex(8),
        stage=context.stageId(),
        attempt=context.taskAttemptId(),
        prompt=prompt_label(first[1]),
        progress=conf.progress,
        counts=answering.counts,
    )
    teller = _Teller(answering, update, sink)
    answering.on_progress = teller.tell
    spark = WorkerSocket()
    answering.on_wait = spark.flush
    try:
        columns = _arrow_columns(first, batches, conf.window_rows)
        for texts in answering.run(rechunk(columns, conf.window_rows)):
            yield pd.Series(texts)
    finally:
        spark.close()
        teller.close()


def answer_settings(spec: CallSpec, conf: LlmConf, tables: Mapping[str, bytes]) -> AnswerSettings:
    """A call's constants and the session's configuration -> how a task answers."""
    plan = spec.prompt or PromptPlan()
    return AnswerSettings(
        fields=spec.fields,
        call=spec.canonical(),
        window_rows=conf.window_rows,
        windows_in_flight=conf.windows_in_flight,
        fold=spec.rows is not None and spec.rows.fold and spec.is_repeatable,
        seed=spec.seed if spec.temperature else None,
        drawn=spec.drawn(),
        fail=conf.on_error == "fail",
        order=order_table(plan, tables),
        instruction_last=plan.instruction_last,
    )


def order_table(plan: PromptPlan, tables: Mapping[str, bytes]) -> OrderTable | None:
    """The order table of a call; None where its fields stand as written."""
    if plan.table is not None:
        return OrderTable.decode(tables[plan.table])
    return OrderTable.fixed(plan.fields) if plan.fields else None


def stream_header(spec: CallSpec, conf: LlmConf, query: str) -> StreamOpen:
    """What is constant for all rows of a task, for the engine."""
    given = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(spec, name)) is not None}
    params = SamplingParams(
        max_tokens=conf.max_output_length if spec.max_tokens is None else spec.max_tokens,
        stop=spec.stop,
        **given,
    )
    plan = spec.prompt or PromptPlan()
    return StreamOpen(
        query=query,
        params=params,
        system=spec.system,
        instruction_segments=0 if plan.instruction_last else 1,
        later_calls=plan.later_calls,
        shared_segments=len(spec.fields) if plan.instruction_last else 0,
        reuse=conf.prefix_cache,
    )


def prompt_label(prompts: pd.Series) -> str:
    """What names a call in reports: its prompt, unless that differs from row to row."""
    prompt = prompts.iloc[0]
    if prompt is None or (prompts != prompt).any():
        return VARYING_PROMPTS
    return str(prompt)[:PROMPT_CHARACTERS]


def query_id(context: TaskContext) -> str:
    """The SQL execution that a task works for; for work outside of one, its stage."""
    execution: str | None = context.getLocalProperty("spark.sql.execution.id")
    return execution if execution is not None else f"stage-{context.stageId()}"


def _arrow_columns(first: Batch, batches: Iterator[Batch], rows: int) -> Iterator[list[pa.Array]]:
    """Prompt and fields of all batches as string arrays of at most ``rows`` rows."""
    batch: Batch | None = first
    while batch is not None:
        for start in range(0, len(batch[0]), rows):
            parts = (column.iloc[start : start + rows] for column in batch[1:])
            yield [pa.array(part, pa.utf8(), from_pandas=True) for part in parts]
        batch = next(batches, None)


class _Teller:
    """Tells the driver how far a task is: now and then, before rows are handed to Spark, and at the end."""

    def __init__(self, answering: Answering, update: TaskUpdate, sink: ReportSink) -> None:
        self._answering = answering
        self._update = update
        self._sink = sink
        self._sender = Sender(sink.address)
        self._told = 0.0

    def tell(self, is_due: bool) -> None:
        now = time.monotonic()
        if is_due or now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self._sender.send(self._newest())

    def close(self) -> None:
        self.tell(True)  # a task that fails has counts that it did not tell, and no accumulator
        self._sink.accumulator.add([self._newest()])
        self._sender.close()

    def _newest(self) -> TaskUpdate:
        update, answering = self._update, self._answering
        update.number += 1
        update.read, update.answered, update.ended = answering.read, answering.answered, answering.ended
        return update
