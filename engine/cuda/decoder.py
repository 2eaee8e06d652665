"""The Llama-family decoder on a GPU: cuBLAS products between our own kernels, no copy that a kernel can avoid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spark_llm.engine.cuda.linear import DenseLinear, Linear
from spark_llm.engine.cuda.pool import DevicePool
from spark_llm.engine.cuda.ranks import ALONE, Ranks
from spark_llm.engine.cuda.weights import DeviceWeights
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.rope import frequencies
from spark_llm.kernels.activation import silu_and_mul
from spark_llm.kernels.candidates import candidate_logits
from spark_llm.kernels.norm import add_rms_norm
from spark_llm.kernels.paged_attention import attend, merge_parts
from spark_llm.kernels.rope import rope_and_store


@dataclass(slots=True)
class DeviceStep:
    """A step's inputs on the device, int32 throughout; T tokens, S of which yield a next token.

    tokens, positions, lanes: [T]. own, shared, long: [items, 8] work items. order: tokens that shared ones name.
    long_tile: rows of the query tiles of long items.
    parts: [M], for the first M tokens how many partial results they have; None if no token has more than one.
    most_parts: an upper bound of them. last: [S], the tokens that sample, or None if all do, in their order.
    candidates: [S, most], or -1: only their logits are wanted; None: those of the whole vocabulary.
    """

    tokens: Tensor
    positions: Tensor
    lanes: Tensor
    order: Tensor
    own: Tensor
    shared: Tensor
    long: Tensor
    parts: Tensor | None
    most_parts: int
    last: Tensor | None
    long_tile: int = 128
    candidates: Tensor | None = None


class DeviceDecoder:
    """A model on ``device``, or one rank's part of it: then ``config`` is the shape of that part."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DeviceWeights,
        *,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
        tiles: tuple[int, int],
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.weights = weights
        self.dtype = dtype
        self.device = device
        angles = torch.outer(torch.arange(context_length, dtype=torch.float32), frequencies(config))
        self._cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
        self._own_tile, self._shared_tile = tiles
        self._scale = config.head_dim**-0.5
        self._part_out = torch.empty(0, dtype=torch.float32, device=device)
        self._part_lse = torch.empty(0, dtype=torch.float32, device=device)

    def reserve_parts(self, results: int) -> tuple[Tensor, Tensor]:
        """Room for ``results`` partial results (parts x tokens); a larger one is kept. Returns what holds them."""
        heads, dim = self.config.num_heads, self.config.head_dim
        if results * heads > self._part_lse.numel():
            self._part_lse = torch.empty(results * heads, dtype=torch.float32, device=self.device)
            self._part_out = torch.empty(results * heads * dim, dtype=torch.float32, device=self.device)
        return self._part_out, self._part_lse

    @property
    def reads_candidates(self) -> bool:
        """Whether ``forward`` can compute the logits of candidates only: the whole LM head is here, as it is.

        Not in the deterministic mode, whose logits must not hang on what else the step answers.
        """
        return isinstance(self.weights.head, DenseLinear) and self.ranks.size == 1

    @torch.inference_mode()
    def forward(self, step: DeviceStep, pool: DevicePool) -> Tensor:
        """Writes the K/V of all T tokens and returns the logits [S, vocabulary] in the model's dtype, of several
        ranks each its own part [S, part of the vocabulary]; of candidates [S, most], in float32.

        K/V of a layer are written before any query reads, so that rows of one step may share a prefix that this very
        step computes. In the last layer only the S tokens that sample go beyond K/V.
        """
        config, eps, layers = self.config, self.config.rms_norm_eps, self.weights.layers
        residual = F.embedding(step.tokens, self.weights.embedding)
        normed, scale = input_of(layers[0].qkv, residual, config.hidden_size)
        add_rms_norm(None, residual, layers[0].input_norm, eps, normed, scale)
        q = residual.new_empty(len(residual), config.num_heads, config.head_dim)
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            k_pool, v_pool = pool.k[index], pool.v[index]
            rope_and_store(
                layer.qkv(normed, scale), self._cos_sin, step.positions, step.lanes, pool.table, k_pool, v_pool, q,
                page_size=pool.page_size, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=eps,
            )  # fmt: skip
            attended = self._attend(step, q, k_pool, v_pool, pool).view(len(q), -1)
            if index == last and step.last is not None:
                # torch's own gather: a kernel of ours has nothing to fuse here
                attended, residual = attended.index_select(0, step.last), residual.index_select(0, step.last)
                normed, scale = input_of(layer.gate_up, residual, config.hidden_size)
            add_rms_norm(self.ranks.sum(layer.o(attended)), residual, layer.post_norm, eps, normed, scale)
            gate_up = layer.gate_up(normed, scale)
            inner, inner_scale = input_of(layer.down, gate_up, config.intermediate_size)
            silu_and_mul(gate_up, inner, inner_scale)
            following = self.weights.norm if index == last else layers[index + 1].input_norm
            if index == last:
                normed, scale = input_of(self.weights.head, residual, config.hidden_size)
            add_rms_norm(self.ranks.sum(layer.down(inner, inner_scale)), residual, following, eps, normed, scale)
        head = self.weights.head
        if step.candidates is None:
            return head(normed, scale)
        assert isinstance(head, DenseLinear), "see reads_candidates"
        return candidate_logits(normed, head.weight, step.candidates)

    def _attend(self, step: DeviceStep, q: Tensor, k_pool: Tensor, v_pool: Tensor, pool: DevicePool) -> Tensor:
        out = torch.empty_like(q)
        heads, dim = self.config.num_heads, self.config.head_dim
        tokens = 0 if step.parts is None else len(step.parts)
        shape = (step.most_parts, tokens, heads)
        part_lse = self._part_lse[: step.most_parts * tokens * heads].view(shape)
        part_out = self._part_out[: step.most_parts * tokens * heads * dim].view(*shape, dim)
        blocks = ((step.long, step.long_tile), (step.shared, self._shared_tile), (step.own, self._own_tile))
        for items, tile in blocks:
            if len(items):
                attend(
                    q, k_pool, v_pool, pool.table, step.order if items is step.shared else None, items, out, part_out,
                    part_lse, page_size=pool.page_size, scale=self._scale, tile=tile,
                )  # fmt: skip
        if step.parts is not None:
            merge_parts(part_out, part_lse, step.parts, out[:tokens])
        return out


def input_of(linear: Linear, like: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Room for what ``linear`` multiplies, [len(like), width], and for its scales where it takes e4m3."""
    if not linear.takes_fp8:
        return like.new_empty(len(like), width), None
    return like.new_empty(len(like), width, dtype=torch.float8_e4m3fn), like.new_empty(len(like), dtype=torch.float32)
