"""A rank of a tensor-parallel engine: loads its part of the model, then runs the steps that rank 0 lays out."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import msgspec

from spark_llm.engine.cuda.channel import LostError
from spark_llm.engine.cuda.team import Seat, WorkerOrder, end_with
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.cuda.runner import DeviceRunner

log = logging.getLogger(__name__)


def load_rank(order: WorkerOrder, seat: Seat) -> DeviceRunner:
    from spark_llm.engine import loading  # imports torch: after the watch over the parent has begun

    return loading.load_rank(order.spec, order.device, seat)


def main(load: Callable[[WorkerOrder, Seat], DeviceRunner] = load_rank) -> NoReturn:
    """Runs the process to its end; never returns. ``load`` makes the runner."""
    order = msgspec.json.decode(sys.argv[1], type=WorkerOrder)
    end_with(order.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: rank 0 gets it too, and ends both
    where = f"%(asctime)s %(levelname)s rank {order.rank} %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=where)
    code = 1
    try:
        _run(load, order, Seat(order))
    except LostError:
        code = 0
    except BaseException:
        log.exception("the rank failed")
    logging.shutdown()
    # no teardown: threads inside native code could wait for ranks that wait for this one
    os._exit(code)


def _run(load: Callable[[WorkerOrder, Seat], DeviceRunner], order: WorkerOrder, seat: Seat) -> NoReturn:
    try:
        runner = load(order, seat)
    except LlmError as error:
        seat.refuse(error)
        raise
    while True:
        runner.execute(seat.steps.receive())
        seat.steps.done()


if __name__ == "__main__":
    main()
