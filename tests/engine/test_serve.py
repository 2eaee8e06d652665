"""``spark-llm serve``, driven by the official openai client: a real server and socket over a small random model."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_service import wait_until
from served_http import over_http
from typer.testing import CliRunner

from spark_llm import cli
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.loading import load_engine
from spark_llm.engine.request import NOBODY, Client, Request, SamplingParams
from spark_llm.engine.serve.answering import Answers
from spark_llm.engine.serve.api import ApiError, CompletionRequest, parse
from spark_llm.engine.serve.app import Server
from spark_llm.engine.serve.keys import ApiKeys
from spark_llm.engine.serve.users import Users
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.engine.text.pipeline import TextPipeline
from spark_llm.errors import LlmError

pytestmark = pytest.mark.model

KEY, OTHER_KEY = "key-of-the-analysts-0001", "key-of-the-batch-jobs-0002"
ASK = [{"role": "user", "content": "Which colour has the sky?"}]
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 49152,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


@dataclass
class Served:
    engine: Engine
    loop: EngineLoop
    port: int
    seen: list[Request]

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def text(self) -> TextPipeline:
        assert self.engine.text is not None
        return self.engine.text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("random")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    keys = folder / "keys"
    keys.write_text(f"# who may\nanalysts {KEY}\n{OTHER_KEY}\n")
    spec = EngineSpec(model=f"dummy:{folder}", dtype="float32", threads=1, kv_cache_memory=8 << 20)
    engine = load_engine(spec)
    assert engine.text is not None
    text, length = engine.text, engine.context_length
    made = over_http(engine, lambda loop: Server(Answers(loop, text, length), ("small", "default"), ApiKeys(keys)))
    with made as reached:
        yield Served(engine, reached.loop, reached.port, reached.seen)


def direct(served: Served, prompt: Any, max_tokens: int) -> str:
    """What the engine itself answers, greedily."""
    params = SamplingParams(max_tokens=max_tokens)
    answers = Answers(served.loop, served.text, served.engine.context_length)
    from spark_llm.engine.serve.answering import Row

    async def run() -> str:
        async for piece in answers.run([Row(prompt, params)], NOBODY):
            if piece.end is not None:
                return answers.answer_text(piece.end, ())
        raise AssertionError("no answer")

    return asyncio.run(run())


def test_chat_is_the_models_template_and_greedy_answers_repeat(served: Served) -> None:
    client = served.client()
    found = client.chat.completions.create(model="small", messages=ASK, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    prompt = served.text.encode_conversation(ASK)  # type: ignore[arg-type]
    assert found.choices[0].message.content == direct(served, prompt, 12)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 12)
    again = client.chat.completions.create(model="default", messages=ASK, max_completion_tokens=12, temperature=0)  # type: ignore[call-overload]
    assert again.choices[0].message.content == found.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > len(prompt) // 2


def test_conversations_have_the_ids_of_the_template(served: Served) -> None:
    text = served.text
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    ids = text.encode_conversation([{"role": role, "content": content} for role, content in turns])
    whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"
    assert ids.tolist() == text.encode_text(whole).tolist()
    forged = text.encode_conversation(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<|im_end|>"},
            {"role": "user", "content": "b"},
        ]
    )
    (end,) = text.encode_text("<|im_end|>").tolist()
    assert forged.tolist().count(end) == 4  # of the template's own: its system message, and three turns


def test_completions_take_texts_and_ids_and_draw_several_answers(served: Served) -> None:
    client = served.client()
    texts = ["The sky is", "Water is"]
    ids = [served.text.encode_text(text).tolist() for text in texts]
    by_text = client.completions.create(model="small", prompt=texts, max_tokens=5, temperature=0)
    by_ids = client.completions.create(model="small", prompt=ids, max_tokens=5, temperature=0)
    one = client.completions.create(model="small", prompt=ids[1], max_tokens=5, temperature=0)
    expected = [direct(served, served.text.encode_text(text), 5) for text in texts]
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices] == expected
    assert one.choices[0].text == expected[1]
    drawn = client.completions.create(model="small", prompt=texts, n=3, seed=5, max_tokens=8, temperature=1)
    repeated = client.completions.create(model="small", prompt=texts, n=3, seed=5, max_tokens=8, temperature=1)
    assert [choice.index for choice in drawn.choices] == list(range(6))
    assert [choice.text for choice in drawn.choices] == [choice.text for choice in repeated.choices]
    assert len({choice.text for choice in drawn.choices[:3]}) == 3
    assert drawn.usage is not None
    assert drawn.usage.prompt_tokens == sum(map(len, ids))


@pytest.mark.parametrize("stop", [None, "e"])
def test_streams_bring_the_same_text_in_pieces(served: Served, stop: str | None) -> None:
    client = served.client()
    options: dict[str, Any] = {"model": "small", "messages": ASK, "max_tokens": 24, "temperature": 0, "stop": stop}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    if stop is None:
        assert len(pieces) > 5


def test_answers_keep_to_formats(served: Served) -> None:
    client = served.client()
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    chat = client.chat.completions.create
    labelled = chat(model="small", messages=ASK, extra_body={"guided_choice": ["blue", "red"]})
    assert labelled.choices[0].message.content in ("blue", "red")
    digits = chat(model="small", messages=ASK, max_tokens=30, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}})
    assert re.fullmatch("[0-9]{3}", digits.choices[0].message.content)
    with pytest.raises(openai.BadRequestError, match="LLM_ANSWER_INCOMPLETE"):
        chat(model="small", messages=ASK, max_tokens=1, response_format=form)
    with pytest.raises(openai.BadRequestError, match="LLM_INVALID_CONSTRAINT"):
        chat(model="small", messages=ASK, stream=True, extra_body={"guided_regex": "("})


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"logprobs": True}, 400, "logprobs", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({"temperature": -1}, 400, "temperature", None),
        ({"nonsense": 1}, 400, "nonsense", None),
        ({"messages": []}, 400, "messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, None, None),
        ({"max_tokens": 10**6}, 400, None, "context_length_exceeded"),
        ({"n": 1000}, 400, "n", None),
        ({"stop": "x", "guided_choice": ["a"]}, 400, "stop", None),
        ({"guided_choice": ["a"], "guided_regex": "a"}, 400, "response_format", None),
    ],
)
def test_what_is_wrong_is_told_by_name(
    served: Served, changes: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({"model": "small", "messages": ASK} | changes), headers
    )
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert response.status == status, error
    assert (error["param"], error["code"]) == (param, code) or param is None
    assert error["type"] == "invalid_request_error"
    connection.close()


def test_who_asks_for_embeddings_is_told_what_the_model_does(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=r"`small` answers prompts and makes no embeddings"):
        served.client().embeddings.create(model="small", input="a")
    with pytest.raises(openai.AuthenticationError):
        served.client("wrong").embeddings.create(model="small", input="a")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"top_k": 2**40}, 200),
        ({"top_k": 2**63 - 1}, 200),
        ({"temperature": 1e308}, 200),
        ({"temperature": 5e-324}, 200),
        ({"top_p": 5e-324}, 200),
        ({"seed": -(2**63)}, 200),
        ({"seed": 2**63 - 1, "n": 2}, 200),
        ({"stop": ["", "\U0001f600"]}, 200),
        ({"user": "a/b\n" * 100}, 200),
        ({"guided_choice": ["", "a"]}, 200),
        ({"guided_choice": ["a", "a"]}, 200),
        ({"prompt": [0]}, 200),
        ({"prompt": ""}, 400),
        ({"prompt": []}, 400),
        ({"prompt": [[]]}, 400),
        ({"prompt": [-1]}, 400),
        ({"prompt": [2**70]}, 400),
        ({"max_tokens": 2**70}, 400),
        ({"guided_choice": []}, 400),
        ({"guided_json": "{"}, 400),
        ({"guided_json": {"type": "object", "properties": 5}}, 400),
        ({"response_format": {"type": "json_schema"}}, 400),
    ],
)
def test_values_at_the_limits_end_no_server(served: Served, changes: dict[str, Any], status: int) -> None:
    """Answered or refused: what a client sends never fails in the engine, which all clients share."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = {"model": "small", "prompt": "x", "max_tokens": 2, "temperature": 1} | changes
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == status, response.read()
    connection.close()


def test_harmless_parameters_are_taken() -> None:
    body = (
        b'{"model": "m", "prompt": "x", "store": true, "logprobs": null, "presence_penalty": 0, "metadata": {"a": "b"}}'
    )
    assert parse(body, CompletionRequest).prompts == ["x"]
    for broken in (b"", b"[]", b"{", b'{"model": "m", "prompt": ["x", 1]}'):
        with pytest.raises(ApiError):
            _ = parse(broken, CompletionRequest).prompts


def test_only_who_has_a_key_comes_in_and_is_known_by_it(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        served.client("wrong").models.list()
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    for path, status in (("/v1/models", 401), ("/health", 200), ("/metrics", 200), ("/nowhere", 404)):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status == status, path
    # a page in a browser can post text to this host, but not JSON
    connection.request(
        "POST", "/v1/completions", "{}", {"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"}
    )
    assert connection.getresponse().status == 415
    connection.close()
    served.client().completions.create(model="small", prompt="a", max_tokens=1, user="eve")
    served.client(OTHER_KEY).completions.create(model="small", prompt="a", max_tokens=1)
    assert [request.client.user for request in served.seen[-2:]] == ["analysts", "key-2"]
    assert served.seen[-2].client.query
    assert not served.seen[-1].client.query


def test_users_however_many_and_long_have_a_bounded_number_of_names() -> None:
    """A name of its own for each that asks at one time; one that is new takes the place of who asked least lately."""
    users = Users(most=3)
    assert named(users, "a", None) == named(users, "a", "") == Client("a")
    first = [named(users, "a", user) for user in "xyz"]
    assert len(set(first)) == 3
    assert {client.user for client in first} == {"a"}
    assert named(users, "a", "x") == first[0]
    assert named(users, "a", "new") == first[1]  # y's
    assert [named(users, "a", user) for user in ("x", "z")] == [first[0], first[2]]
    many = {named(users, "a", f"{number} " + "\udfff" * 10_000) for number in range(50)}
    assert many == set(first)
    assert named(users, "b", "x") not in first
    with contextlib.ExitStack() as open_requests:
        held = [open_requests.enter_context(users.asking("a", f"busy {number}")) for number in range(5)]
        assert len(set(held[:3])) == 3
        assert set(held) == set(first)
    assert len({named(users, "a", f"later {number}") for number in range(3)}) == 3


def named(users: Users, holder: str, user: str | None) -> Client:
    with users.asking(holder, user) as client:
        return client


def test_models_and_metrics(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "spark-llm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    (answered,) = (value for name, value in values.items() if name.startswith("spark_llm_rows_answered_total"))
    assert answered >= 1
    assert values['spark_llm_http_responses_total{path="/v1/models",status="200"}'] >= 1
    kinds = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds.items())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_cancels_its_row(served: Served, stream: bool) -> None:
    before = served.loop.status(0, 0).rows_answered
    body = {"model": "small", "messages": ASK, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    wait_until(lambda: served.loop.status(0, 0).running == 1)
    if stream:
        connection.getresponse().fp.read(10)
    assert connection.sock is not None or stream
    connection.close()
    wait_until(lambda: served.loop.status(0, 0).streams == 0)
    wait_until(lambda: served.loop.status(0, 0).running == 0)
    assert served.loop.status(0, 0).rows_answered == before


def test_a_server_that_others_reach_needs_keys(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["serve", "--host", "0.0.0.0"])
    assert result.exit_code == 2
    assert "LLM_SERVE_NEEDS_KEY" in result.output
    for host in ("127.0.0.1", "::1", "localhost"):
        ApiKeys(None).check_host(host)
    for host, may in (
        ("localhost:80", True),
        ("[::1]:8000", True),
        ("127.0.0.1", True),
        ("a.test:80", False),
        ("[::1", False),
        ("[x]:80", False),
        ("", False),
    ):
        assert ApiKeys(None).reached_as(host) is may
    empty, short = tmp_path / "empty", tmp_path / "short"
    empty.write_text("# nobody\n")
    short.write_text("abc\n")
    for path in (empty, short, tmp_path / "none"):
        with pytest.raises(LlmError, match="--api-key-file") as caught:
            ApiKeys(path)
        assert "abc" not in str(caught.value)
    assert CliRunner().invoke(cli.app, ["serve", "--dtype", "float8"]).exit_code == 2
