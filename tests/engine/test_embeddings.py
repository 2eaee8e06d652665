"""Vectors of texts: those of transformers, whatever a text is computed beside, and every row answered once."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from conftest import TINY
from fake_service import answers, batch_of, wait_until
from small_encoder import WINDOW, small_encoder
from small_tokenizer import small_tokenizer

from spark_llm.engine import loading
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.encoder.engine import EncoderEngine
from spark_llm.engine.encoder.load import load_encoder
from spark_llm.engine.encoder.vectors import json_vectors
from spark_llm.engine.model.fingerprint import fingerprint
from spark_llm.engine.model.source import packaged_encoder, resolve
from spark_llm.engine.request import Client, Completion, Constraint, Request, SamplingParams
from spark_llm.engine.service import client as clients
from spark_llm.engine.service.client import EngineClient
from spark_llm.engine.service.folder import EngineState
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.engine.service.process import owner
from spark_llm.engine.service.protocol import ResultCache, StreamOpen
from spark_llm.engine.service.server import EngineServer
from spark_llm.errors import LlmError

Vector = npt.NDArray[np.float32]
TEXTS = ["the sky is blue.", "", "a", "what is the colour of water?", "HÉLLO wörld 世界 \U0001f600", "[SEP] x [CLS]"]


def engine_of(folder: Path | str, **spec: Any) -> EncoderEngine:
    return load_encoder(EngineSpec(model=str(folder), task="embed", device="cpu", check_invariants=True, **spec))


def run(engine: EncoderEngine, requests: Iterable[Request]) -> dict[int, Completion]:
    for request in requests:
        engine.add(request)
    found: dict[int, Completion] = {}
    while engine.has_work():
        for completion in engine.step():
            assert completion.id not in found, "answered twice"
            found[completion.id] = completion
    return found


def requests(engine: EncoderEngine, texts: Sequence[str], *users: str) -> list[Request]:
    prompts = engine.text.encode_texts(texts)
    names = users or ("",)
    return [
        Request(number, prompt, SamplingParams(max_tokens=0), Client(names[number % len(names)]))
        for number, prompt in enumerate(prompts)
    ]


def vector(answer: Completion) -> Vector:
    assert answer.error is None, answer.error
    assert (answer.output, answer.num_output, answer.cached_tokens) == ([], 0, 0)
    return np.array(json.loads(answer.text or ""), np.float32)


def embed(engine: EncoderEngine, texts: Sequence[str]) -> list[Vector]:
    found = run(engine, requests(engine, texts))
    return [vector(found[number]) for number in range(len(texts))]


@torch.inference_mode()
def reference(module: Any, ids: Sequence[int], pooling: str, normalize: bool) -> Vector:
    """What transformers makes of one text alone, pooled as sentence-transformers does it."""
    states = module(input_ids=torch.tensor([list(ids)]), attention_mask=torch.ones(1, len(ids))).last_hidden_state[0]
    found = {
        "mean_tokens": lambda: states.mean(0),
        "cls_token": lambda: states[0],
        "max_tokens": lambda: states.amax(0),
        "lasttoken": lambda: states[-1],
    }[pooling]()
    whole: Vector = (found / found.norm() if normalize else found).numpy()
    return whole


@pytest.mark.model
def test_the_packaged_encoder_gives_the_vectors_of_transformers() -> None:
    folder = packaged_encoder()
    assert folder is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    module = transformers.BertModel.from_pretrained(folder).eval()
    engine = engine_of("default", threads=1)
    assert (engine.context_length, engine.dtype, engine.model_config.name) == (256, "float32", "all-MiniLM-L6-v2")
    texts = [*TEXTS, "many words follow one another here, " * 20]
    for text, ids, ours in zip(texts, engine.text.encode_texts(texts), embed(engine, texts), strict=True):
        assert ids.tolist() == tokenizer(text).input_ids
        theirs = reference(module, ids.tolist(), "mean_tokens", True)
        assert ours.shape == (384,)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert float(ours @ theirs) > 0.99999
    near, far = embed(engine, ["A dog plays in the garden.", "Interest rates rose again."])
    (dog,) = embed(engine, ["A puppy is playing on the lawn."])
    assert dog @ near > 0.5 > 0.3 > dog @ far


@pytest.mark.parametrize(
    ("pooling", "settings"),
    [
        ("mean_tokens", {"normalize": False}),
        ("cls_token", {"normalize": True, "hidden_act": "relu"}),
        ("max_tokens", {"normalize": False, "hidden_act": "gelu_new"}),
        ("lasttoken", {"normalize": True}),
        ("mean_tokens", {"normalize": True, "family": "Roberta", "type_vocab_size": 1}),
        ("mean_tokens", {"normalize": True, "family": "XLMRoberta", "lowercase": True}),
    ],
)
def test_small_encoders_of_each_kind_agree(tmp_path: Path, pooling: str, settings: dict[str, Any]) -> None:
    module = small_encoder(tmp_path, pooling=pooling, **settings)
    engine = engine_of(tmp_path)
    found = embed(engine, TEXTS)
    for ids, ours in zip(engine.text.encode_texts(TEXTS), found, strict=True):
        np.testing.assert_allclose(ours, reference(module, ids.tolist(), pooling, settings["normalize"]), atol=1e-5)
    assert np.abs(found[0] - found[3]).max() > 0.01


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_decoders_embed_by_their_last_hidden_states(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(TINY[family]()).eval()
    module.save_pretrained(tmp_path)
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    engine = engine_of(tmp_path, max_batch_tokens=400)
    texts = ["the film is very good", "a", "positive " * 200, "very good"]
    found = embed(engine, texts)
    for ids, ours in zip(engine.text.encode_texts(texts), found, strict=True):
        np.testing.assert_allclose(ours, reference(module.model, ids.tolist(), "mean_tokens", False), atol=1e-5)
    assert engine_of(tmp_path, context_length=9).context_length == 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    small_encoder(path)
    return path


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_models_with_a_language_head_embed_without_it(tmp_path: Path, family: str) -> None:
    config = small_encoder(tmp_path).config
    settings = {name: value for name, value in config.to_dict().items() if name not in ("architectures", "model_type")}
    head = getattr(transformers, f"{family}ForMaskedLM")(getattr(transformers, f"{family}Config")(**settings)).eval()
    head.save_pretrained(tmp_path)
    engine = engine_of(tmp_path)
    (ours,) = embed(engine, ["a text"])
    ids = engine.text.encode_texts(["a text"])[0].tolist()
    np.testing.assert_allclose(ours, reference(head.base_model, ids, "mean_tokens", True), atol=1e-5)


@pytest.mark.parametrize("pack", [True, False])
def test_packed_and_plain_products_agree(folder: Path, monkeypatch: pytest.MonkeyPatch, pack: bool) -> None:
    monkeypatch.setattr("spark_llm.engine.encoder.model.packing_pays", lambda dtype: pack)
    found = embed(engine_of(folder), TEXTS)
    module = transformers.BertModel.from_pretrained(folder).eval()
    for ids, ours in zip(engine_of(folder).text.encode_texts(TEXTS), found, strict=True):
        np.testing.assert_allclose(ours, reference(module, ids.tolist(), "mean_tokens", True), atol=1e-5)


def test_a_models_own_prompt_stands_before_every_text(tmp_path: Path, folder: Path) -> None:
    small_encoder(tmp_path)
    prompts = {"prompts": {"query": "query: ", "doc": "d"}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (ours,) = embed(engine_of(tmp_path), ["blue"])
    np.testing.assert_allclose(ours, embed(engine_of(folder), ["query: blue"])[0], atol=2e-6)
    prompts["default_prompt_name"] = "passage"
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with pytest.raises(LlmError, match=r"LLM_MODEL_CORRUPT.*no prompt 'passage'"):
        engine_of(tmp_path)


def drawn_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("abcdef", k=draw.choice((0, 1, 3, 9, 20, 38)))) for _ in range(count)]


@pytest.mark.parametrize("batch_tokens", [1, 100, 5000])
def test_a_vector_does_not_depend_on_what_is_computed_beside(folder: Path, batch_tokens: int) -> None:
    texts = drawn_texts(60)
    together = embed(engine_of(folder, max_batch_tokens=batch_tokens), texts)
    engine = engine_of(folder)
    alone = [embed(engine, [text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=2e-6)
    exact = engine_of(folder, deterministic=True)
    assert [c.text for c in run(exact, requests(exact, texts)).values()] == [
        c.text for text in sorted(texts, key=len) for c in run(exact, requests(exact, [text])).values()
    ]


def test_numbers_are_as_short_as_float32_allows() -> None:
    wild = np.array([[0.1, -1 / 3, 1e-30, 0.0], [1.5e30, 3, np.pi, -0.0], [1, 2, np.nan, 4]], np.float32)
    texts = json_vectors(wild)
    assert texts[0] is not None
    assert texts[0].startswith("[0.1,-0.33333334,")
    assert texts[2] is None
    for text, row in zip(texts[:2], wild, strict=False):
        assert np.array_equal(np.array(json.loads(text or ""), np.float32), row)


def test_texts_that_are_too_long_are_refused_one_by_one_or_cut(folder: Path) -> None:
    engine = engine_of(folder)
    assert engine.context_length == WINDOW
    fits, too_long = "a" * (WINDOW - 2), "a" * (WINDOW - 1)
    found = run(engine, requests(engine, [fits, too_long, "b"]))
    assert found[1].error is not None
    told = str(LlmError(found[1].error[0], **found[1].error[1]))
    assert told.startswith("[LLM_CONTEXT_LENGTH_EXCEEDED] The text has 41 tokens or more, but the context holds 40.")
    assert "max_tokens" not in told
    cut = engine.text.encode_texts([too_long, "b"], truncate=True)
    assert cut[0].tolist() == engine.text.encode_texts([fits])[0].tolist()
    assert found[0].error is found[2].error is None
    assert engine_of(folder, context_length=5).context_length == 5
    assert engine_of(folder, context_length=9999).context_length == WINDOW


def test_clients_take_turns_and_cancelled_rows_are_not_charged(folder: Path) -> None:
    engine = engine_of(folder, max_batch_tokens=60, deterministic=True)
    prompt = engine.text.encode_texts(["a" * 30])[0]
    for number in range(200):
        engine.add(Request(number, prompt, SamplingParams(max_tokens=10**6), Client("many", "q")))
    for number in range(200, 210):
        engine.add(Request(number, prompt, SamplingParams(), Client("few", "q", 2.0)))
    waiting = engine.clients()
    assert (waiting["many"].waiting, waiting["few"].waiting, waiting["few"].weight) == (200, 10, 2.0)
    engine.cancel(range(100))
    assert engine.stats().waiting == 110
    order = [completion.id for completion in engine.step()]
    assert engine.stats().waiting + engine.stats().running == 109
    assert 0 < engine.clients()["many"].running < engine.stats().running
    order += [completion.id for _ in range(30) for completion in engine.step()]
    assert sum(number >= 200 for number in order[:15]) >= 9
    engine.cancel([*range(100, 150), 207])
    rest = run(engine, [])
    assert not set(rest) & set(order)
    assert not set(rest) & {*range(150), 207}
    assert set(rest) | set(order) >= {*range(150, 200), *range(200, 210)} - {207}
    assert engine.stats().waiting == engine.stats().running == 0


def test_a_batch_that_fails_is_computed_row_by_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder)
    good = embed(engine, ["abc", "abd", "abe"])
    embed_all, bad = engine._model.embed, int(engine.text.encode_texts(["c"])[0][1])

    def fails(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if bool((tokens == bad).any()):
            raise RuntimeError("out of order")
        return embed_all(tokens, lengths)

    monkeypatch.setattr(engine._model, "embed", fails)
    found = run(engine, requests(engine, ["c", "abd", "abe"]))
    assert found[0].error is not None
    assert found[0].error[0] == "LLM_ENGINE_STEP_FAILED"
    assert "out of order" in found[0].error[1]["reason"]
    np.testing.assert_allclose([vector(found[1]), vector(found[2])], good[1:], atol=2e-6)
    assert engine.stats().failed_steps == 2
    odd = Request(9, np.zeros(3, np.int32), SamplingParams(), Client(weight=0.0))
    assert run(engine, [odd])[9].error is not None


# ---- what cannot embed, or only embeds


def test_a_model_of_the_other_task_is_refused_with_the_way_out(folder: Path) -> None:
    with pytest.raises(LlmError, match=r"LLM_MODEL_TASK_MISMATCH.*cannot generate answers.*BertModel.*embeddings"):
        loading.load_engine(EngineSpec(model=str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", {"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ("config.json", {"hidden_act": "swish"}, "activation swish"),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative_key positions"),
        ("modules.json", [{"type": "x.Dense", "path": "2_Dense"}], "a module Dense"),
        ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "weightedmean pooling"),
        ("1_Pooling/config.json", {"include_prompt": False}, "pooling without the prompt"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls and mean"),
    ],
)
def test_what_is_not_known_is_refused_not_ignored(tmp_path: Path, file: str, content: Any, reason: str) -> None:
    small_encoder(tmp_path)
    path = tmp_path / file
    old = json.loads(path.read_text())
    path.write_text(json.dumps(old | content if file == "config.json" else content))
    with pytest.raises(LlmError, match=f"LLM_MODEL_UNSUPPORTED.*{reason}"):
        engine_of(tmp_path)


def test_an_encoder_that_is_not_there_is_told_with_its_own_key(tmp_path: Path) -> None:
    for model in ("no/such/encoder/here", str(tmp_path)):
        with pytest.raises(LlmError, match=r"LLM_MODEL_NOT_FOUND.*Set spark\.llm\.embedding\.model to"):
            engine_of(model)
    with pytest.raises(LlmError, match=r"LLM_MODEL_NOT_FOUND.*Set spark\.llm\.model to"):
        loading.load_engine(EngineSpec(model=str(tmp_path), device="cpu"))


def test_what_changes_vectors_changes_the_fingerprint(tmp_path: Path, folder: Path) -> None:
    source = resolve(str(folder), "embed")

    def of(**spec: Any) -> str:
        return fingerprint(source, engine_of(folder, **spec).identity)

    small_encoder(tmp_path, pooling="cls_token")
    other = fingerprint(resolve(str(tmp_path), "embed"), engine_of(tmp_path).identity)
    found = {of(), of(context_length=9), of(dtype="bfloat16"), other, fingerprint(source, "float32")}
    assert len(found) == 5
    assert of(threads=1) in found


# ---- through the service


@pytest.fixture
def client(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[EngineClient, EngineLoop]]:
    spec = EngineSpec(model=str(folder), task="embed", device="cpu", check_invariants=True, max_batch_tokens=80)
    engine = load_encoder(spec)
    loop = EngineLoop(engine, lambda error: None, lambda: fingerprint(resolve(str(folder), "embed"), engine.identity))
    loop.start()
    socket = str(tmp_path / "s")
    state = EngineState(process=owner(), socket=socket, model="small")
    monkeypatch.setattr(clients.launch, "ensure", lambda spec, timeout: state)
    with EngineServer(socket, loop, engine.text, 1, lambda: None):
        yield EngineClient(spec, 10.0), loop


def test_streams_embed_fold_and_keep_their_vectors(
    folder: Path, tmp_path: Path, client: tuple[EngineClient, EngineLoop]
) -> None:
    ask, loop = client
    cache = ResultCache(path=str(tmp_path / "answers"))
    texts = ["blue\n", "red", "blue\n", "", "é" * 3, "x" * 50]
    header = StreamOpen(query="q", params=SamplingParams(max_tokens=7), cache=cache)
    keys: list[bytes | None] = [b"blue", b"red", b"blue", b"", b"e", b"x"]

    def asked(header: StreamOpen) -> dict[int, dict[str, Any]]:
        with ask.stream(header) as stream:
            stream.send(batch_of({number: [text] for number, text in enumerate(texts)}, keys=keys))
            return answers(stream)

    found = asked(header)
    direct = embed(engine_of(folder), ["blue", "red", "blue", "", "é" * 3])
    for number, expected in enumerate(direct):
        np.testing.assert_allclose(json.loads(found[number]["text"]), expected, atol=2e-6)
    assert found[5]["text"] is None
    assert "[LLM_CONTEXT_LENGTH_EXCEEDED] The text has 52 tokens or more" in found[5]["error"]
    assert sorted(found[number]["folded"] for number in (0, 2)) == [False, True]
    assert (found[1]["prompt_tokens"], found[1]["computed_tokens"], found[1]["output_tokens"]) == (5, 5, 0)
    assert found[1]["finish_reason"] == "stop"
    assert loop.results.flush(10)
    loop.results.clear()  # what is found now comes from the files
    again = asked(StreamOpen(query="later", params=header.params, cache=cache))
    assert [again[number]["stored"] for number in (0, 1, 3, 4)] == [True] * 4
    assert [again[number]["text"] for number in range(5)] == [found[number]["text"] for number in range(5)]
    cut = asked(StreamOpen(truncate=True))
    assert cut[5]["prompt_tokens"] == WINDOW
    assert cut[5]["error"] is None


def test_a_closed_stream_cancels_its_rows(
    client: tuple[EngineClient, EngineLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, loop = client
    model = loop._engine._model  # type: ignore[attr-defined]
    embed_all, gate, steps = model.embed, threading.Event(), []

    def waits(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        steps.append(len(tokens))
        assert len(steps) == 1 or gate.wait(30)
        return embed_all(tokens, lengths)

    monkeypatch.setattr(model, "embed", waits)
    with ask.stream(StreamOpen(query="q")) as stream:
        stream.send(batch_of({number: [f"{number} " + "x" * 30] for number in range(300)}))
        assert stream.receive() is not None
    wait_until(lambda: loop.status(0, 0).streams == 0)
    gate.set()
    wait_until(lambda: loop.status(0, 0).waiting + loop.status(0, 0).running == 0)
    assert loop.status(0, 0).rows_answered == steps[0]
    assert len(steps) == 2
    with ask.stream(StreamOpen()) as stream:
        stream.send(batch_of({1: ["a"]}))
        assert answers(stream)[1]["error"] is None


@pytest.mark.parametrize(
    "header",
    [StreamOpen(system="be brief"), StreamOpen(constraint=Constraint(kind="regex", text="a"))],
)
def test_what_only_generation_has_is_refused(client: tuple[EngineClient, EngineLoop], header: StreamOpen) -> None:
    with client[0].stream(header) as stream:
        stream.send(batch_of({1: ["a"]}))
        with pytest.raises(LlmError, match=r"LLM_MODEL_TASK_MISMATCH.*Leave that out"):
            answers(stream)
