"""Answer types at random, and texts at random that the constraint of a type lets through."""

from __future__ import annotations

import random

from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from spark_llm.call import AnswerForm
from spark_llm.functions.types import SCALARS, AnswerType, Field, quoted

BYTES = LLTokenizer("byte")


def matcher(form: AnswerForm) -> LLMatcher:
    """What holds a model to the form, over single bytes."""
    if form.kind == "regex":
        grammar = LLMatcher.grammar_from_regex(form.text)
    else:
        grammar = LLMatcher.grammar_from_json_schema(form.text)
    found = LLMatcher(BYTES, grammar)
    assert not found.is_error(), found.get_error()
    return found


def accepts(form: AnswerForm, text: str) -> bool:
    if form.kind == "choices":
        return text in form.choices
    found = matcher(form)
    data = list(text.encode())
    allowed = found.validate_tokens(data)
    found.consume_tokens(data[:allowed])
    return allowed == len(data) and bool(found.is_accepting())


def names() -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=6)


def leaves() -> st.SearchStrategy[AnswerType]:
    plain = st.sampled_from([name for name in SCALARS if name != "DECIMAL"])
    digits = st.integers(1, 38).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, p)))
    return st.one_of(
        plain.map(AnswerType),
        digits.map(lambda found: AnswerType("DECIMAL", digits=found)),
        st.integers(1, 20).map(lambda length: AnswerType("VARCHAR", length=length)),
        st.lists(names(), min_size=1, max_size=4, unique=True).map(lambda c: AnswerType("ENUM", choices=tuple(c))),
    )


def structs(inner: st.SearchStrategy[AnswerType]) -> st.SearchStrategy[AnswerType]:
    fields = st.builds(Field, names(), inner, st.booleans(), st.sampled_from(["", "it's \\ a comment"]))
    unique = st.lists(fields, min_size=1, max_size=4, unique_by=lambda field: field.name.lower())
    return unique.map(lambda found: AnswerType("STRUCT", fields=tuple(found)))


def types() -> st.SearchStrategy[AnswerType]:
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            structs(inner),
            inner.map(lambda element: AnswerType("ARRAY", element=element)),
            inner.map(lambda element: AnswerType("MAP", element=element)),
        ),
        max_leaves=6,
    )


def written(answer: AnswerType) -> str:
    """The type as a user may write it."""
    if answer.name == "ENUM":
        return "ENUM<" + ", ".join(text(choice) for choice in answer.choices) + ">"
    if answer.name == "VARCHAR":
        return f"varchar({answer.length})"
    if answer.name == "STRUCT":
        fields = [
            f"{quoted(field.name)} {written(field.type)}{'' if field.nullable else ' not null'}"
            f"{f' COMMENT {text(field.comment)}' if field.comment else ''}"
            for field in answer.fields
        ]
        return f"STRUCT < {', '.join(fields)} >"
    if answer.element is not None:
        return f"{answer.name}<{'STRING, ' * (answer.name == 'MAP')}{written(answer.element)}>"
    return answer.ddl


def text(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def drawn(form: AnswerForm, chance: random.Random) -> str | None:
    """A text that the form allows, byte after byte at random; None where chance writes on and on."""
    if form.kind == "choices":
        return chance.choice(form.choices)
    found = matcher(form)
    data: list[int] = []
    while len(data) < 400:
        if found.is_accepting() and chance.random() < 0.3:
            break
        mask = found.compute_bitmask()
        allowed = [token for token in range(256) if mask[token // 8] >> (token % 8) & 1]
        if not allowed:
            break
        ends = [token for token in allowed if chr(token) in '"}],0123456789' or token >= 128]
        data.append(chance.choice(ends if ends and chance.random() < 0.6 else allowed))
        found.consume_tokens(data[-1:])
    return bytes(data).decode() if found.is_accepting() else None
