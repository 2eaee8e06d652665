"""Which part of each tensor one of several GPUs holds (Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3).

Query heads, K/V heads and columns of the MLP are shared out; what projects back (o, down) is split along its input, so
that the ranks' products add up to the whole one. The LM head is split over the vocabulary; the rest every rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from spark_llm.engine.model.config import ModelConfig
from spark_llm.errors import LlmError

_FP8_MULTIPLE = 16  # of both sides of a matrix that is multiplied in e4m3
_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Shards:
    """The part of ``rank`` among ``size`` ranks of a model that ``config`` describes as a whole."""

    config: ModelConfig
    rank: int = 0
    size: int = 1

    @property
    def part(self) -> ModelConfig:
        """The shape of the rank's layers. K/V heads that are fewer than ranks are held by several of them."""
        config, size = self.config, self.size
        return replace(
            config,
            num_heads=config.num_heads // size,
            num_kv_heads=max(1, config.num_kv_heads // size),
            intermediate_size=config.intermediate_size // size,
        )

    @property
    def vocabulary(self) -> slice:
        """The rank's tokens: those that its rows of the LM head are of. The last rank may have fewer."""
        width = vocabulary_width(self.config.vocab_size, self.size)
        return slice(self.rank * width, min((self.rank + 1) * width, self.config.vocab_size))

    def __call__(self, name: str) -> tuple[slice, ...]:
        """Where in the tensor of this name the rank's part lies."""
        if self.size == 1:
            return (_ALL,)
        module, kind = name.split(".")[-2:]
        dim = self.config.head_dim
        if module == "q_proj":
            return (self._share(self.config.num_heads * dim),)
        if module in ("k_proj", "v_proj"):
            heads = self.part.num_kv_heads
            first = self.rank * self.config.num_kv_heads // self.size
            return (slice(first * dim, (first + heads) * dim),)
        if module in ("gate_proj", "up_proj"):
            return (self._share(self.config.intermediate_size),)
        if module == "o_proj" and kind == "weight":
            return _ALL, self._share(self.config.num_heads * dim)
        if module == "down_proj" and kind == "weight":
            return _ALL, self._share(self.config.intermediate_size)
        return (self.vocabulary,) if module == "lm_head" else (_ALL,)

    def adds_bias(self, name: str) -> bool:
        """False for a bias of a sum over ranks: the first rank adds it."""
        return self.rank == 0 or not name.endswith(("o_proj.bias", "down_proj.bias"))

    def _share(self, length: int) -> slice:
        width = length // self.size
        return slice(self.rank * width, (self.rank + 1) * width)


def vocabulary_width(vocabulary: int, size: int) -> int:
    """Tokens of a rank's part of the LM head, but for the last rank's."""
    return -(-vocabulary // size)


def check_size(config: ModelConfig, size: int, quantization: str) -> None:
    """LLM_INVALID_CONFIG, naming the shape, if a model cannot be shared out among ``size`` ranks."""
    heads, kv_heads, inner = config.num_heads, config.num_kv_heads, config.intermediate_size
    whole = heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0) and inner % size == 0
    multiple = 1 if quantization == "none" else _FP8_MULTIPLE
    if size == 1 or (whole and inner // size % multiple == 0 and heads * config.head_dim // size % multiple == 0):
        return
    expected = (
        f"a number that divides the shape of {config.name}: {heads} heads, {kv_heads} K/V heads (or a multiple of "
        f"them), {inner} columns of the MLP" + (f", shares of both in multiples of {multiple}" if multiple > 1 else "")
    )
    raise LlmError(
        "LLM_INVALID_CONFIG", key="spark.llm.engine.tensorParallel", value=repr(str(size)), expected=expected
    )
