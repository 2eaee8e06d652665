"""What one engine process is: its model, number format, memory and limits.

Two tasks share an engine exactly when their specs are equal; ``EngineSpec.key`` names the socket.
This module holds no defaults of the Spark surface: ``spark_llm.config`` builds a spec from ``spark.llm.*``.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

DTYPES = ("auto", "float32", "bfloat16", "float16")
Task = Literal["generate", "embed"]


class BackendSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A server that speaks OpenAI's protocol and computes in an engine's place; the engine's process asks it.

    url: up to ``/v1``. key_env, key_file: where the API key is; both "": there is none. concurrency: most requests at a
    time. rpm, tpm: most requests and tokens a minute of this process; 0: no limit. timeout: of a request, in seconds.
    retries: how often a row is sent again after what may pass.
    """

    url: str
    key_env: str = ""
    key_file: str = ""
    concurrency: int = 64
    rpm: float = 0.0
    tpm: float = 0.0
    timeout: float = 600.0
    retries: int = 5


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that one engine process is started with.

    model: a folder, a ``.gguf`` file, a Hugging Face id, or ``"default"`` (the packaged model).
    kv_cache_memory: bytes of the paged K/V pool; 0 lets the engine choose from free memory.
    max_batch_tokens: most tokens computed in one step (prefill chunks and decodes together).
    max_running_rows: most rows that hold pages at a time; 0 lets the engine choose by its device.
    page_size: tokens a K/V page.
    context_length: most tokens of prompt + answer; 0 is the model's own.
    threads: CPU threads of the forward pass; 0 is every core that this process may use.
    device: ``auto`` takes the GPU that CUDA shows first, if any; ``cpu``, ``cuda`` or ``cuda:N`` is taken as it is.
    quantization: ``fp8`` multiplies the layers' matrices in e4m3, on a GPU that can.
    tensor_parallel: GPUs that share the model's layers: with ``cuda:N`` N and the following ones, with ``cuda:N,M,...``
    these.
    deterministic: on a GPU answers do not depend on what else runs, bit by bit; slower.
    scheduler: who goes next. ``dlpm`` shares the engine among clients by what is computed, and keeps prefixes; ``vtc``
    shares it by whole prompts; ``lpm`` (longest prefix first) and ``fcfs`` (first come, first served) know no clients.
    scheduler_quantum: tokens of service that ``dlpm`` gives a client of weight 1 at a time; 0: as many as a step has.
    idle_timeout: seconds without a stream after which the engine ends; 0 is never.
    instance: which of several engines of an executor it is, from 0 on; each takes the GPUs behind those before it.
    backend: who computes instead; ``model`` is then that server's name of the model.
    task: ``generate`` answers prompts; ``embed`` makes a vector of a text, and ``"default"`` is the packaged encoder.
    """

    model: str = "default"
    task: Task = "generate"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_memory: int = 0
    max_batch_tokens: int = 0
    max_running_rows: int = 0
    page_size: int = 1
    context_length: int = 0
    threads: int = 0
    device: str = "auto"
    quantization: Literal["none", "fp8"] = "none"
    tensor_parallel: int = 1
    deterministic: bool = False
    scheduler: Literal["dlpm", "vtc", "lpm", "fcfs"] = "dlpm"
    scheduler_quantum: int = 0
    idle_timeout: float = 300.0
    check_invariants: bool = False
    instance: int = 0
    backend: BackendSpec | None = None

    @property
    def key(self) -> str:
        """16 hex digits that are equal for equal specs."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]
