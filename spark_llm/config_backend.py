"""The keys of who computes the answers: the built-in engine, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

import dataclasses
from urllib.parse import urlsplit

from spark_llm.config_kinds import OPTIONAL_TEXT, TIME, Kind, choice, integer, key
from spark_llm.engine.config import BackendSpec
from spark_llm.errors import LlmError

BUILTIN, OPENAI = "builtin", "openai"


def _url(text: str) -> str:
    """Without user or password, which everyone who sees a configuration would see, and without what follows a path."""
    if not text:
        return ""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError
    if parts.query or parts.fragment:
        raise ValueError
    return text.rstrip("/")


URL = Kind("a URL such as https://host:8000/v1, without user, password or query", _url)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendConf:
    """Who computes, where it is, and how much it may be asked."""

    backend: str = key(
        "backend",
        choice(BUILTIN, OPENAI),
        BUILTIN,
        "Who computes answers: `builtin`, the engine beside each executor, or `openai`, the server at "
        "`spark.llm.backend.url`, which speaks OpenAI's protocol (vLLM, SGLang, `spark-llm serve`, a hosted model). "
        "Rows are folded, ordered, cached and counted alike. `spark.llm.model` is then the server's name of the model, "
        "and `default` the only one that it has.",
    )
    backend_url: str = key(
        "backend.url",
        URL,
        "",
        "Where the server is, up to and including `/v1`.",
    )
    backend_key_env: str = key(
        "backend.keyEnv",
        OPTIONAL_TEXT,
        "",
        "Name of the environment variable of the executors that holds the server's API key "
        "(`spark.executorEnv.…` would show it in the UI: set it where executors start, or use a file).",
    )
    backend_key_file: str = key(
        "backend.keyFile",
        OPTIONAL_TEXT,
        "",
        "Path, on all executors, of a file that holds the API key and nothing else. It is read again when the server "
        "refuses the key, so a key may be replaced while queries run.",
    )
    backend_concurrency: int = key(
        "backend.concurrency",
        integer(1, 4096),
        "64",
        "Most requests of one executor that are under way at the server, of all its tasks together.",
    )
    backend_rpm: int = key(
        "backend.rpm",
        integer(0),
        "0",
        "Most requests a minute of the whole application; each executor takes its share. 0 is no limit.",
    )
    backend_tpm: int = key(
        "backend.tpm",
        integer(0),
        "0",
        "Most tokens a minute, of prompts and answers, of the whole application; each executor takes its share. 0 is "
        "no limit.",
    )
    backend_timeout: float = key(
        "backend.timeout",
        TIME,
        "10m",
        "How long one request may take before it is sent again.",
    )
    backend_retries: int = key(
        "backend.retries",
        integer(0, 100),
        "5",
        "How often a row is sent again after what may pass: no connection, no answer in time, status 408, 429 and 5xx.",
    )

    def backend_spec(self, executors: int) -> BackendSpec | None:
        """What an executor, one of ``executors``, may ask of which server; None: the built-in engine computes.

        Raises LLM_INVALID_CONFIG.
        """
        if self.backend == BUILTIN:
            return None
        if not self.backend_url:
            expected = f"{URL.expected}, as spark.llm.backend is {self.backend}"
            raise LlmError("LLM_INVALID_CONFIG", key="spark.llm.backend.url", value="''", expected=expected)
        return BackendSpec(
            url=self.backend_url,
            key_env=self.backend_key_env,
            key_file=self.backend_key_file,
            concurrency=self.backend_concurrency,
            rpm=self.backend_rpm / executors,
            tpm=self.backend_tpm / executors,
            timeout=self.backend_timeout,
            retries=self.backend_retries,
        )
