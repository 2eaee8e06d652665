"""The counters of a server in Prometheus' text format."""

from __future__ import annotations

from collections import Counter

from spark_llm.engine.service.protocol import EngineStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "spark_llm_"
_COUNTERS = {
    "rows_received": "Rows that came in.",
    "rows_answered": "Rows that were answered, with an error or without.",
    "prompt_tokens": "Tokens of the prompts of answered rows.",
    "cached_tokens": "Of these, found in the prefix cache.",
    "computed_tokens": "Of these, computed.",
    "output_tokens": "Tokens of answers.",
    "forward_seconds": "Time inside the model.",
    "step_seconds": "Time of whole steps.",
}
_GAUGES = {
    "waiting": "Rows that wait.",
    "running": "Rows that are worked on.",
    "streams": "Requests that are open.",
    "free_pages": "Pages of the key/value cache that a row could have.",
    "total_pages": "Pages of the key/value cache.",
    "tokens_per_second": "Tokens through the model in the last seconds.",
    "uptime": "Seconds since the start.",
}


def render(status: EngineStatus, responses: Counter[tuple[str, int]]) -> str:
    """responses: how many there were, by path and status."""
    model = f'{{model="{_escaped(status.model)}"}}'
    lines = []
    for name, about in _COUNTERS.items():
        lines += _head(f"{name}_total", about, "counter")
        lines.append(f"{_PREFIX}{name}_total{model} {getattr(status, name)}")
    for name, about in _GAUGES.items():
        lines += _head(name, about, "gauge")
        lines.append(f"{_PREFIX}{name}{model} {getattr(status, name)}")
    lines += _head("http_responses_total", "Responses by path and status.", "counter")
    for (path, code), count in sorted(responses.items()):
        lines.append(f'{_PREFIX}http_responses_total{{path="{_escaped(path)}",status="{code}"}} {count}')
    return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP {_PREFIX}{name} {about}", f"# TYPE {_PREFIX}{name} {kind}"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
