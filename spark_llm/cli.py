"""The command ``spark-llm``: what runs on this host, and which versions are installed."""

from __future__ import annotations

import platform
from importlib import metadata

import msgspec
import typer

from spark_llm import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Language models inside Spark SQL.")

_PACKAGES = ("torch", "pyspark", "pyarrow", "tokenizers", "safetensors", "gguf")


@app.command()
def engines(
    as_json: bool = typer.Option(False, "--json", help="One JSON object a line, with all counters."),
) -> None:
    """List the inference engines of this user on this host that answer."""
    from spark_llm.engine.service.client import list_engines
    from spark_llm.engine.service.protocol import EngineStatus

    found = list_engines()
    if as_json:
        for status in found:
            typer.echo(msgspec.json.encode(status).decode())
        return
    if not found:
        typer.echo("No engine of this user runs on this host. A query with llm() starts one.")
        return

    def row(status: EngineStatus) -> list[str]:
        prompt = max(1, status.prompt_tokens)
        return [
            str(status.pid),
            str(status.owner),
            status.model,
            status.dtype,
            f"{status.uptime:,.0f} s",
            str(status.streams),
            f"{status.waiting} + {status.running}",
            f"{status.rows_answered:,}",
            f"{status.tokens_per_second:,.0f}",
            f"{100 * status.cached_tokens / prompt:.0f} %",
            f"{100 * (1 - status.free_pages / max(1, status.total_pages)):.0f} %",
        ]

    head = ["pid", "owner", "model", "dtype", "up", "streams", "waiting + running"]
    head += ["answered", "tokens/s", "from cache", "cache used"]
    table = [head, *map(row, found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def version() -> None:
    """Print the versions of spark-llm and of what it stands on."""
    typer.echo(f"spark-llm {__version__}")
    typer.echo(f"python {platform.python_version()}")
    for package in _PACKAGES:
        try:
            typer.echo(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            typer.echo(f"{package} not installed")


def main() -> None:
    """The entry point of the console script."""
    app()
