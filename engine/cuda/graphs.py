"""CUDA graphs of decode steps: a whole forward pass in one launch, for steps whose rows all decode.

Rows are padded to a bucket; work items lie in buffers of fixed size, whose rest is empty items, so that one graph
serves any tree of shared prefixes. Buckets are captured from large to small in one memory pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spark_llm.engine.cuda.attention_plan import FIELDS, MOST_PARTS, Device, Layout
from spark_llm.engine.cuda.decoder import DeviceDecoder, DeviceStep
from spark_llm.engine.cuda.inputs import Ints, Staging, packed_size
from spark_llm.engine.cuda.pool import DevicePool
from spark_llm.engine.cuda.step import HostStep

BUCKETS = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8, 4, 2, 1)


@dataclass(slots=True)
class _Captured:
    """capacity: of order, own and shared items. logits: [bucket, vocabulary], written by each replay."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    capacity: tuple[int, int, int]
    logits: Tensor
    lanes: Tensor


def logits_of_graphs(most_rows: int) -> int:
    """Rows of logits that the graphs of all buckets hold, for ``most_rows`` rows that run at a time."""
    return sum(_buckets(most_rows))


def _buckets(most_rows: int) -> tuple[int, ...]:
    largest = min((bucket for bucket in BUCKETS if bucket >= most_rows), default=BUCKETS[0])
    return tuple(bucket for bucket in BUCKETS if bucket <= largest)


class DecodeGraphs:
    """Graphs of the decoder for up to 512 decoding rows; larger steps are long enough to hide their launches."""

    def __init__(self, decoder: DeviceDecoder, pool: DevicePool, device: Device) -> None:
        self._decoder = decoder
        self._pool = pool
        self._device = device
        self._captured: dict[int, _Captured] = {}
        self._buckets: tuple[int, ...] = ()
        self._workspace: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def capture(self, most_rows: int) -> None:
        """Capture every bucket that ``most_rows`` rows may need."""
        self._buckets = _buckets(most_rows)
        # Graphs write to where the workspace was when they were captured: it must live as long as they do.
        self._workspace = self._decoder.reserve_parts(self._buckets[0] * MOST_PARTS)
        memory = torch.cuda.graph_pool_handle()
        staging = Staging(1 << 16, self._decoder.device)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for bucket in self._buckets:
            self._captured[bucket] = self._capture(bucket, staging, memory, stream)

    def run(
        self,
        step: HostStep,
        layout: Layout,
        staging: Staging,
    ) -> tuple[Tensor, Tensor] | None:
        """Logits of the step's rows and their lanes, or None if no graph holds it."""
        rows = step.decodes
        bucket = min((b for b in self._buckets if b >= rows), default=0)
        if not bucket:
            return None
        captured = self._captured[bucket]
        found = (len(layout.order), len(layout.own), len(layout.shared))
        if any(have > most for have, most in zip(found, captured.capacity, strict=True)):
            return None
        staging.upload(self._arrays(bucket, step, layout), into=captured.inputs)
        captured.graph.replay()
        return captured.logits[:rows], captured.lanes[:rows].long()

    def _capture(self, bucket: int, staging: Staging, memory: Any, stream: torch.cuda.Stream) -> _Captured:
        arrays = self._arrays(bucket, None, None)
        inputs = torch.empty(
            packed_size(a.size for a in arrays.values()), dtype=torch.int32, device=self._decoder.device
        )
        views = staging.upload(arrays, into=inputs)

        def forward() -> Tensor:
            step = DeviceStep(
                tokens=self._pool.last_tokens.index_select(0, views["lanes"]),
                positions=views["positions"],
                lanes=views["lanes"],
                order=views["order"],
                own=views["own"],
                shared=views["shared"],
                long=views["shared"][:0],
                parts=views["parts"],
                most_parts=MOST_PARTS,
                last=None,
            )
            return self._decoder.forward(step, self._pool)

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()  # compiles kernels and picks cuBLAS algorithms: neither may happen while capturing
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits = forward()
        return _Captured(graph, inputs, self._capacity(bucket), logits, views["lanes"])

    def _capacity(self, bucket: int) -> tuple[int, int, int]:
        """Entries of order, own and shared items that the graph's buffers hold."""
        fill = self._device.programs // self._device.kv_heads
        tiles = bucket * self._device.group // self._device.shared_tile
        return 4 * bucket, max(bucket, fill), bucket // 8 + tiles + fill + 8

    def _arrays(self, bucket: int, step: HostStep | None, layout: Layout | None) -> dict[str, Ints]:
        """The graph's inputs, padded; without a step, all padding."""
        orders, owns, shareds = self._capacity(bucket)

        def padded(values: Ints | None, length: int, fill: int) -> Ints:
            whole = np.full(length, fill, np.int32)
            if values is not None:
                whole[: len(values)] = values
            return whole

        def items(values: Ints | None, length: int) -> Ints:
            whole = np.zeros((length, FIELDS), np.int32)
            if values is not None:
                whole[: len(values)] = values
            return whole

        if step is None or layout is None:
            lanes = positions = order = parts = own = shared = None
        else:
            lanes, positions = step.lanes, step.positions
            order, parts, own, shared = layout.order, layout.parts, layout.own, layout.shared
        return {
            "lanes": padded(lanes, bucket, self._pool.scratch_lane),
            "positions": padded(positions, bucket, 0),
            "order": padded(order, orders, 0),
            "own": items(own, owns),
            "shared": items(shared, shareds),
            "parts": padded(parts, bucket, 1),
        }
