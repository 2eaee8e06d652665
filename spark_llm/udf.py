"""The pandas UDFs behind ``llm(...)``: in each Spark task they hand rows to the engine beside the executor."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from spark_llm import config
from spark_llm.answering import Answering, Flow, Grant, RowSource
from spark_llm.asking import Asker
from spark_llm.backchannel import Sender
from spark_llm.call import CallSpec, GroupSpec, PromptPlan
from spark_llm.call_rows import Answers
from spark_llm.call_settings import answer_settings, shared_header, stream_header
from spark_llm.clients import client_of
from spark_llm.config_backend import BUILTIN
from spark_llm.config_routing import LOCAL
from spark_llm.engine.service import client
from spark_llm.engine.service.answers import Answerer, AnswerSource
from spark_llm.engine.service.protocol import WindowRequest
from spark_llm.predicate_order import predicate_order
from spark_llm.tally import TaskUpdate
from spark_llm.worker_socket import WorkerSocket

if TYPE_CHECKING:
    from pyspark import TaskContext

    from spark_llm.config import LlmConf
    from spark_llm.engine.service.coordinator_protocol import Cluster
    from spark_llm.report import Reports, ReportSink

PROGRESS_SECONDS = 0.5  # how often a task tells the driver how far it is
PROMPT_CHARACTERS = 200  # of a prompt in reports
VARYING_PROMPTS = "(a prompt for each row)"
VARYING_TEXTS = "(a text to embed for each row)"

Batch = tuple[pd.Series, ...]
Task = Callable[[Iterator[Batch]], Iterator[Any]]


def make_udf(reports: Reports, tables: Mapping[str, bytes] | None = None, calls: int = 0) -> Any:
    """The UDF for ``reports``' SparkContext, as a pyspark UserDefinedFunction.

    calls == 0: (CallSpec as JSON, prompt, fields ... STRING, [mask BOOLEAN]) -> answer STRING. Else that of groups of
    so many calls: (GroupSpec as JSON, their columns ...) -> STRUCT<a0: STRING, a1: STRING ...>.
    tables: the order tables that specs name, encoded; they travel with the function to every task.
    Deterministic; the function builder asks for the other kind where a call samples without a seed.
    """
    sink = reports.sink
    known = dict(tables or {})
    answer = answer_group if calls else answer_task

    def llm(batches: Iterator[Batch]) -> Iterator[Any]:
        return answer(batches, sink, known)

    return pandas_function(llm, calls)


def pandas_function(task: Task, calls: int = 0) -> Any:
    """``task`` as the UDF of one call, or of a group of ``calls``."""
    from pyspark.sql.functions import pandas_udf

    # The hints must be objects for Spark to see what kind of UDF this is; here they would be text.
    output = pd.DataFrame if calls else pd.Series
    task.__annotations__ = {"batches": Iterator[tuple[pd.Series, ...]], "return": Iterator[output]}  # type: ignore[valid-type]
    members = ", ".join(f"a{number}: string" for number in range(calls))
    return pandas_udf(task, f"struct<{members}>" if calls else "string")


def answer_task(batches: Iterator[Batch], sink: ReportSink, tables: Mapping[str, bytes]) -> Iterator[pd.Series]:
    """Answer one task's rows of a call in order; contacts no engine unless a row needs one. Raises LlmError."""
    for texts in _answer(batches, sink, tables, _group_of_one):
        yield pd.Series(texts[0])


def answer_group(batches: Iterator[Batch], sink: ReportSink, tables: Mapping[str, bytes]) -> Iterator[pd.DataFrame]:
    """Answer one task's rows of a group of calls in order, a column ``a0``, ``a1`` ... for each. Raises LlmError."""
    for texts in _answer(batches, sink, tables, GroupSpec.decode):
        yield pd.DataFrame({f"a{number}": column for number, column in enumerate(texts)})


def _group_of_one(text: str) -> GroupSpec:
    spec = CallSpec.decode(text)
    return GroupSpec(calls=(spec,), arguments=(tuple(range(1 + len(spec.fields) + spec.masked)),))


def _answer(
    batches: Iterator[Batch], sink: ReportSink, tables: Mapping[str, bytes], decode: Callable[[str], GroupSpec]
) -> Iterator[list[Answers]]:
    from pyspark import TaskContext

    first = next((batch for batch in batches if len(batch[0])), None)
    if first is None:
        return
    group = decode(first[0].iloc[0])
    conf = config.from_task()
    context = TaskContext.get()
    assert context is not None
    task = _Task(group, conf, context, sink.cluster, dict(sink.pools))
    askers = [
        Asker(answer_settings(spec, conf, tables, columns), task.opens(spec), task.opens_shared(spec))
        for spec, columns in zip(group.calls, group.arguments, strict=True)
    ]
    answering = Answering(askers, task.flow())
    updates = [
        TaskUpdate(
            query=task.query,
            task=secrets.token_hex(8),
            stage=context.stageId(),
            attempt=context.taskAttemptId(),
            prompt=prompt_label(first[1 + columns[0]], spec),
            embeds=spec.task == "embed",
            progress=conf.progress,
            counts=asker.counts,
        )
        for asker, spec, columns in zip(askers, group.calls, group.arguments, strict=True)
    ]
    teller = _Teller(answering, updates, sink)
    task.on_connect = lambda: teller.tell(True)  # the engine may have to start first
    answering.on_progress = teller.tell
    spark = WorkerSocket()
    answering.on_wait = spark.flush
    try:
        yield from answering.run(RowSource(_arrow_columns(first, batches, conf.window_rows, group)))
    finally:
        spark.close()
        teller.close()


class _Task:
    """Who asks: the calls of a plan node, in an attempt of a Spark task, as its session is configured."""

    def __init__(
        self,
        group: GroupSpec,
        conf: LlmConf,
        context: TaskContext,
        cluster: Cluster | None = None,
        pools: Mapping[str, float] | None = None,
    ) -> None:
        self.query = query_id(context)
        self._client = client_of(context.getLocalProperty, conf, pools or {}, self.query)
        self.on_connect: Callable[[], None] = lambda: None
        self._group = group
        self._conf = conf
        self._context = context
        self._cluster = cluster if conf.router != LOCAL and conf.backend == BUILTIN else None
        # What a lost attempt found let others stop, so the next one has to find it again, without a limit.
        self._limit = group.limit if context.attemptNumber() == 0 else 0

    def opens(self, spec: CallSpec) -> Callable[[], AnswerSource]:
        """What opens a stream for a call's rows."""
        header = stream_header(spec, self._conf, self._client, self._group.node if self._limit else "", self._limit)
        return lambda: self._connect(spec).stream(header)

    def opens_shared(self, spec: CallSpec) -> Callable[[], AnswerSource]:
        """What opens a stream for prompts with several of a call's rows."""
        header = stream_header(spec, self._conf, self._client, self._group.node if self._limit else "", self._limit)
        shared = shared_header(header, spec.prompt or PromptPlan())
        return lambda: self._connect(spec).stream(shared)

    def flow(self) -> Flow:
        """How windows go through the calls."""
        group, conf = self._group, self._conf
        order = None
        if group.conditions and len(group.calls) > 1:
            key = (self.query, group.node or group.encode())
            order = predicate_order(key, len(group.calls), max(1, conf.task_cores))
        return Flow(
            window_rows=conf.window_rows,
            windows_in_flight=conf.windows_in_flight,
            conditions=group.conditions,
            order=order,
            grant=self._grants() if self._limit else None,
            pair=group.pair,
            together=max([1, *(spec.prompt.rows for spec in group.calls if spec.prompt is not None)]),
        )

    def _grants(self) -> Grant:
        engines: list[Answerer] = []

        def grant(rows: int, hits: int, ended: bool) -> int:
            request = WindowRequest(
                query=self.query,
                node=self._group.node,
                limit=self._limit,
                partition=self._context.partitionId(),
                attempt=self._context.taskAttemptId(),
                rows=rows,
                hits=hits if self._group.conditions else 0,
                ended=ended,
            )
            if not engines:
                engines.append(self._connect(self._group.calls[0]))
            return engines[0].window(request)

        return grant

    def _connect(self, spec: CallSpec) -> Answerer:
        self.on_connect()
        engine = self._conf.engine_spec(spec.model, spec.task)
        if self._cluster is None:
            return client.connect(engine, self._conf.start_timeout)
        from spark_llm.engine.service import dispatch_client

        return dispatch_client.connect(engine, self._conf.start_timeout, self._cluster, self._conf.router)


def prompt_label(prompts: pd.Series, spec: CallSpec) -> str:
    """What names a call in reports: its prompt, unless that differs from row to row."""
    prompt = prompts.iloc[0]
    if prompt is None or (prompts != prompt).any():
        return varying_label(spec)
    return str(prompt)[:PROMPT_CHARACTERS]


def varying_label(spec: CallSpec) -> str:
    """What names a call in reports whose prompt differs from row to row."""
    return VARYING_TEXTS if spec.task == "embed" else VARYING_PROMPTS


def query_id(context: TaskContext) -> str:
    """The SQL execution that a task works for; for work outside of one, its stage."""
    execution: str | None = context.getLocalProperty("spark.sql.execution.id")
    return execution if execution is not None else f"stage-{context.stageId()}"


def _arrow_columns(first: Batch, batches: Iterator[Batch], rows: int, group: GroupSpec) -> Iterator[Sequence[pa.Array]]:
    """Prompts, fields and masks of all batches as arrays of at most ``rows`` rows."""
    masks = {columns[-1] for spec, columns in zip(group.calls, group.arguments, strict=True) if spec.masked}
    types = [pa.bool_() if number in masks else pa.utf8() for number in range(len(first) - 1)]
    if group.pair is not None:
        types[group.pair] = pa.int64()
    batch: Batch | None = first
    while batch is not None:
        for start in range(0, len(batch[0]), rows):
            parts = (column.iloc[start : start + rows] for column in batch[1:])
            yield [pa.array(part, kind, from_pandas=True) for part, kind in zip(parts, types, strict=True)]
        batch = next(batches, None)


class _Teller:
    """Tells the driver how far a task is: now and then, before rows are handed to Spark, and at the end."""

    def __init__(self, answering: Answering, updates: Sequence[TaskUpdate], sink: ReportSink) -> None:
        self._answering = answering
        self._updates = updates
        self._sink = sink
        self._senders = [Sender(sink.address) for _ in updates]
        self._told = 0.0

    def tell(self, is_due: bool) -> None:
        now = time.monotonic()
        if is_due or now - self._told >= PROGRESS_SECONDS:
            self._told = now
            for sender, update in zip(self._senders, self._newest(), strict=True):
                sender.send(update)

    def close(self) -> None:
        self.tell(True)  # a task that fails has counts that it did not tell, and no accumulator
        self._sink.accumulator.add(self._newest())
        for sender in self._senders:
            sender.close()

    def _newest(self) -> list[TaskUpdate]:
        answering = self._answering
        for call, update in enumerate(self._updates):
            update.number += 1
            update.read, update.answered, update.ended = answering.read, answering.answered(call), answering.ended
        return list(self._updates)
