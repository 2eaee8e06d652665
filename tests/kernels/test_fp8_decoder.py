"""The decoder's norms and activation write what its FP8 products read: the same logits as quantising in passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spark_llm.engine.cuda.attention_plan import FIELDS
from spark_llm.engine.cuda.decoder import DeviceDecoder, DeviceStep
from spark_llm.engine.cuda.linear import Fp8Linear
from spark_llm.engine.cuda.pool import DevicePool
from spark_llm.engine.cuda.shards import Shards
from spark_llm.engine.cuda.weights import DeviceWeights
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.loader import expected_shapes
from spark_llm.kernels import quantize

TOKENS, SAMPLED = 5, 2
CONFIG = ModelConfig(
    name="tiny", architecture="LlamaForCausalLM", vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=2,
    num_heads=2, num_kv_heads=1, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4, context_length=16,
)  # fmt: skip


class UnfusedFp8Linear(Fp8Linear):
    """Quantises its input by itself."""

    __slots__ = ()
    takes_fp8 = False


def logits(linear: type[Fp8Linear], device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: (0.4 * torch.randn(size, generator=draw) + (0 if len(size) > 1 else 0.7))
        for name, size in expected_shapes(CONFIG).items()
    }
    held = DeviceWeights(Shards(CONFIG), weights.items(), torch.bfloat16, device, layer=linear)
    decoder = DeviceDecoder(CONFIG, held, context_length=16, dtype=torch.bfloat16, device=device, tiles=(16, 128))
    pool = DevicePool(
        CONFIG, pages=TOKENS, page_size=1, lanes=1, context_length=16, dtype=torch.bfloat16, device=device
    )
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    pool.table[0, :TOKENS] = ints(range(TOKENS))
    none = torch.empty(0, FIELDS, dtype=torch.int32, device=device)
    step = DeviceStep(
        tokens=ints([3, 9, 27, 41, 7]), positions=ints(range(TOKENS)), lanes=ints([0] * TOKENS), order=ints([0]),
        own=none, shared=none, long=ints([[0, TOKENS, 0, 0, TOKENS, 0, 0, 1]]), parts=None, most_parts=1,
        last=ints([2, 4]), long_tile=64,
    )  # fmt: skip
    return decoder.forward(step, pool)


def test_fused_outputs_are_those_of_a_pass(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    quantize_fp8 = quantize.quantize_fp8

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        passes.append(len(x))
        return quantize_fp8(x)

    monkeypatch.setattr(quantize, "quantize_fp8", counted)
    place = torch.device(device)
    unfused = logits(UnfusedFp8Linear, place)
    assert passes == [TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, SAMPLED, SAMPLED, SAMPLED], "qkv, o, gate and up, down"
    passes.clear()
    fused = logits(Fp8Linear, place)
    assert passes == [TOKENS, SAMPLED], "attention's outputs only"
    assert torch.equal(fused, unfused)
    assert fused.shape == (SAMPLED, CONFIG.vocab_size)
    assert fused.isfinite().all()
    assert fused.float().std() > 0
