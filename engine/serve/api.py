"""The requests of OpenAI's protocol that the server takes, and their errors.

What is not supported is refused by name, never ignored: an answer that leaves out what was asked would be wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from spark_llm.engine.request import Constraint, SamplingParams

MOST_ANSWERS = 128  # of one request: prompts times n
MOST_TEXTS = 2048  # of one request for embeddings
_T = TypeVar("_T")

Count = Annotated[int, msgspec.Meta(ge=1)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
# parameters that are known and not supported, and the values that mean nothing is asked
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
}
# about how a hosted service keeps books; they change no answer
_IGNORED = frozenset(
    ("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)


class ApiError(Exception):
    """A refusal, as the protocol tells it. kind: ``type`` of the body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class TextPart(msgspec.Struct, tag="text", forbid_unknown_fields=True):
    """A part of a message's content."""

    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(msgspec.Struct):
    """OpenAI's wrapping of a schema; whether it is strict does not matter: answers always keep to it."""

    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """What answers keep to."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """The same in vLLM's words: one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """include_usage: the stream's last chunk says what it cost."""

    include_usage: bool = False


class _Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    n: Count | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    def params(self, max_tokens: int) -> SamplingParams:
        """How tokens are chosen; the protocol's default is temperature 1."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            stop=tuple(text for text in stop if text),
            ignore_eos=self.ignore_eos,
        )

    def constraint(self) -> Constraint | None:
        """What answers keep to. Raises ApiError."""
        outputs = self.structured_outputs or StructuredOutputs()
        asked: dict[str, Any] = {
            "json_schema": self.guided_json if outputs.json is None else outputs.json,
            "regex": self.guided_regex if outputs.regex is None else outputs.regex,
            "grammar": self.guided_grammar if outputs.grammar is None else outputs.grammar,
            "choices": self.guided_choice if outputs.choice is None else outputs.choice,
        }
        found = [(kind, value) for kind, value in asked.items() if value is not None]
        form = self.response_format
        if form is not None and form.type == "json_object":
            found.append(("json_schema", {"type": "object"}))
        elif form is not None and form.type == "json_schema":
            if form.json_schema is None:
                raise ApiError(400, "response_format.json_schema is missing", param="response_format")
            found.append(("json_schema", form.json_schema.schema))
        if len(found) > 1:
            raise ApiError(400, "answers can keep to one format only", param="response_format")
        for kind, value in found:
            if kind == "choices":
                return Constraint(kind="choices", choices=tuple(value))
            text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            return Constraint(kind=kind, text=text)  # type: ignore[arg-type]
        return None


class ChatRequest(_Common, kw_only=True):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Common, kw_only=True):
    """Of ``/v1/completions``: texts as they are, without a chat template, or token ids."""

    prompt: str | list[str | int | list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        """Raises ApiError for texts and ids in one list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        prompts = [part for part in self.prompt if not isinstance(part, int)]
        if ids and prompts:
            raise ApiError(400, "A prompt is a text, a list of token ids, or a list of one of these", param="prompt")
        return [ids] if ids else prompts


class EmbeddingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Of ``/v1/embeddings``. dimensions: only as many as the model has."""

    model: str
    input: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=MOST_TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None  # None: float
    dimensions: Count | None = None
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


def parse(body: bytes, kind: type[_T]) -> _T:
    """The request in ``body``. Raises ApiError, which names what is wrong."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(400, "The body must be a JSON object")
    for name, nothing in _UNSUPPORTED.items():
        if name in found and found.pop(name) not in nothing:
            raise ApiError(400, f"The parameter {name} is not supported", param=name, code="unsupported_parameter")
    for name in _IGNORED & found.keys():
        del found[name]
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        param = place.rstrip("`").lstrip(".") or (message.split("`")[1] if "field `" in message else None)
        raise ApiError(400, str(error), param=param) from None
