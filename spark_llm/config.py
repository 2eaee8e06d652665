"""The ``spark.llm.*`` configuration: one typed table, which is the dataclass ``LlmConf``.

Each field is one key with its default, its kind and its documentation; parsing, validation, the SQL ``SET``
surface, ``enable(spark, **options)`` and docs/configuration.md all read this table.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spark_llm.config_backend import BackendConf
from spark_llm.config_embedding import EmbeddingConf
from spark_llm.config_engine import EngineConf
from spark_llm.config_kinds import TEXT, Entry, choice, integer, key
from spark_llm.config_optimizer import OptimizerConf
from spark_llm.config_routing import RoutingConf
from spark_llm.config_sharing import SharingConf
from spark_llm.config_spending import SpendingConf
from spark_llm.cores import EXECUTOR_KEYS, executor_cores, executors, usable_cores
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from spark_llm.engine.config import EngineSpec, Task

PREFIX = "spark.llm."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmConf(BackendConf, EmbeddingConf, EngineConf, OptimizerConf, RoutingConf, SharingConf, SpendingConf):
    """The typed values of all ``spark.llm.*`` keys. Sizes are bytes, times are seconds.

    No keys: ``task_cores``, the cores of the executor that this was read in, 0 where it was not read in one,
    ``executors``, how many the application has at most, and ``instance``, which of its executor's engines a task asks.
    """

    model: str = key(
        "model",
        TEXT,
        "default",
        "The model that answers: `default` (the packaged SmolLM2-135M-Instruct), a folder with `config.json` "
        "and `*.safetensors`, a `.gguf` file, or a Hugging Face id. A call's `model => …` wins over it.",
    )
    max_output_length: int = key(
        "maxOutputLength",
        integer(1),
        "64",
        "Most tokens of an answer where the call has no `max_tokens => …`.",
    )
    chunk_length: int = key(
        "aggregate.chunkLength",
        integer(64),
        "2048",
        "Most tokens of texts, or of answers about texts, that one prompt of ai_agg and ai_summarize_agg has. Longer "
        "chunks are fewer calls; chunk, instruction and answer must fit the model's context.",
    )
    on_error: str = key(
        "onError",
        choice("null", "fail"),
        "null",
        "What a row that cannot be answered (for example a prompt longer than the context) gives: `null` is "
        "NULL, counted in the report; `fail` ends the query with the row's error.",
    )
    window_rows: int = key(
        "windowRows",
        integer(1),
        "4096",
        "Rows that a task folds, orders and sends to the engine at a time. More rows share more prefixes "
        "and take more memory in the Python worker. It is fewer where answers are large: some 10 MB of them.",
    )
    windows_in_flight: int = key(
        "windowsInFlight",
        integer(1),
        "2",
        "Windows of a task that the engine holds at a time; with 2 it never waits for the next one.",
    )
    progress: str = key(
        "progress",
        choice("auto", "true", "false"),
        "auto",
        "Show a progress line (rows, tokens per second, time left) while calls run; `auto` shows it on a terminal.",
    )
    task_cores: int = 0
    executors: int = 1
    instance: int = 0

    @classmethod
    def parse(cls, settings: Mapping[str, str]) -> LlmConf:
        """The configuration in ``settings`` (other keys than ``spark.llm.*`` only say what executors there are).

        Raises LlmError LLM_UNKNOWN_CONFIG (with the nearest key) or LLM_INVALID_CONFIG.
        """
        values: dict[str, Any] = {"task_cores": executor_cores(settings), "executors": executors(settings)}
        for name, text in settings.items():
            if name.startswith(PREFIX):
                entry = entries().get(name) or _unknown(name)
                values[entry.attribute] = entry.parse(text)
        return cls(**values)

    def engine_spec(self, model: str | None = None, task: Task = "generate") -> EngineSpec:
        """What an engine for ``model`` (default: ``spark.llm.model``, or ``embedding.model``) is started with on this
        machine."""
        from spark_llm.engine.config import EngineSpec

        model = model or (self.embedding_model if task == "embed" else self.model)
        backend = self.backend_spec(self.executors)
        if backend is not None:  # which knows nothing of devices and formats
            return EngineSpec(model=model, task=task, idle_timeout=self.idle_timeout, backend=backend)
        common: dict[str, Any] = {
            "model": model,
            "task": task,
            "dtype": self.dtype,
            "max_batch_tokens": self.max_batch_tokens,
            "context_length": self.context_length,
            "threads": self.threads or self._cores_of_engine(),
            "instance": self.instance,
            "device": self.device,
            "deterministic": self.deterministic,
            "idle_timeout": self.idle_timeout,
            "check_invariants": self.check_invariants,
        }
        if task == "embed":  # what else is set means nothing to an encoder, and must not make it another engine
            return EngineSpec(**common)
        return EngineSpec(
            **common,
            kv_cache_memory=self.kv_cache_memory,
            max_running_rows=self.max_running_rows,
            page_size=self.page_size,
            quantization=self.quantization,  # type: ignore[arg-type]
            tensor_parallel=self.tensor_parallel,
            scheduler=self.scheduler,  # type: ignore[arg-type]
            scheduler_quantum=self.scheduler_quantum,
        )

    def _cores_of_engine(self) -> int:
        cores = min(self.task_cores or usable_cores(), usable_cores())
        return max(1, cores // self.engines_per_executor)


@functools.cache
def entries() -> dict[str, Entry]:
    """All keys in their order: ``spark.llm.…`` -> Entry."""
    table = {}
    for field in dataclasses.fields(LlmConf):
        if field.metadata:
            about = dict(field.metadata)
            key = PREFIX + about.pop("name")
            table[key] = Entry(attribute=field.name, key=key, **about)
    return table


def from_session(spark: SparkSession) -> LlmConf:
    """The configuration of a session as it is now: ``SET`` and ``spark.conf`` over the session's builder."""
    return LlmConf.parse(dict(spark.conf.getAll))


def from_task() -> LlmConf:
    """The configuration that the query of the running Spark task was started with; only in a Python worker."""
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is None:
        raise RuntimeError("from_task() outside of a Spark task")
    keys = [*entries(), *EXECUTOR_KEYS]
    found = {key: context.getLocalProperty(key) for key in keys}
    conf = LlmConf.parse({key: text for key, text in found.items() if text is not None})
    gpus = context.resources().get("gpu")
    if conf.device not in ("auto", "cuda") or gpus is None or not gpus.addresses:
        return dataclasses.replace(conf, instance=context.partitionId() % conf.engines_per_executor)
    return dataclasses.replace(conf, device=_gpus_of_task(conf, gpus.addresses))


def _gpus_of_task(conf: LlmConf, addresses: Sequence[str]) -> str:
    """The device of a task to which Spark gave the GPUs at ``addresses``."""
    taken, count = addresses[: conf.tensor_parallel], conf.tensor_parallel
    no_number = next((address for address in taken if not address.isdigit()), None)
    if no_number is not None:
        reason = f"Spark gave the task the GPU {no_number!r}, which is no number"
    elif len(taken) < count:
        reason = (
            f"spark.llm.engine.tensorParallel takes {count} GPUs, and Spark gave the task {len(taken)} "
            f"(spark.task.resource.gpu.amount={count} gives it {count})"
        )
    else:
        return f"cuda:{','.join(taken)}"
    raise LlmError("LLM_DEVICE_NOT_AVAILABLE", device=conf.device, reason=reason)


def option_settings(options: Mapping[str, Any]) -> dict[str, str]:
    """Keyword options of ``enable()`` and ``session()`` as ``spark.llm.*`` settings, validated.

    A name is a key (``"spark.llm.engine.dtype"``), a key without its prefix (``"engine.dtype"``) or snake case
    (``engine_dtype``). A value is text or the Python value; None leaves the key as it is.
    """
    names = {name: entry for entry in entries().values() for name in _names(entry.key)}
    settings = {}
    for name, value in options.items():
        entry = names.get(name) or _unknown(name)
        if value is not None:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            entry.parse(text)
            settings[entry.key] = text
    return settings


def _names(key: str) -> tuple[str, str, str]:
    short = key.removeprefix(PREFIX)
    return key, short, _snake(short)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace(".", "_").lower()


def _unknown(name: str) -> Entry:
    """Raise LLM_UNKNOWN_CONFIG; the suggestion is written in the style of ``name``."""
    style = 0 if name.startswith(PREFIX) else 1 if "." in name else 2
    known = [_names(key)[style] for key in entries()]
    suggestion = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise LlmError("LLM_UNKNOWN_CONFIG", key=name, suggestion=suggestion)
