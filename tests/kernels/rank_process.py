"""A rank of a tensor-parallel engine whose kernels run in Triton's interpreter and whose sums are gloo's, on the CPU.

As a program it is what ``spark_llm.engine.cuda.worker`` is on a GPU; the tests make rank 0 with ``runner_of``.
"""

from __future__ import annotations

from dataclasses import replace

if __name__ == "__main__":
    import conftest  # noqa: F401  (kernels in the interpreter)

import torch

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.cuda import worker
from spark_llm.engine.cuda.decoder import DeviceDecoder
from spark_llm.engine.cuda.linear import DenseLinear, InvariantLinear
from spark_llm.engine.cuda.load import layout_for
from spark_llm.engine.cuda.pool import DevicePool
from spark_llm.engine.cuda.ranks import ALONE, join
from spark_llm.engine.cuda.runner import DeviceRunner
from spark_llm.engine.cuda.shards import Shards
from spark_llm.engine.cuda.team import Peers, Seat, Team, WorkerOrder
from spark_llm.engine.cuda.weights import DeviceWeights
from spark_llm.engine.model.loader import iter_weights, load_config
from spark_llm.engine.model.source import resolve

CPU = torch.device("cpu")


def runner_of(spec: EngineSpec, peers: Peers | None, pages: int) -> DeviceRunner:
    """The runner of this process; of all ranks the least ``pages`` are the pool's."""
    torch.set_num_threads(1)
    source = resolve(spec.model)
    config = load_config(source)
    shards = Shards(config) if peers is None else Shards(config, peers.rank, peers.size)
    weights = iter_weights(source, torch.float32, config, CPU, shards)
    linear = InvariantLinear if spec.deterministic else DenseLinear
    held = DeviceWeights(shards, weights, torch.float32, CPU, layer=linear, head=linear)
    layout = replace(
        layout_for(shards.part, CPU, page_size=spec.page_size, cascade=not spec.deterministic), min_shared=4,
        min_saved=0, split_keys=8, multiprocessors=8,
    )  # fmt: skip
    ranks = ALONE
    if peers is not None:
        pages = peers.least(pages)
        ranks = join(peers.rank, peers.size, peers.rendezvous, CPU, ordered=spec.deterministic)
    decoder = DeviceDecoder(
        shards.part, held, context_length=spec.context_length, dtype=torch.float32, device=CPU,
        tiles=(layout.own_tile, layout.shared_tile), ranks=ranks,
    )  # fmt: skip
    pool = DevicePool(
        shards.part, pages=pages, page_size=spec.page_size, lanes=spec.max_running_rows,
        context_length=spec.context_length, dtype=torch.float32, device=CPU,
    )  # fmt: skip
    return DeviceRunner(decoder, pool, layout, team=peers if isinstance(peers, Team) else None)


def load(order: WorkerOrder, seat: Seat) -> DeviceRunner:
    """This rank would have room for more pages than rank 0."""
    return runner_of(order.spec, seat, pages=1 << 12)


if __name__ == "__main__":
    worker.main(load)
