"""``POST /v1/embeddings``, driven by the official openai client and by our own backend, over a small random encoder."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from fake_service import batch_of
from served_http import over_http
from small_encoder import small_encoder
from typer.testing import CliRunner

from spark_llm import cli
from spark_llm.engine.backend.engine import RemoteEngine
from spark_llm.engine.config import BackendSpec, EngineSpec
from spark_llm.engine.encoder.config import natural_task
from spark_llm.engine.encoder.load import load_encoder
from spark_llm.engine.model.source import resolve
from spark_llm.engine.request import Request, SamplingParams
from spark_llm.engine.serve.embedding import EmbeddingServer
from spark_llm.engine.serve.keys import ApiKeys
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.errors import LlmError

TEXTS = ["the sky is blue.", "", "HÉLLO 世界 \U0001f600", "a"]


@dataclass
class Served:
    port: int
    folder: Path
    loop: EngineLoop
    seen: list[Request]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("encoder")
    small_encoder(folder)
    engine = load_encoder(EngineSpec(model=str(folder), task="embed", device="cpu", check_invariants=True))
    names, keys = ("small", "default"), ApiKeys(None)
    with over_http(engine, lambda loop: EmbeddingServer(loop, engine.text, engine.width, names, keys)) as reached:
        yield Served(reached.port, folder, reached.loop, reached.seen)


def direct(served: Served, texts: list[str]) -> list[list[float]]:
    engine = load_encoder(EngineSpec(model=str(served.folder), task="embed", device="cpu"))
    for number, prompt in enumerate(engine.text.encode_texts(texts)):
        engine.add(Request(number, prompt, SamplingParams()))
    found = {}
    while engine.has_work():
        found |= {completion.id: json.loads(completion.text or "") for completion in engine.step()}
    return [found[number] for number in range(len(texts))]


def test_texts_come_back_as_vectors_in_their_order(served: Served) -> None:
    create = served.client.embeddings.create
    by_default = create(model="small", input=TEXTS)  # the client asks for base64 then
    as_numbers = create(model="default", input=TEXTS, encoding_format="float", dimensions=32)
    one = create(model="small", input=TEXTS[0], user="ann")
    expected = np.array(direct(served, TEXTS))
    for found in (by_default, as_numbers):
        assert [each.index for each in found.data] == [0, 1, 2, 3]
        np.testing.assert_allclose([each.embedding for each in found.data], expected, atol=2e-6)
    np.testing.assert_allclose(one.data[0].embedding, expected[0], atol=2e-6)
    assert (by_default.model, by_default.object) == ("small", "list")
    assert served.seen[-1].client.query  # ann's
    tokens = sum(len(request.prompt) for request in served.seen[:4])
    assert (by_default.usage.prompt_tokens, by_default.usage.total_tokens) == (tokens, tokens)
    assert [model.id for model in served.client.models.list()] == ["small"]


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"dimensions": 16}, 400, "dimensions", None),
        ({"input": []}, 400, "input", None),
        ({"input": ["a"] * 2049}, 400, "input", None),
        ({"input": [1, 2, 3]}, 400, "input[0]", None),
        ({"input": None}, 400, "input", None),
        ({"input": ["a", "x" * 100]}, 400, None, "context_length_exceeded"),
        ({"encoding_format": "int8"}, 400, "encoding_format", None),
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"temperature": 1}, 400, "temperature", None),
        ({"user": None, "encoding_format": None}, 200, None, None),
    ],
)
def test_what_is_wrong_is_told_by_name(
    served: Served, changes: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    found = post(served, "/v1/embeddings", {"model": "small", "input": "a"} | changes)
    assert found[0] == status, found
    if status != 200:
        error = found[1]["error"]
        assert (error["param"], error["code"]) == (param, code), error


def test_a_text_that_is_too_long_is_refused_by_its_place_before_any_is_embedded(served: Served) -> None:
    before = len(served.seen)
    status, found = post(served, "/v1/embeddings", {"model": "small", "input": ["a", "word " * 200_000]})
    message = found["error"]["message"]
    assert status == 400
    assert "Text 1 of the input has" in message
    assert "but the context holds 40." in message
    assert "left(" not in message  # which is for those who write SQL
    assert len(served.seen) == before


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_who_asks_for_answers_is_told_what_the_model_does(served: Served, path: str) -> None:
    status, found = post(served, path, {"model": "small", "prompt": "a"})
    assert (status, found["error"]["code"]) == (400, "model_task_mismatch")
    assert "`small` makes embeddings" in found["error"]["message"]


def post(served: Served, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def test_our_own_backend_gets_the_very_vectors(served: Served) -> None:
    spec = EngineSpec(task="embed", backend=BackendSpec(url=served.url, concurrency=2, retries=0))
    engine = RemoteEngine(spec)
    assert engine.model_config.name == "small"
    rows = [f"text {number} {'x' * (number % 7)}" for number in range(80)] + ["y" * 100]
    prompts = engine.text.encode_rows(StreamOpen(), batch_of({n: [f"{text}\n"] for n, text in enumerate(rows)}))[0]
    ready = threading.Event()
    engine.on_answers = ready.set
    for number, prompt in enumerate(prompts):
        engine.add(Request(number, prompt, SamplingParams()))
    found = {}
    while len(found) < len(rows):
        assert ready.wait(30)
        ready.clear()
        found |= {completion.id: completion for completion in engine.step()}
    engine.shutdown()
    got = [json.loads(found[number].text or "") for number in range(80)]
    np.testing.assert_allclose(got, direct(served, rows[:80]), atol=2e-6)
    error = found[80].error
    assert error is not None
    assert "LLM_CONTEXT_LENGTH_EXCEEDED" in str(LlmError(error[0], **error[1]))
    assert sum(answer.prompt_tokens for answer in found.values()) > 80 * 6


def test_the_command_serves_what_the_model_is_for(served: Served) -> None:
    assert natural_task(resolve(str(served.folder))) == "embed"
    assert natural_task(resolve("default")) == "generate"
    assert natural_task(resolve("default", "embed")) == "embed"
    assert CliRunner().invoke(cli.app, ["serve", "--task", "chat"]).exit_code == 2
    command = [sys.executable, "-P", "-c", "from spark_llm.cli import main; main()"]
    arguments = ["serve", "--model", str(served.folder), "--port", "0", "--device", "cpu", "--threads", "1"]
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        try:
            url = child.stdout.readline().split(" at ")[1].strip()
            found = httpx2.post(f"{url}/embeddings", json={"model": "default", "input": TEXTS}).json()
        finally:
            child.terminate()
    np.testing.assert_allclose([each["embedding"] for each in found["data"]], direct(served, TEXTS), atol=2e-6)
