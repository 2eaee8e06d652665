"""The type of an answer: ``returns => 'STRUCT<name: STRING, mood: ENUM<''good'', ''bad''>>'`` as a tree.

The language is Spark's DDL with one more type, ENUM: a STRING of which all values are known. Spark's own parser is no
help, as it knows no ENUM; what ``AnswerType.ddl`` writes is for it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from spark_llm.errors import LlmError

SCALARS = (
    "BOOLEAN",
    "TINYINT",
    "SMALLINT",
    "INT",
    "BIGINT",
    "FLOAT",
    "DOUBLE",
    "DECIMAL",
    "STRING",
    "DATE",
    "TIMESTAMP",
    "TIMESTAMP_NTZ",
)
_ALIASES = {
    "BYTE": "TINYINT",
    "SHORT": "SMALLINT",
    "INTEGER": "INT",
    "LONG": "BIGINT",
    "REAL": "FLOAT",
    "DEC": "DECIMAL",
    "NUMERIC": "DECIMAL",
    "TIMESTAMP_LTZ": "TIMESTAMP",
    "CHARACTER": "CHAR",
}
SUPPORTED = f"{', '.join(SCALARS)}, VARCHAR(n), ENUM<'a', 'b'>, ARRAY<T>, MAP<STRING, T>, STRUCT<name: T, ...>"
_MAX_PRECISION = 38
_MAX_DEPTH = 32

_TOKEN = re.compile(
    r"""\s*(?:(?P<word>\w+)|`(?P<quoted>(?:[^`]|``)+)`|'(?P<text>(?:[^'\\]|''|\\.)*)'|"(?P<other>(?:[^"\\]|\\.)*)"
    |(?P<sign>[<>(),:]))""",
    re.VERBOSE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """A field of a STRUCT. ``comment`` tells the model what it is."""

    name: str
    type: AnswerType
    nullable: bool = True
    comment: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerType:
    """A node of the tree. ``name``: of SCALARS, or ENUM, VARCHAR, ARRAY, MAP, STRUCT.

    digits: precision and scale of a DECIMAL. length: of a VARCHAR, 0 of others. choices: of an ENUM. element: of an
    ARRAY, and the value of a MAP, whose keys are STRING.
    """

    name: str
    digits: tuple[int, int] = (10, 0)
    length: int = 0
    choices: tuple[str, ...] = ()
    element: AnswerType | None = None
    fields: tuple[Field, ...] = ()

    @property
    def is_nested(self) -> bool:
        return self.name in ("ARRAY", "MAP", "STRUCT")

    @property
    def ddl(self) -> str:
        """The type in Spark's own DDL; every field is nullable, as those of from_json are."""
        if self.name in ("ENUM", "VARCHAR"):
            return "STRING"
        if self.name == "DECIMAL":
            return f"DECIMAL({self.digits[0]},{self.digits[1]})"
        if self.name == "STRUCT":
            return f"STRUCT<{', '.join(f'{quoted(field.name)}: {field.type.ddl}' for field in self.fields)}>"
        if self.element is None:
            return self.name
        return f"{self.name}<{'STRING, ' * (self.name == 'MAP')}{self.element.ddl}>"

    def leaves(self) -> int:
        """How many values an answer has, an ARRAY and a MAP counted as having four."""
        if self.name == "STRUCT":
            return sum(field.type.leaves() for field in self.fields)
        return 1 if self.element is None else 4 * self.element.leaves()


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return "`" + name.replace("`", "``") + "`"


def parse_type(text: str) -> AnswerType:
    """The type that ``returns => text`` names; ``a INT, b STRING`` is a STRUCT of them.

    LLM_INVALID_RETURN_TYPE tells what is wrong and where.
    """
    parser = _Parser(text)
    if parser.holds_fields():
        return AnswerType("STRUCT", fields=parser.fields(""))
    found = parser.type()
    parser.end()
    return found


class _Parser:
    """Recursive descent over the tokens of ``text``: (kind, value, place)."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._scan())
        self._next = 0
        self._depth = 0

    def _scan(self) -> Iterator[tuple[str, str, int]]:
        place = 0
        end = len(self._text.rstrip())
        while place < end:
            match = _TOKEN.match(self._text, place)
            if match is None or match.lastgroup is None:
                raise self._error(f"nothing begins with {self._text[place : place + 10].strip()!r}")
            kind, value = match.lastgroup, match[match.lastgroup]
            if kind == "quoted":
                value = value.replace("``", "`")
            elif kind in ("text", "other"):
                kind, value = "text", re.sub(r"\\(.)", r"\1", value.replace("''", "'") if kind == "text" else value)
            yield kind, value, match.start(kind) if kind in match.groupdict() else match.start()
            place = match.end()

    def _error(self, reason: str) -> LlmError:
        return LlmError("LLM_INVALID_RETURN_TYPE", type=self._text, reason=reason, supported=SUPPORTED)

    def _peek(self, offset: int = 0) -> tuple[str, str]:
        place = self._next + offset
        return self._tokens[place][:2] if place < len(self._tokens) else ("end", "the end")

    def _take(self) -> tuple[str, str]:
        found = self._peek()
        self._next += 1
        return found

    def _is(self, value: str) -> bool:
        kind, found = self._peek()
        return kind in ("word", "sign") and found.upper() == value

    def _accept(self, value: str) -> bool:
        if not self._is(value):
            return False
        self._next += 1
        return True

    def _expect(self, value: str, after: str) -> None:
        if not self._accept(value):
            raise self._error(f"expected {value} after {after}, found {self._peek()[1]}")

    def end(self) -> None:
        if self._peek()[0] != "end":
            raise self._error(f"it goes on with {self._peek()[1]}")

    def holds_fields(self) -> bool:
        """Is the text ``a INT, b STRING``, and not a type? Then a name is followed by a colon or by a type."""
        kind, _ = self._peek()
        after, value = self._peek(1)
        return kind == "quoted" or (kind == "word" and (after in ("word", "quoted") or value == ":"))

    def type(self) -> AnswerType:
        kind, word = self._take()
        if kind != "word":
            raise self._error(f"expected a type, found {word}")
        name = word.upper()
        name = _ALIASES.get(name, name)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error(f"it is nested deeper than {_MAX_DEPTH} levels")
        try:
            return self._rest(name, word)
        finally:
            self._depth -= 1

    def _rest(self, name: str, word: str) -> AnswerType:
        """The type ``name`` with what stands behind it."""
        if name == "ENUM":
            return AnswerType("ENUM", choices=self._choices())
        if name == "ARRAY":
            self._expect("<", "ARRAY")
            element = self.type()
            self._expect(">", "ARRAY<T")
            return AnswerType("ARRAY", element=element)
        if name == "MAP":
            self._expect("<", "MAP")
            if self.type().name != "STRING":
                raise self._error("the keys of a MAP are STRING")
            self._expect(",", "MAP<STRING")
            element = self.type()
            self._expect(">", "MAP<STRING, T")
            return AnswerType("MAP", element=element)
        if name == "STRUCT":
            self._expect("<", "STRUCT")
            return AnswerType("STRUCT", fields=self.fields(">"))
        if name == "DECIMAL":
            return AnswerType("DECIMAL", digits=self._digits())
        if name in ("VARCHAR", "CHAR"):
            self._expect("(", name)
            length = self._number(1, 1_000_000)
            self._expect(")", f"{name}({length}")
            return AnswerType("VARCHAR", length=length)
        if name not in SCALARS:
            raise self._error(f"{word} is no type that an answer can have")
        return AnswerType(name)

    def fields(self, end: str) -> tuple[Field, ...]:
        """Fields up to ``end``, "" is the end of the text."""
        found: list[Field] = []
        while True:
            kind, name = self._take()
            if kind not in ("word", "quoted"):
                raise self._error(f"expected the name of a field, found {name}")
            if any(name.lower() == field.name.lower() for field in found):
                raise self._error(f"there are two fields {name}")
            self._accept(":")
            answer_type = self.type()
            nullable, comment = True, ""
            if self._accept("NOT"):
                self._expect("NULL", "NOT")
                nullable = False
            if self._accept("COMMENT"):
                kind, comment = self._take()
                if kind != "text":
                    raise self._error(f"expected a text after COMMENT, found {comment}")
            found.append(Field(name, answer_type, nullable, comment))
            if self._accept(","):
                continue
            if end:
                self._expect(end, f"field {name}")
            else:
                self.end()
            return tuple(found)

    def _choices(self) -> tuple[str, ...]:
        close = ")" if self._accept("(") else ">"
        if close == ">":
            self._expect("<", "ENUM")
        found: list[str] = []
        while True:
            kind, text = self._take()
            if kind != "text" or not text:
                raise self._error(f"the values of an ENUM are texts that are not empty, found {text or repr(text)}")
            found.append(text)
            if not self._accept(","):
                self._expect(close, f"ENUM value {text!r}")
                break
        if len(set(found)) < len(found):
            raise self._error("an ENUM has a value twice")
        return tuple(found)

    def _digits(self) -> tuple[int, int]:
        if not self._accept("("):
            return 10, 0
        precision = self._number(1, _MAX_PRECISION)
        scale = self._number(0, precision) if self._accept(",") else 0
        self._expect(")", f"DECIMAL({precision}")
        return precision, scale

    def _number(self, least: int, most: int) -> int:
        kind, text = self._take()
        if kind != "word" or not text.isdecimal() or not least <= int(text) <= most:
            raise self._error(f"expected a number from {least} to {most}, found {text}")
        return int(text)
