"""The first messages of several threads at once: msgspec alone crashes on them (see ``protocol.learn``)."""

from __future__ import annotations

import subprocess
import sys

# a process each, because types are learnt once in a process
_FIRST = """
import sys, threading
import msgspec
from spark_llm.engine.service.coordinator_protocol import Cluster, Dispatch, FromTask, Join
from spark_llm.engine.service.protocol import StreamOpen

sys.setswitchinterval(1e-6)
join = Join(Cluster(host="h", port=1, key="k"), "pool")
texts = [(StreamOpen(query="q"), StreamOpen), (join, Join), (Dispatch(1, "pool", "d2lpm", []), FromTask)]
texts = [(msgspec.json.encode(message), kind) for message, kind in texts]
go = threading.Barrier(16)

def decode():
    go.wait()
    for text, kind in texts:
        msgspec.json.decode(text, type=kind)

threads = [threading.Thread(target=decode) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_may_decode_their_first_messages_at_once() -> None:
    command = [sys.executable, "-P", "-c", _FIRST]
    assert [subprocess.run(command, check=False).returncode for _ in range(4)] == [0] * 4
