"""Brings a model onto a GPU and sizes everything around it: K/V pool, lanes, workspaces, graphs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.cuda.attention_plan import LONG_TILES, Device
from spark_llm.engine.cuda.decoder import DeviceDecoder
from spark_llm.engine.cuda.graphs import logits_of_graphs
from spark_llm.engine.cuda.linear import DenseLinear, Fp8Linear, InvariantLinear, MakeLinear
from spark_llm.engine.cuda.memory import await_memory, pool_pages, room_on
from spark_llm.engine.cuda.pool import DevicePool
from spark_llm.engine.cuda.ranks import ALONE, Ranks, join
from spark_llm.engine.cuda.runner import DeviceRunner
from spark_llm.engine.cuda.shards import Shards, vocabulary_width
from spark_llm.engine.cuda.team import Peers, Team
from spark_llm.engine.cuda.weights import DeviceWeights
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.loader import expected_shapes
from spark_llm.errors import LlmError

log = logging.getLogger(__name__)

BATCH_TOKENS = 8192  # of a step: products this tall run at full speed, and a step of a small model hides its launches
ROWS = 4096  # that run at a time
_TABLE_ENTRIES = 1 << 28  # of the page table: 1 GiB


def load_runner(
    spec: EngineSpec,
    shards: Shards,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    peers: Peers | None = None,
    graphs: bool = True,
) -> DeviceRunner:
    """The model, or the part of it that ``shards`` and ``weights`` are, on ``device``, ready to run.

    peers: the other ranks, which load at the same time. LLM_NO_MEMORY; LLM_INVALID_CONFIG for settings that exclude
    one another.
    """
    check_settings(spec, dtype)
    torch.cuda.set_device(device)
    await_memory(device)
    try:
        return _load(spec, shards, weights, dtype, device, peers, graphs)
    except torch.OutOfMemoryError as error:
        elements = sum(math.prod(shape) for shape in expected_shapes(shards.config).values())
        needed = elements * dtype.itemsize / shards.size
        free, _ = torch.cuda.mem_get_info(device)
        raise LlmError(
            "LLM_NO_MEMORY",
            needed=f"more than {needed / 2**20:,.1f} MiB",
            purpose=f"its weights and largest step on {room_on(device)}",
            available=f"{free / 2**20:,.1f} MiB",
            setting="spark.llm.engine.maxBatchTokens",
        ) from error


def check_settings(spec: EngineSpec, dtype: torch.dtype) -> None:
    """LLM_INVALID_CONFIG for settings that exclude one another."""
    if spec.quantization != "fp8":
        return
    if spec.deterministic:
        expected = "none where spark.llm.engine.deterministic is true"
        raise LlmError("LLM_INVALID_CONFIG", key="spark.llm.engine.quantization", value="'fp8'", expected=expected)
    if dtype != torch.bfloat16:
        expected = "auto or bfloat16 where spark.llm.engine.quantization is fp8"
        raise LlmError("LLM_INVALID_CONFIG", key="spark.llm.engine.dtype", value=repr(spec.dtype), expected=expected)


def _load(
    spec: EngineSpec,
    shards: Shards,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    peers: Peers | None,
    graphs: bool,
) -> DeviceRunner:
    begun = time.monotonic()
    config = shards.part
    head: MakeLinear = InvariantLinear if spec.deterministic else DenseLinear
    layer: MakeLinear = Fp8Linear if spec.quantization == "fp8" else head
    held = DeviceWeights(shards, weights, dtype, device, layer=layer, head=head)
    context_length = min(spec.context_length or config.context_length, config.context_length)
    layout = layout_for(config, device, page_size=spec.page_size, cascade=not spec.deterministic)
    tiles = (layout.own_tile, layout.shared_tile)
    ranks = _meet(peers, device, spec.deterministic)
    decoder = DeviceDecoder(
        config, held, context_length=context_length, dtype=dtype, device=device, tiles=tiles, ranks=ranks
    )
    batch_tokens, lanes = batch_limit(spec), lane_limit(spec, context_length)
    step_bytes = _largest_step(decoder, layout, spec, context_length, batch_tokens, lanes)
    if graphs:
        step_bytes += logits_of_graphs(lanes) * vocabulary_width(config.vocab_size, shards.size) * dtype.itemsize
    pages = pool_pages(spec, config, dtype, device, step_bytes)
    if peers is not None:
        pages = peers.least(pages)  # a page has one number on all ranks
    pool = DevicePool(
        config, pages=pages, page_size=spec.page_size, lanes=lanes, context_length=context_length,
        dtype=dtype, device=device,
    )  # fmt: skip
    team = peers if isinstance(peers, Team) else None
    runner = DeviceRunner(
        decoder, pool, layout, graphs=graphs, most_results=_most_results(lanes, batch_tokens), team=team
    )
    runner.prepare()
    if peers is not None:
        peers.least(0)  # a rank that fails until here is an engine that does not start
    log.info(
        "model %s on %s: %s, K/V pool of %d pages x %d tokens, %d lanes, loaded in %.1f s",
        config.name, torch.cuda.get_device_name(device), dtype, pages, spec.page_size, lanes, time.monotonic() - begun,
    )  # fmt: skip
    return runner


def _meet(peers: Peers | None, device: torch.device, ordered: bool) -> Ranks:
    if peers is None:
        return ALONE
    peers.least(0)  # all have their weights: what a rank lacks it has told by now, instead of not coming
    return join(peers.rank, peers.size, peers.rendezvous, device, ordered=ordered)


def layout_for(config: ModelConfig, device: torch.device, *, page_size: int, cascade: bool) -> Device:
    """What attention layouts depend on."""
    group = config.num_heads // config.num_kv_heads
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return Device(
        group=group,
        kv_heads=config.num_kv_heads,
        page_size=page_size,
        multiprocessors=processors,
        # without cascade (deterministic) a token that is computed again, in a prompt now, must have the same bits
        own_tile=max(16, 1 << (group - 1).bit_length()) if cascade else LONG_TILES[-1],
        cascade=cascade,
        splits=cascade,
    )


def batch_limit(spec: EngineSpec) -> int:
    """Tokens of a step."""
    return spec.max_batch_tokens or BATCH_TOKENS


def lane_limit(spec: EngineSpec, context_length: int) -> int:
    """Rows that run at a time: what the page table has room for."""
    width = -(-context_length // spec.page_size)
    return min(spec.max_running_rows or ROWS, max(256, _TABLE_ENTRIES // width))


def _most_results(lanes: int, batch_tokens: int) -> int:
    """Partial attention results of a step that there is room for: four of each row."""
    return 4 * min(lanes, batch_tokens)


def _largest_step(
    decoder: DeviceDecoder, layout: Device, spec: EngineSpec, context_length: int, batch_tokens: int, lanes: int
) -> int:
    """Bytes that the largest step takes beside weights and pool, by running one."""
    pool = DevicePool(
        decoder.config, pages=1, page_size=spec.page_size, lanes=1, context_length=context_length,
        dtype=decoder.dtype, device=decoder.device,
    )  # fmt: skip
    decoder.reserve_parts(_most_results(lanes, batch_tokens))
    torch.cuda.synchronize(decoder.device)
    torch.cuda.reset_peak_memory_stats(decoder.device)
    before = torch.cuda.memory_allocated(decoder.device)
    DeviceRunner(decoder, pool, layout, graphs=False).profile(batch_tokens, min(lanes, batch_tokens))
    torch.cuda.synchronize(decoder.device)
    peak = torch.cuda.max_memory_allocated(decoder.device) - before
    torch.cuda.empty_cache()
    table = (lanes + 1) * -(-context_length // spec.page_size) * 4
    return peak + table
