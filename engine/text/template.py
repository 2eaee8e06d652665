"""Turns a chat template into the text before and after the user message.

The template runs once per system message, in jinja2's immutable sandbox with the names that transformers
gives it; rows are then framed without jinja.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spark_llm.errors import LlmError

_MARK = "Qx7zMessageHere9vK"
_HARD = "a <b> & \"c\" 'd' {{ e }} {% f %} \\n é \U0001f600\n\n  g\tÅh"


class Turn(TypedDict):
    """A message of a conversation, as a template sees it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """The text around a user message, and whether the template strips white space off the message's ends.

    plain: there is no template; the prefix is what the tokenizer itself puts before a text.
    """

    prefix: str
    suffix: str
    strips_start: bool = False
    strips_end: bool = False
    plain: bool = False

    def render(self, message: str) -> str:
        """What the template makes of ``message``."""
        message = message.lstrip() if self.strips_start else message
        message = message.rstrip() if self.strips_end else message
        return f"{self.prefix}{message}{self.suffix}"


class ChatTemplate:
    """A compiled chat template. Raises LLM_CHAT_TEMPLATE_INVALID for one that does not compile."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        self._name = name
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise self._invalid(f"it does not compile: {error}") from error

    def frame(self, system: str | None) -> ChatFrame:
        """The frame for ``system``; None leaves the template's own default, as transformers does.

        Raises LLM_CHAT_TEMPLATE_INVALID when the template fails, refuses a system message, or changes the user
        message by more than stripping its ends.
        """
        parts = self._render(system, _MARK).split(_MARK)
        if len(parts) != 2:
            raise self._invalid(f"it puts the user message {len(parts) - 1} times into the prompt")
        prefix, suffix = parts
        spaced = self._render(system, f" \n {_MARK} \n ")
        before, _, after = spaced.partition(_MARK)
        frame = ChatFrame(prefix, suffix, strips_start=before == prefix, strips_end=after == suffix)
        for message in (f" \n {_MARK} \n ", _HARD):
            if self._render(system, message) != frame.render(message):
                raise self._invalid("it changes the user message")
        return frame

    def conversation(self, messages: Sequence[Turn]) -> list[tuple[str, bool]]:
        """The prompt of several turns in pieces: text, and whether it is a turn's own, not the template's.

        Raises LLM_CHAT_TEMPLATE_INVALID when the template fails, refuses the order of turns, or changes a turn by more
        than stripping its ends.
        """
        marks = [f"{_MARK}{number}x" for number in range(len(messages))]
        rest = self._render_all(
            [Turn(role=turn["role"], content=mark) for turn, mark in zip(messages, marks, strict=True)]
        )
        frame = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise self._invalid("it does not put each message into the prompt once")
            frame.append(before)
        whole = self._render_all(messages)
        contents = [turn["content"] for turn in messages]
        for texts in (contents, [text.strip() for text in contents]):
            pieces = [
                piece for before, text in zip(frame, texts, strict=True) for piece in ((before, False), (text, True))
            ]
            pieces.append((rest, False))
            if "".join(text for text, _ in pieces) == whole:
                return pieces
        raise self._invalid("it changes the messages")

    def _render(self, system: str | None, message: str) -> str:
        messages = [] if system is None else [Turn(role="system", content=system)]
        messages.append(Turn(role="user", content=message))
        try:
            return self._render_all(messages)
        except LlmError as error:
            if system is None:
                raise
            reason = f"{error.parameters['reason']} (perhaps because of the system message)"
            raise self._invalid(reason) from error

    def _render_all(self, messages: Sequence[Turn]) -> str:
        try:
            return self._template.render(
                **self._special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise self._invalid(f"it failed: {error}") from error

    def _invalid(self, reason: str) -> LlmError:
        return LlmError("LLM_CHAT_TEMPLATE_INVALID", model=self._name, reason=reason)


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's part for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
