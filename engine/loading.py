"""From a spec to an engine that is ready: device, weights, K/V pool, text."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from msgspec.structs import replace

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.cuda.device import choose_devices, device_dtype, device_of_instance
from spark_llm.engine.cuda.shards import Shards, check_size
from spark_llm.engine.cuda.team import Peers, Seat, Team
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.decoder import Decoder, KVPool
from spark_llm.engine.model.linear import fastest_dtype
from spark_llm.engine.model.loader import iter_weights, load_config
from spark_llm.engine.model.source import ModelSource, resolve
from spark_llm.engine.runner import Runner
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.cuda.runner import DeviceRunner
    from spark_llm.engine.text.pipeline import TextPipeline

log = logging.getLogger(__name__)

_MAX_AUTO_POOL = 4 << 30
_AUTO_POOL_SHARE = 0.25  # of the memory that is available when the engine starts


def load_engine(spec: EngineSpec, *, text: bool = True) -> Engine:
    """Read the model and size the pool. text False: an engine of token ids, for measuring it alone.

    LlmError: the model, its tokenizer, the device or the memory is not there.
    """
    if spec.threads:
        torch.set_num_threads(spec.threads)
    requested = device_of_instance(spec.device, spec.instance, spec.tensor_parallel)
    devices = choose_devices(requested, spec.quantization, spec.tensor_parallel)
    source = resolve(spec.model)
    config = load_config(source)
    pipeline = _text(source) if text else None
    if devices[0].type == "cpu":
        return _on_cpu(spec, source, config, pipeline)
    return _on_gpu(spec, source, config, pipeline, devices)


def load_rank(spec: EngineSpec, device: str, seat: Seat) -> DeviceRunner:
    """The part of the model that a rank other than the first holds on ``device``."""
    source = resolve(spec.model)
    return _runner(spec, source, load_config(source), torch.device(device), seat)


def _text(source: ModelSource) -> TextPipeline:
    from spark_llm.engine.text.pipeline import TextPipeline  # needs packages that an engine of ids does without

    return TextPipeline.load(source)


def _on_cpu(spec: EngineSpec, source: ModelSource, config: ModelConfig, text: TextPipeline | None) -> Engine:
    stored, computed = _cpu_dtypes(spec.dtype)
    context_length = min(spec.context_length or config.context_length, config.context_length)
    decoder = Decoder(config, iter_weights(source, stored, config), computed, context_length)
    pages = _cpu_pages(spec, config, computed)
    pool = KVPool(config, pages * spec.page_size, computed)
    label = str(stored).removeprefix("torch.")
    log.info(
        "model %s: %s weights, %s arithmetic, %d threads, K/V pool of %d pages x %d tokens",
        config.name, label, computed, torch.get_num_threads(), pages, spec.page_size,
    )  # fmt: skip
    runner = Runner(decoder, pool, spec.page_size, cascade=not spec.deterministic)
    return Engine(spec, runner, CacheManager(pages, spec.page_size), text, label)


def _on_gpu(
    spec: EngineSpec,
    source: ModelSource,
    config: ModelConfig,
    text: TextPipeline | None,
    devices: list[torch.device],
) -> Engine:
    from spark_llm.engine.cuda.load import batch_limit  # imports Triton, which only GPUs need

    check_size(config, spec.tensor_parallel, spec.quantization)
    team = Team(spec, [str(device) for device in devices]) if len(devices) > 1 else None
    try:
        runner = _runner(spec, source, config, devices[0], team)
    except BaseException:
        if team is not None:
            team.close()
        raise
    label = str(runner.decoder.dtype).removeprefix("torch.") + (" fp8" if spec.quantization == "fp8" else "")
    chosen = replace(spec, max_batch_tokens=batch_limit(spec), max_running_rows=runner.pool.lanes)
    return Engine(chosen, runner, CacheManager(runner.pool.pages, spec.page_size), text, label)


def _runner(
    spec: EngineSpec, source: ModelSource, config: ModelConfig, device: torch.device, peers: Peers | None
) -> DeviceRunner:
    from spark_llm.engine.cuda.load import load_runner

    dtype = device_dtype(spec.dtype, device)
    shards = Shards(config) if peers is None else Shards(config, peers.rank, peers.size)
    weights = iter_weights(source, dtype, config, device, shards)
    return load_runner(spec, shards, weights, dtype, device, peers=peers)


def _cpu_dtypes(requested: str) -> tuple[torch.dtype, torch.dtype]:
    """What weights are rounded to, and what is computed in.

    On a CPU whose half-precision products are slower than float32's, half-precision weights are computed in
    float32: the answers of the format, at the speed of the hardware.
    """
    fastest = fastest_dtype()
    if requested == "auto":
        return fastest, fastest
    stored: torch.dtype = getattr(torch, requested)
    return stored, stored if stored == fastest else torch.float32


def _cpu_pages(spec: EngineSpec, config: ModelConfig, dtype: torch.dtype) -> int:
    """Pages of the K/V pool; LLM_NO_MEMORY if not one page fits or the memory is not there."""
    available = psutil.virtual_memory().available
    wanted = spec.kv_cache_memory or min(int(available * _AUTO_POOL_SHARE), _MAX_AUTO_POOL)
    page = KVPool.bytes_per_token(config, dtype) * spec.page_size
    if wanted > available or wanted < page:
        raise LlmError(
            "LLM_NO_MEMORY",
            needed=f"{max(wanted, page) / 2**20:,.1f} MiB",
            purpose="its K/V cache",
            available=f"{min(available, wanted) / 2**20:,.1f} MiB",
            setting="spark.llm.engine.kvCacheMemory" if wanted > available else "spark.llm.engine.pageSize",
        )
    return int(np.clip(wanted // page, 1, 2**31 - 1))
