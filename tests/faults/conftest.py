"""A tiny real model for tests that start and kill engine processes, and what they all do with it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.request import SamplingParams
from spark_llm.engine.service import process
from spark_llm.engine.service.client import AnswerStream, list_engines
from spark_llm.engine.service.process import ProcessId
from spark_llm.engine.service.protocol import REQUEST_SCHEMA, EngineStatus, StreamOpen, request_rows

CONTEXT = 16_384


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers over bytes, with random weights: starts in seconds, answers nonsense, the same each time."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return f"dummy:{folder}"


class Engines:
    """The engines of one test: they live under ``tmp``, where no other test's are, and end with it."""

    def __init__(self, tmp: Path, model: str) -> None:
        self.tmp = tmp
        self.model = model

    def spec(self, **settings: object) -> EngineSpec:
        """A small engine: 64 MB of K/V, one thread."""
        given = {"model": self.model, "kv_cache_memory": 64 << 20, "threads": 1, "max_running_rows": 16}
        return EngineSpec(**(given | settings))  # type: ignore[arg-type]

    @staticmethod
    def header(max_tokens: int = 8, query: str = "") -> StreamOpen:
        return StreamOpen(query=query, params=SamplingParams(max_tokens=max_tokens, ignore_eos=True))

    @staticmethod
    def rows(ids: range, text: str = "row", *, fold: bool = False) -> pa.RecordBatch:
        """A window of requests with one text a row; with ``fold`` equal rows of a query fold."""
        segments = pa.array([[f"{text} {i}"] for i in ids], REQUEST_SCHEMA.field("segments").type)
        keys = pa.array([f"{text} {i}".encode() if fold else None for i in ids], pa.binary())
        return request_rows(ids, segments, keys=keys)

    @staticmethod
    def receive_all(stream: AnswerStream) -> list[tuple[int, str]]:
        """(id, text) of all answers, in the order in which they came."""
        found: list[tuple[int, str]] = []
        while (batch := stream.receive()) is not None:
            assert not any(batch.column("error").is_valid().to_pylist())
            found += zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True)
        return found

    @staticmethod
    def process(status: EngineStatus) -> ProcessId:
        found = ProcessId.of(status.pid)
        assert found is not None
        return found

    @staticmethod
    def await_end(engine: ProcessId, timeout: float = 30.0) -> None:
        """Returns as soon as the process has ended; fails if it does not."""
        with process.watching(engine) as watch:
            assert watch.wait(timeout), f"process {engine} still runs after {timeout} s"

    def kill(self, engine: ProcessId, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(engine.pid, number)
        self.await_end(engine)

    def living(self) -> list[ProcessId]:
        """The engine processes of this test, found without asking them."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (engine := ProcessId.of(int(entry.name))) is not None:
                    command = (entry / "cmdline").read_bytes()
                    if b'"socket":' in command and os.fsencode(self.tmp) in command:
                        found.append(engine)
        return found

    def statuses(self) -> list[EngineStatus]:
        """The statuses of the engines of this test's model that answer."""
        return [status for status in list_engines() if status.model == self.model]

    def await_status(self, condition: Callable[[EngineStatus], bool], timeout: float = 150.0) -> EngineStatus:
        """The status of an engine of this test as soon as ``condition`` holds for it: an engine sends no events."""
        tick = threading.Event()
        for _ in range(int(timeout / 0.05)):
            for status in self.statuses():
                if condition(status):
                    return status
            tick.wait(0.05)
        raise AssertionError(f"the condition did not come true: {self.statuses()}, {os.listdir(self.tmp)}")

    def files(self) -> set[str]:
        """The names of the files that the engines have now."""
        return {path.name for path in self.tmp.glob("spark-llm-*/*/*/*")}

    def python(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """Another Python process with the same engines in reach; its output is for the caller."""
        environment = os.environ | {"TMPDIR": str(self.tmp), "PYSPARK_PYTHON": sys.executable}
        environment.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        command = [sys.executable, "-c", code, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


@contextlib.contextmanager
def _engines(model: str) -> Iterator[Engines]:
    tmp = Path(tempfile.mkdtemp())  # pytest's own folders have names too long for sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp))
        patch.setattr("tempfile.tempdir", None)
        found = Engines(tmp, model)
        yield found
        for engine in found.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine.pid, signal.SIGKILL)
                found.await_end(engine)
    shutil.rmtree(tmp)


@pytest.fixture
def engines(tiny_model: str) -> Iterator[Engines]:
    with _engines(tiny_model) as found:
        yield found


@pytest.fixture(scope="module")
def shared_engines(tiny_model: str) -> Iterator[Engines]:
    """The engines of a module's tests, which they leave idle; a test with ``engines`` has its own beside them."""
    with _engines(tiny_model) as found:
        yield found
