"""The API key of a server: from the environment or a file of this host, never from a configuration value."""

from __future__ import annotations

import os
from pathlib import Path

from spark_llm.engine.config import BackendSpec
from spark_llm.errors import LlmError


class ApiKey:
    """The key that ``spec`` names; ``header`` is what a request shows. Raises LLM_BACKEND_KEY_MISSING."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._value = self._read()

    @property
    def header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._value}"} if self._value else {}

    def renew(self) -> bool:
        """Reads the key again, which may have been replaced; whether it has been."""
        try:
            new = self._read()
        except LlmError:
            return False  # a file about to be replaced
        changed, self._value = new != self._value, new
        return changed

    def _read(self) -> str:
        spec = self._spec
        if spec.key_file:
            try:
                found = Path(spec.key_file).read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is no UTF-8"
                raise self._missing("spark.llm.backend.keyFile", spec.key_file, reason) from None
            return self._checked(found, "spark.llm.backend.keyFile", spec.key_file)
        if spec.key_env:
            return self._checked(os.environ.get(spec.key_env, ""), "spark.llm.backend.keyEnv", spec.key_env)
        return ""

    def _checked(self, value: str, setting: str, place: str) -> str:
        if not value:
            raise self._missing(setting, place, "it is empty or not set")
        if not value.isascii() or not value.isprintable() or " " in value:
            raise self._missing(setting, place, "it holds more than a key")
        return value

    def _missing(self, setting: str, place: str, reason: str) -> LlmError:
        return LlmError("LLM_BACKEND_KEY_MISSING", url=self._spec.url, setting=setting, place=place, reason=reason)
