"""The keys of an engine: number format, memory, limits, device, and how long it lives."""

from __future__ import annotations

import dataclasses

from spark_llm.config_kinds import BOOLEAN, DEVICE, SIZE, TIME, choice, integer, key


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConf:
    """Engines. Sizes are bytes, times are seconds."""

    dtype: str = key(
        "engine.dtype",
        choice("auto", "float32", "bfloat16", "float16"),
        "auto",
        "Number format of weights and computation; `auto` takes the fastest one that the machine computes in hardware.",
    )
    kv_cache_memory: int = key(
        "engine.kvCacheMemory",
        SIZE,
        "0",
        "Memory of the key/value cache of one engine, which prompts share; 0 lets the engine choose from the "
        "free memory.",
    )
    max_batch_tokens: int = key(
        "engine.maxBatchTokens",
        integer(0),
        "0",
        "Most tokens that an engine computes in one step; 0 lets the engine choose. (Spark shows the value "
        "redacted in `SET`, because the name holds the word token.)",
    )
    max_running_rows: int = key(
        "engine.maxRunningRows",
        integer(0),
        "0",
        "Most rows that an engine works on at a time; 0 lets the engine choose (256 on a CPU, and 32 of clients that "
        "have few; 4096 on a GPU).",
    )
    page_size: int = key(
        "engine.pageSize",
        integer(1),
        "1",
        "Tokens of a page of the key/value cache. Prompts share whole pages.",
    )
    context_length: int = key(
        "engine.contextLength",
        integer(0),
        "0",
        "Most tokens of prompt and answer together, and of a text that is embedded; 0 is what the model was made "
        "for, which is also the most there can be.",
    )
    threads: int = key(
        "engine.threads",
        integer(0),
        "0",
        "CPU threads of one engine; 0 takes as many as the executor has cores.",
    )
    device: str = key(
        "engine.device",
        DEVICE,
        "auto",
        "Where an engine computes: `cpu`, `cuda`, `cuda:1` for the second GPU, or `cuda:1,3`, of which as many are "
        "taken as `spark.llm.engine.tensorParallel` says. `auto` and `cuda` take the GPUs that Spark gave the task "
        "(`spark.task.resource.gpu.amount`), else the first ones; `auto` else the CPU.",
    )
    quantization: str = key(
        "engine.quantization",
        choice("none", "fp8"),
        "none",
        "`fp8` multiplies the layers' matrices in 8 bits (e4m3) on GPUs from Ada and Hopper on: faster, and answers "
        "may differ.",
    )
    tensor_parallel: int = key(
        "engine.tensorParallel",
        integer(1),
        "1",
        "How many GPUs share a model's layers, for models that are too large or too slow for one. With `cuda:1` these "
        "are GPU 1 and those after it; where Spark gives GPUs to tasks, a task must get that many.",
    )
    deterministic: bool = key(
        "engine.deterministic",
        BOOLEAN,
        "false",
        "On a GPU: compute every row by itself, bit by bit, whatever else runs; slower, and not with `fp8`. On a CPU "
        "only shared prefixes are read once per row: its products still depend on how many rows there are.",
    )
    idle_timeout: float = key(
        "engine.idleTimeout",
        TIME,
        "5m",
        "An engine without work ends after this time and frees its memory; 0 keeps it until its executor ends.",
    )
    start_timeout: float = key(
        "engine.startTimeout",
        TIME,
        "10m",
        "How long a task waits for an engine to load its model.",
    )
    prefix_cache: bool = key(
        "engine.prefixCache",
        BOOLEAN,
        "true",
        "Reuse the computed prefix of earlier prompts. Off is for measuring what it saves.",
    )
    check_invariants: bool = key(
        "engine.checkInvariants",
        BOOLEAN,
        "false",
        "Check the engine's bookkeeping after every step; slow, for finding bugs.",
    )
