"""A server of OpenAI's protocol in the engine's place: what is sent, what is sent again, and what its rows cost."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pytest
from fake_service import answers, batch_of, wait_until

from spark_llm.engine.backend.chat import completion_of
from spark_llm.engine.backend.connection import Connection, Refused
from spark_llm.engine.backend.embedding import Embedding
from spark_llm.engine.backend.engine import RemoteEngine
from spark_llm.engine.backend.form import AnswerFormat, WrongAnswer
from spark_llm.engine.backend.rates import Bucket, Clock, Limits
from spark_llm.engine.backend.text import MessageText, pack, unpack
from spark_llm.engine.backend.turns import Turns
from spark_llm.engine.config import BackendSpec, EngineSpec
from spark_llm.engine.request import Client, Completion, Constraint, Request, SamplingParams
from spark_llm.engine.service import client as clients
from spark_llm.engine.service.client import EngineClient
from spark_llm.engine.service.folder import EngineState
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.engine.service.process import owner
from spark_llm.engine.service.protocol import Budget, ResultCache, StreamOpen
from spark_llm.engine.service.server import EngineServer
from spark_llm.errors import LlmError

URL = "http://model.test/v1"
Handler = Callable[[httpx2.Request], Awaitable[httpx2.Response]]


class FakeClock(Clock):
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


def reply(text: str | None, reason: str = "stop", cached: int = 3) -> httpx2.Response:
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": cached}}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return httpx2.Response(200, json={"choices": [choice], "usage": usage})


class FakeServer:
    """Answers a message by its reverse, after the scripted responses; "wait" is answered once ``released``."""

    def __init__(self, *script: httpx2.Response | Exception) -> None:
        self.script = list(script)
        self.requests: list[httpx2.Request] = []
        self.bodies: list[dict[str, Any]] = []
        self.closed = threading.Event()
        self.under_way = self.most_under_way = 0
        self.released: asyncio.Event | None = None

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            return httpx2.Response(200, json={"data": [{"id": "m"}]})
        self.requests.append(request)
        self.bodies.append(json.loads(request.content))
        if self.script:
            found = self.script.pop(0)
            if isinstance(found, Exception):
                raise found
            return found
        if request.url.path.endswith("/embeddings"):
            return embedded(self.bodies[-1]["input"])
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            message = self.bodies[-1]["messages"][-1]["content"]
            if "wait" in message:
                self.released = self.released or asyncio.Event()
                await self.released.wait()
            await asyncio.sleep(0)
            return reply(message[::-1])
        except asyncio.CancelledError:
            self.closed.set()
            raise
        finally:
            self.under_way -= 1


def embedded(texts: list[str]) -> httpx2.Response:
    """Of each text its length and 0.1, the last first; a text "bad" makes the request a bad one, a long list too."""
    if "bad" in texts or len(texts) > 32:
        return httpx2.Response(422, json={"error": {"message": "cannot embed that"}})
    data = [{"index": number, "embedding": [len(text), 0.1]} for number, text in enumerate(texts)]
    return httpx2.Response(200, json={"data": data[::-1], "usage": {"prompt_tokens": 10 * len(texts)}})


def complete(
    handler: Handler, clock: Clock | None = None, calls: int = 1, **spec: Any
) -> tuple[list[str | tuple[str, dict[str, str]]], Connection]:
    """The answers, or failures, of so many requests one after the other."""

    async def run() -> tuple[list[str | tuple[str, dict[str, str]]], Connection]:
        backend = BackendSpec(**{"url": URL, "retries": 3, **spec})
        connection = Connection(backend, httpx2.MockTransport(handler), clock or FakeClock())
        found: list[str | tuple[str, dict[str, str]]] = []
        body = json.dumps({"messages": [{"content": "abc"}]}).encode()
        for _ in range(calls):
            try:
                found.append((await connection.complete(body, 10)).choices[0].message.content or "")
            except Refused as refused:
                found.append(refused.failure)
        await connection.close()
        return found, connection

    return asyncio.run(run())


@pytest.mark.parametrize(
    "failure",
    [
        httpx2.Response(429),
        httpx2.Response(500),
        httpx2.Response(503, text="loading"),
        httpx2.Response(408),
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("gone"),
    ],
)
def test_what_may_pass_is_sent_again_with_longer_and_longer_waits(failure: httpx2.Response | Exception) -> None:
    clock, server = FakeClock(), FakeServer(failure, failure, failure)
    (answer,), connection = complete(server, clock)
    assert answer == "cba"
    assert (connection.counters.requests, connection.counters.retries) == (4, 3)
    waits = [wait for wait in clock.slept if wait > 0]
    assert 0.25 <= waits[0] <= 0.5
    assert clock.time <= 0.5 + 1 + 2
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 1


def test_retry_after_is_kept_and_holds_others_back() -> None:
    clock, server = FakeClock(), FakeServer(httpx2.Response(429, headers={"Retry-After": "7"}))

    async def run() -> list[float]:
        connection = Connection(BackendSpec(url=URL), httpx2.MockTransport(server), clock)
        times = []

        async def one() -> None:
            await connection.complete(b'{"messages": [{"content": "a"}]}', 1)
            times.append(clock.now())

        await one_after_failure(connection, one)
        await connection.close()
        return times

    async def one_after_failure(connection: Connection, one: Callable[[], Awaitable[None]]) -> None:
        first = asyncio.ensure_future(one())
        while not connection.counters.throttled:
            await asyncio.sleep(0)
        await asyncio.gather(first, one())

    assert min(asyncio.run(run())) >= 7.0
    dated = {"Retry-After": "Thu, 01 Jan 2099 00:00:00 GMT"}
    clock = FakeClock()
    assert complete(FakeServer(httpx2.Response(429, headers=dated)), clock)[0] == ["cba"]
    assert 600.0 <= clock.time <= 610.0  # no server makes a query wait for longer


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_cannot_pass_is_refused_at_once_in_the_servers_words(status: int) -> None:
    failure = httpx2.Response(status, json={"error": {"message": "no such\nmodel", "type": "x"}})
    (answer,), connection = complete(FakeServer(failure))
    assert answer == ("LLM_BACKEND_REFUSED", {"url": URL, "status": str(status), "reason": "no such model"})
    assert connection.counters.requests == 1


def test_an_empty_account_is_not_asked_again() -> None:
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    (answer,), connection = complete(FakeServer(httpx2.Response(429, json=body)))
    assert answer[0] == "LLM_BACKEND_REFUSED"
    assert connection.counters.requests == 1


def test_a_server_that_is_down_is_not_tried_as_often_for_every_row() -> None:
    down = [httpx2.ConnectError("refused")] * 6
    found, connection = complete(FakeServer(*down), calls=4)
    assert found[0] == (
        "LLM_BACKEND_UNAVAILABLE", {"url": URL, "times": "4", "reason": "ConnectError: refused"},
    )  # fmt: skip
    assert [answer[0] for answer in found[1:3]] == ["LLM_BACKEND_UNAVAILABLE"] * 2
    assert found[3] == "cba"
    assert connection.counters.requests == 4 + 1 + 1 + 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"choices": []}'])
def test_replies_that_make_no_sense_are_row_errors(body: bytes) -> None:
    (answer,), _ = complete(FakeServer(httpx2.Response(200, content=body)))
    assert answer[0] == "LLM_BACKEND_REFUSED"
    assert answer[1]["status"] == "200"  # type: ignore[index, call-overload]


def test_keys_come_from_a_file_that_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("first\n")
    shown = []

    async def handler(request: httpx2.Request) -> httpx2.Response:
        shown.append(request.headers["authorization"])
        if shown[-1] == "Bearer first":
            file.write_text("second")
            return httpx2.Response(401)
        return reply("ok")

    assert complete(handler, key_file=str(file))[0] == ["ok"]
    assert shown == ["Bearer first", "Bearer second"]
    monkeypatch.setenv("MODEL_KEY", "third")
    complete(handler, key_env="MODEL_KEY")
    assert shown[-1] == "Bearer third"
    for spec in ({"key_env": "NOT_SET"}, {"key_file": str(tmp_path / "none")}, {"key_file": str(tmp_path)}):
        with pytest.raises(LlmError, match="LLM_BACKEND_KEY_MISSING"):
            complete(handler, **spec)
    file.write_text("two words")
    with pytest.raises(LlmError, match="it holds more than a key") as caught:
        complete(handler, key_file=str(file))
    assert "words" not in str(caught.value)


def test_a_minute_has_as_many_requests_and_tokens_as_it_may() -> None:
    clock = FakeClock()
    bucket = Bucket(60, clock)  # six at once, then one a second
    assert [bucket.take(1) for _ in range(8)] == pytest.approx([0, 0, 0, 0, 0, 0, 1, 2])
    clock.time += 100
    assert bucket.take(6) == 0
    clock.time += 1000
    assert bucket.take(600) == 0  # more than ever fits: it goes, and the next ones wait for it
    assert bucket.take(1) == pytest.approx(595)
    assert Bucket(0, clock).take(1e9) == 0

    async def run() -> float:
        limits = Limits(rpm=120, tpm=6000, clock=clock)
        start = clock.now()
        for _ in range(100):
            await limits.admit(100)
            limits.settle(100, 50)
        return clock.now() - start

    # 100 requests of 50 tokens: 50 s at 120 requests a minute, less what may come at once
    assert 40 <= asyncio.run(run()) <= 50


def test_users_take_turns_by_weight_and_queries_of_one_in_turn() -> None:
    def row(user: str, query: str, weight: float = 1.0) -> Request:
        return Request(0, pack(b"abcd"), SamplingParams(max_tokens=9), Client(user, query, weight))

    turns = Turns()
    for _ in range(40):
        for request in (row("a", "1"), row("a", "2"), row("b", "3", 2.0)):
            turns.push(request)
    first = [turns.pop().client for _ in range(60)]
    assert sum(client.user == "b" for client in first) in (39, 40)
    assert [c.query for c in first if c.user == "a"][:4] == ["1", "2", "1", "2"]
    turns.push(row("c", "4"))  # comes late, and gets nothing for having been away
    rest = [turns.pop().client.user for _ in range(len(turns))]
    assert len(rest) == 61
    assert rest.index("c") <= 2


def test_constraints_become_schemas_whose_root_is_an_object() -> None:
    def schema(form: AnswerFormat) -> dict[str, Any]:
        found = json.loads(form.response_format)
        assert found["type"] == "json_schema"
        return dict(found["json_schema"]["schema"])

    choices = AnswerFormat(Constraint(kind="choices", choices=("yes", "no")))
    assert schema(choices)["properties"]["answer"]["enum"] == ["yes", "no"]
    assert choices.read('{"answer": "no"}') == "no"
    for wrong in ('{"answer": "maybe"}', "no", '{"other": "no"}', '["no"]', '{"answer": ["no"]}'):
        with pytest.raises(WrongAnswer):
            choices.read(wrong)
    regex = AnswerFormat(Constraint(kind="regex", text="[0-9]+|x"))
    assert schema(regex)["properties"]["answer"]["pattern"] == "^([0-9]+|x)$"
    assert regex.read('{"answer": "12"}') == "12"
    whole = AnswerFormat(Constraint(kind="json_schema", text='{"type": "object", "properties": {}}'))
    assert schema(whole) == {"type": "object", "properties": {}}
    assert whole.read('{"a": 1}') == '{"a": 1}'
    listed = AnswerFormat(Constraint(kind="json_schema", text='{"type": "array"}'))
    assert listed.read('{"answer": [1, 2]}') == "[1,2]"
    referring = {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/n"}, {"$ref": "#"}]}, "$defs": {"n": {}}}
    wrapped = schema(AnswerFormat(Constraint(kind="json_schema", text=json.dumps(referring))))
    assert wrapped["$defs"] == {"n": {}}
    assert wrapped["properties"]["answer"] == {
        "type": "array",
        "items": {"anyOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/properties/answer"}]},
    }
    for kind, text in (("grammar", 'start: "a"'), ("json_schema", "nonsense")):
        with pytest.raises(LlmError, match="LLM_INVALID_CONSTRAINT"):
            AnswerFormat(Constraint(kind=kind, text=text))  # type: ignore[arg-type]


def test_a_packed_text_is_itself() -> None:
    for text in ("", "a", "abcd", "héllo €\U0001f600"):
        packed = pack(text.encode())
        assert unpack(packed).decode().rstrip() == text
        assert MessageText().decode([packed.tolist()]) == [text]


# ---- in the service's place of an engine


class Remote:
    """The service over a RemoteEngine over a fake server."""

    def __init__(self, engine: RemoteEngine, server: FakeServer, client: EngineClient, loop: EngineLoop) -> None:
        self.engine, self.server, self.client, self.loop = engine, server, client, loop

    def ask(self, header: StreamOpen, batch: pa.RecordBatch) -> dict[int, dict[str, Any]]:
        with self.client.stream(header) as stream:
            stream.send(batch)
            return answers(stream)


@pytest.fixture
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    server = FakeServer()
    task = getattr(request, "param", "generate")
    spec = EngineSpec(backend=BackendSpec(url=URL, concurrency=4, retries=1), task=task)
    assert spec.backend is not None
    backend = spec.backend
    engine = RemoteEngine(spec, lambda: Connection(backend, httpx2.MockTransport(server), FakeClock()))
    loop = EngineLoop(engine, lambda error: None)
    engine.on_answers = loop.wake
    loop.start()
    socket = str(tmp_path / "s")
    state = EngineState(process=owner(), socket=socket, model="m")
    monkeypatch.setattr(clients.launch, "ensure", lambda spec, timeout: state)
    with EngineServer(socket, loop, engine.text, 1, lambda: None):
        yield Remote(engine, server, EngineClient(spec, 10.0), loop)
    engine.shutdown()


def test_rows_are_asked_as_chat_messages_and_counted_as_the_server_says(remote: Remote) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.5, top_p=0.9, top_k=7, stop=("x",))
    header = StreamOpen(query="q", params=params, system="be brief")
    found = remote.ask(header, batch_of({7: ["first\n", "é second\n"]}, seeds=[11]))
    assert found[7]["text"] == "dnoces é\ntsrif"
    assert (found[7]["prompt_tokens"], found[7]["cached_tokens"], found[7]["computed_tokens"]) == (10, 3, 7)
    assert (found[7]["output_tokens"], found[7]["finish_reason"]) == (2, "stop")
    (body,) = remote.server.bodies
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "first\né second"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "stop": ["x"],
        "seed": 11,
    }
    status = remote.client.status()
    assert (status.model, status.prompt_tokens, status.output_tokens) == ("m", 10, 2)


def test_no_more_requests_are_under_way_than_allowed(remote: Remote) -> None:
    rows = {number: [f"wait {number}"] for number in range(20)}
    with remote.client.stream(StreamOpen(query="q")) as stream:
        stream.send(batch_of(rows))
        wait_until(lambda: remote.server.under_way == 4)
        status = remote.client.status()
        assert remote.server.released is not None
        remote.engine._loop.call_soon_threadsafe(remote.server.released.set)
        assert len(answers(stream)) == 20
    assert remote.server.most_under_way == 4
    assert status.streams == 1


def test_equal_rows_are_asked_once_and_known_ones_not_at_all(remote: Remote) -> None:
    rows = {number: [f"text {number % 2}"] for number in range(6)}
    keys: list[bytes | None] = [b"%d" % (number % 2) for number in range(6)]
    header = StreamOpen(query="q", cache=ResultCache())
    found = remote.ask(header, batch_of(rows, keys=keys))
    assert [found[number]["text"] for number in range(6)] == ["0 txet", "1 txet"] * 3
    assert len(remote.server.requests) == 2
    later = remote.ask(StreamOpen(query="r", cache=ResultCache()), batch_of(rows, keys=keys))
    assert [row["text"] for row in later.values()].count("0 txet") == 3
    assert len(remote.server.requests) == 2
    assert any(row["stored"] for row in later.values())


def test_budgets_hold(remote: Remote) -> None:
    header = StreamOpen(query="q", budget=Budget(calls=3))
    found = remote.ask(header, batch_of({number: [str(number)] for number in range(5)}))
    errors = [row["error"] for row in found.values() if row["error"] is not None]
    assert len(errors) == 2
    assert all("LLM_BUDGET_EXCEEDED" in str(error) for error in errors)
    assert len(remote.server.requests) == 3


def test_a_closed_stream_closes_its_requests(remote: Remote) -> None:
    with remote.client.stream(StreamOpen(query="q")) as stream:
        stream.send(batch_of({number: ["wait"] for number in range(9)}))
        wait_until(lambda: remote.server.under_way == 4)
    assert remote.server.closed.wait(5)
    wait_until(lambda: remote.server.under_way == 0 and not remote.engine._rows)
    assert remote.ask(StreamOpen(query="r"), batch_of({1: ["next"]}))[1]["text"] == "txen"
    assert len(remote.server.requests) == 5  # those that waited were never sent


def test_failures_are_errors_of_their_rows(remote: Remote) -> None:
    remote.server.script = [
        httpx2.Response(400, json={"error": {"message": "too long"}}),
        httpx2.ConnectError("refused"),
        httpx2.ConnectError("refused"),
        reply(None, "content_filter"),
    ]
    for number, expected in enumerate(("LLM_BACKEND_REFUSED", "LLM_BACKEND_UNAVAILABLE", "content_filter")):
        found = remote.ask(StreamOpen(query="q"), batch_of({number: ["abc"]}))
        assert found[number]["text"] is None
        assert expected in str(found[number]["error"])
    assert remote.ask(StreamOpen(query="q"), batch_of({9: ["abc"]}))[9]["text"] == "cba"


def test_formats_go_to_the_server_and_cut_answers_are_errors(remote: Remote) -> None:
    constraint = Constraint(kind="choices", choices=("yes", "no"))
    remote.server.script = [reply('{"answer": "yes"}'), reply('{"answ', "length"), reply('{"answer": "perhaps"}')]
    found = remote.ask(StreamOpen(query="q", constraint=constraint), batch_of({1: ["a"]}))
    assert found[1]["text"] == "yes"
    assert remote.server.bodies[0]["response_format"]["json_schema"]["strict"] is True
    for number, expected in ((2, "LLM_ANSWER_INCOMPLETE"), (3, "none of the choices")):
        found = remote.ask(StreamOpen(query="q", constraint=constraint), batch_of({number: ["a"]}))
        assert expected in str(found[number]["error"])


def test_models_that_know_the_limit_by_another_name(remote: Remote) -> None:
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    remote.server.script = [httpx2.Response(400, json={"error": {"message": message}})]
    assert remote.ask(StreamOpen(query="q"), batch_of({1: ["abc"]}))[1]["text"] == "cba"
    assert remote.ask(StreamOpen(query="q"), batch_of({2: ["abd"]}))[2]["text"] == "dba"
    named = [{"max_tokens", "max_completion_tokens"} & body.keys() for body in remote.server.bodies]
    assert named == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]


@pytest.mark.parametrize(
    ("models", "error"),
    [
        (httpx2.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]}), r"LLM_BACKEND_MODEL_UNKNOWN.*\(a, b\)"),
        (httpx2.Response(404), "does not list its models"),
        (httpx2.Response(401, json={"error": {"message": "bad key"}}), "LLM_BACKEND_REFUSED.*401: bad key"),
        (httpx2.ConnectError("refused"), "LLM_BACKEND_UNAVAILABLE"),
    ],
)
def test_what_keeps_a_server_from_being_used_is_told_at_the_start(
    models: httpx2.Response | Exception, error: str
) -> None:
    async def handler(request: httpx2.Request) -> httpx2.Response:
        if isinstance(models, Exception):
            raise models
        return models

    backend = BackendSpec(url=URL, retries=1)
    with pytest.raises(LlmError, match=error):
        RemoteEngine(
            EngineSpec(backend=backend), lambda: Connection(backend, httpx2.MockTransport(handler), FakeClock())
        )


def test_completions_without_usage_are_estimated() -> None:
    from spark_llm.engine.backend.connection import Choice, Message, Reply

    request = Request(1, pack(b"12345678"), SamplingParams())
    done: Completion = completion_of(request, Reply([Choice(Message("ok"), "stop")]))
    assert (done.prompt_tokens, done.computed_tokens, done.num_output) == (2, 2, 1)


embeds = pytest.mark.parametrize("remote", ["embed"], indirect=True)


@embeds
def test_texts_are_embedded_many_a_request_and_keep_their_order(remote: Remote) -> None:
    texts = {number: "é" * number for number in range(100)}
    with remote.client.stream(StreamOpen(query="q", params=SamplingParams(max_tokens=9))) as stream:
        stream.send(batch_of({number: [f"{text}\n"] for number, text in texts.items()}))
        found = answers(stream)
    assert {number: row["text"] for number, row in found.items()} == {number: f"[{number},0.1]" for number in texts}
    assert sum(row["prompt_tokens"] for row in found.values()) == 1000  # type: ignore[misc]
    assert sum(row["output_tokens"] for row in found.values()) == 0  # type: ignore[misc]
    assert len(remote.server.bodies) < 10
    assert {request.url.path for request in remote.server.requests} == {"/v1/embeddings"}
    assert set(remote.server.bodies[0]) == {"model", "input"}


@embeds
def test_a_text_that_is_refused_fails_alone(remote: Remote) -> None:
    rows = {number: ["bad" if number == 7 else f"text {number}"] for number in range(20)}
    found = remote.ask(StreamOpen(query="q"), batch_of(rows))
    assert [number for number, row in found.items() if row["error"] is not None] == [7]
    assert "cannot embed that" in found[7]["error"]


def test_a_server_that_refuses_everything_is_not_asked_text_by_text() -> None:
    server = FakeServer(*[httpx2.Response(400, json={"error": {"message": "no such model"}})] * 2)

    async def ask() -> list[Completion]:
        embedding = Embedding(Connection(BackendSpec(url=URL), httpx2.MockTransport(server), FakeClock()), "m")
        return await embedding.ask([Request(n, pack(b'"abc"'), SamplingParams()) for n in range(32)])

    found = asyncio.run(ask())
    assert len(server.bodies) == 2
    assert [each.id for each in found] == list(range(32))
    assert all(each.error is not None and each.error[1]["reason"] == "no such model" for each in found)


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (httpx2.Response(401), "LLM_BACKEND_REFUSED"),
        (httpx2.Response(200, json={"data": []}), "one vector for each of 2"),
        (httpx2.Response(200, json={"data": [{"index": 0, "embedding": [1]}] * 2}), "one vector for each of 2"),
        (
            httpx2.Response(200, json={"data": [{"index": n, "embedding": [1] * (n + 1)} for n in range(2)]}),
            "one vector for each of 2",
        ),
        (
            httpx2.Response(200, json={"data": [{"index": n, "embedding": [1e300]} for n in range(2)]}),
            "LLM_BACKEND_ANSWER_UNUSABLE",
        ),
    ],
)
def test_replies_without_a_vector_for_each_text_are_errors(response: httpx2.Response, error: str) -> None:
    server = FakeServer(response)

    async def ask() -> list[Completion]:
        backend = BackendSpec(url=URL)
        embedding = Embedding(Connection(backend, httpx2.MockTransport(server), FakeClock()), "m")
        rows = [Request(number, pack(b'"abc"'), SamplingParams()) for number in range(2)]
        return [*await embedding.ask(rows), *await embedding.ask(rows[:1])]

    *refused, good = asyncio.run(ask())
    for answer in refused:
        assert answer.error is not None
        assert error in str(LlmError(answer.error[0], **answer.error[1]))
    assert (good.text, good.error) == ("[3,0.1]", None)


@embeds
def test_what_only_generation_has_is_refused_before_the_server_is_asked(remote: Remote) -> None:
    for header in (StreamOpen(system="x"), StreamOpen(constraint=Constraint(kind="choices", choices=("a",)))):
        with pytest.raises(LlmError, match=r"LLM_MODEL_TASK_MISMATCH.*Leave that out"):
            remote.ask(header, batch_of({1: ["a"]}))
    assert not remote.server.requests


def test_the_gateway_loads_no_torch() -> None:
    modules = "spark_llm.engine.backend.engine, spark_llm.engine.service.server, spark_llm.engine.service.main"
    heavy = "{'torch', 'pyspark', 'transformers', 'starlette'} & sys.modules.keys()"
    code = f"import sys, {modules}; print(sorted({heavy}))"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
