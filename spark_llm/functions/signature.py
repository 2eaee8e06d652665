"""SQL functions over ``llm``: their signatures, what DESCRIBE FUNCTION says of them, their arguments by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from spark_llm.errors import LlmError
from spark_llm.functions import fields
from spark_llm.functions.answer import EXCLUSIVE
from spark_llm.functions.builder import LlmBuilder, named
from spark_llm.functions.options import OPTIONS, misspelt, option_name, unknown_option
from spark_llm.optimizer.catalyst.bridge import Expression, Jvm


@dataclasses.dataclass(frozen=True)
class Bound:
    """A call's arguments: ``given`` by the name of their parameter, without those that are NULL or left out; checked
    ``options`` of llm(), which every function takes by name."""

    builder: LlmBuilder
    session: Jvm
    function: Function
    given: dict[str, Expression]
    options: dict[str, Any]

    def wrong(self, reason: str) -> LlmError:
        return LlmError(
            "LLM_INVALID_CALL", function=self.function.name, reason=reason, signature=self.function.signature
        )

    def constant(self, name: str) -> Any:
        """The value of an argument that must be constant; None where it is not given."""
        return self.builder.constants.value(name, self.given[name]) if name in self.given else None

    def texts(self, name: str) -> tuple[str, ...]:
        """The constant ARRAY<STRING> of different texts that an argument must be."""
        found = self.constant(name)
        is_array = isinstance(found, list) and all(isinstance(text, str) and text for text in found)
        if not is_array or not found or len(set(found)) < len(found):
            raise self.wrong(f"{name} must be an ARRAY<STRING> of different texts, none of them empty or NULL")
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of SQL. optional: the names of parameters behind the required ones. about: what each is, for
    DESCRIBE FUNCTION EXTENDED. build: makes the column of a call. is_typed: the function says itself what the answer
    is, so that no option can. takes: the options that mean something to it, None: all that llm has."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    returns: str
    usage: str
    about: tuple[str, ...]
    examples: tuple[str, ...]
    build: Callable[[Bound], Expression]
    is_typed: bool = False
    takes: tuple[str, ...] | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """The options of llm that a call may have."""
        known = OPTIONS if self.takes is None else self.takes
        return tuple(option for option in known if not (self.is_typed and option in EXCLUSIVE))

    @property
    def signature(self) -> str:
        rest = "".join(f"[, {name}]" for name in self.optional)
        return f"{self.name}({', '.join(self.required)}{rest}[, option => constant ...])"

    def bind(self, builder: LlmBuilder, session: Jvm, arguments: Sequence[Expression]) -> Bound:
        """The arguments by name, in any order once one has a name. LLM_INVALID_CALL, LLM_UNKNOWN_OPTION, …"""
        bound = Bound(builder, session, self, {}, {})
        names = (*self.required, *self.optional)
        lower = {name.lower(): name for name in names}
        for place, argument in enumerate(arguments):
            name, value = named(argument)
            if name is None:
                if place >= len(names):
                    raise bound.wrong(f"it takes at most {len(names)} arguments without a name")
                parameter: str | None = names[place]
            else:
                parameter = lower.get(name.lower())
            if parameter is None:
                option = option_name(name or "")
                if option is None:
                    raise (
                        unknown_option(name or "")
                        if misspelt(name or "")
                        else bound.wrong(f"it has no argument {name}")
                    )
                if option not in self.options:
                    raise bound.wrong(f"its answer is {self.returns}: it takes no {option}")
                bound.options[option] = builder.option(option, value)
            elif parameter in bound.given:
                raise bound.wrong(f"argument {parameter} is given twice")
            else:
                bound.given[parameter] = value.child() if value.nodeName() == "Alias" else value
        for name in self.required:
            if name not in bound.given:
                raise bound.wrong(f"argument {name} is missing")
        for name in self.optional:
            if name in bound.given and fields.is_null(bound.given[name]):
                del bound.given[name]
        for name in [name for name, value in bound.options.items() if value is None]:
            del bound.options[name]
        return bound
