"""A step's inputs on their way to the device: one pinned buffer, one asynchronous copy, views into it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int32]

_RING = 3  # buffers: one that the device reads, one that waits for it, one that the host fills
_ALIGN = 32  # int32 a section begins at a multiple of: 128 bytes, as kernels like to load


class Staging:
    """Host buffers of ``capacity`` int32 and their counterparts on the device, used in turn.

    On a CPU (kernels in the interpreter) the counterpart is a plain copy.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._capacity = capacity
        self._at = 0
        self._host = [self._allocate_host(capacity) for _ in range(_RING)]
        self._on_device = [torch.empty(capacity, dtype=torch.int32, device=device) for _ in range(_RING)]
        self._copied: list[torch.cuda.Event | None] = [None] * _RING

    def upload(self, arrays: Mapping[str, Ints], into: Tensor | None = None) -> dict[str, Tensor]:
        """The arrays on the device, by name, in their shapes; valid until the ring comes round.

        into: a buffer to copy to instead of the ring's (the fixed inputs of a graph); arrays then lie in it in order.
        """
        size = packed_size(array.size for array in arrays.values())
        if size > self._capacity:
            self._grow(size)
        slot = self._at = (self._at + 1) % _RING
        event = self._copied[slot]
        if event is not None:
            event.synchronize()
        host = self._host[slot].numpy()
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        at = 0
        for name, array in arrays.items():
            host[at : at + array.size] = array.reshape(-1)
            places[name] = at, array.shape
            at = aligned(at + array.size)
        target = self._on_device[slot] if into is None else into
        target[:size].copy_(self._host[slot][:size], non_blocking=True)
        if self._cuda:
            event = self._copied[slot] = event or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return {
            name: target[start : start + int(np.prod(shape))].view(shape) for name, (start, shape) in places.items()
        }

    def _allocate_host(self, capacity: int) -> Tensor:
        return torch.empty(capacity, dtype=torch.int32, pin_memory=self._cuda)

    def _grow(self, size: int) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        self._capacity = 2 * size
        self._host = [self._allocate_host(self._capacity) for _ in range(_RING)]
        self._on_device = [torch.empty(self._capacity, dtype=torch.int32, device=self._device) for _ in range(_RING)]
        self._copied = [None] * _RING


def aligned(at: int) -> int:
    """Where the section after one that ends at ``at`` begins."""
    return -(-at // _ALIGN) * _ALIGN


def packed_size(sizes: object) -> int:
    """int32 that sections of these sizes take, one after the other."""
    at = 0
    for size in sizes:  # type: ignore[attr-defined]
        at = aligned(at + size)
    return at
