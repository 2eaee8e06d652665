"""K and V of every token slot on the device, and which pages each lane's row stands on."""

from __future__ import annotations

import torch

from spark_llm.engine.model.config import ModelConfig


class DevicePool:
    """k, v: [layers, slots, kv heads, head dim]; the last page is nobody's: padding writes there.

    table: int32 [lanes + 1, pages a row]; the last lane is that of padding, and stands on the last page.
    last_tokens: int32 [lanes + 1], the token sampled last.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        pages: int,
        page_size: int,
        lanes: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (config.num_layers, (pages + 1) * page_size, config.num_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.page_size = page_size
        self.pages = pages
        self.lanes = lanes
        self.scratch_lane = lanes
        self.width = -(-context_length // page_size)
        self.table = torch.full((lanes + 1, self.width), pages, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(lanes + 1, dtype=torch.int32, device=device)
        scratch = slice(pages * page_size, None)
        self.k[:, scratch] = 0  # read by padding: must be finite
        self.v[:, scratch] = 0

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
