"""What the processes of a tensor-parallel engine compute together, on their GPUs; by itself, nothing."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from spark_llm.engine.cuda.shards import vocabulary_width

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


class Ranks:
    """This process among ``size``. All make the same calls in the same order, also while graphs are captured.

    ordered: sums add the ranks up in their order, whatever the size of a tensor (the deterministic mode).
    """

    def __init__(self, rank: int = 0, size: int = 1, *, ordered: bool = False) -> None:
        self.rank = rank
        self.size = size
        self._ordered = ordered and size > 2  # NCCL cuts a sum into pieces that start at different ranks; of two, a + b

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, which is overwritten."""
        if self.size == 1:
            return x
        if self._ordered:
            parts = self._all(x)
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total
        dist.all_reduce(x)
        return x

    def whole(self, logits: Tensor, vocabulary: int) -> Tensor:
        """Logits [S, vocabulary] from this rank's [S, part]."""
        if self.size == 1:
            return logits
        width = vocabulary_width(vocabulary, self.size)
        if logits.shape[1] < width:
            logits = torch.nn.functional.pad(logits, (0, width - logits.shape[1]))
        joined = self._all(logits).transpose(0, 1).reshape(len(logits), self.size * width)
        return joined[:, :vocabulary].contiguous()

    def greatest(self, logits: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
        """int32 [S]: the token of the greatest logit of all ranks, of equal ones the first.

        logits: this rank's [S, part]; tokens: int32 [S], numbers of its own greatest ones.
        """
        if self.size == 1:
            return tokens
        value = logits.gather(1, tokens.long().unsqueeze(1)).float()
        value = torch.where(value == value, value, -torch.inf)  # as in one process: a NaN counts as the smallest
        token = tokens + self.rank * vocabulary_width(vocabulary, self.size)
        # a float32 holds every token number below 2^24: one message instead of two
        values, ids = self._all(torch.cat((value, token.unsqueeze(1).float()), 1)).unbind(-1)
        return torch.where(values == values.amax(0), ids, torch.inf).amin(0).int()

    def _all(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: every rank's ``x``."""
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        _gather(out, x.contiguous())
        return out.view(self.size, *x.shape)


ALONE = Ranks()


def join(rank: int, size: int, rendezvous: int, device: torch.device, *, ordered: bool) -> Ranks:
    """Meets the other ranks, NCCL's on GPUs and gloo's on CPUs. rendezvous: a file descriptor that all have.

    The file has no name, so that nothing is left behind, and no port is open to other users of the machine.
    """
    cuda = device.type == "cuda"
    # NVLink multicast needs privileges that containers rarely have, and NCCL then fails instead of going without.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):  # all ranks are on this machine
        os.environ.setdefault(name, "lo")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(f"/proc/self/fd/{rendezvous}", size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        device_id=device if cuda else None,
    )
    return Ranks(rank, size, ordered=ordered)


def leave() -> None:
    """Forgets the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
