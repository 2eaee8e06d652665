"""The command ``spark-llm``: what runs on this host, a model served over HTTP, and which versions are installed."""

from __future__ import annotations

import logging
import platform
import sys
from importlib import metadata
from pathlib import Path

import msgspec
import typer

from spark_llm import __version__
from spark_llm.errors import LlmError

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
            f"{100 * (1 - status.free_pages / status.total_pages):.0f} %" if status.total_pages else "-",
        ]

    head = ["pid", "owner", "model", "dtype", "up", "streams", "waiting + running"]
    head += ["answered", "tokens/s", "from cache", "cache used"]
    _print_table([head, *map(row, found)])
    clients = [
        [str(status.pid), user or "-", f"{of.weight:g}", f"{of.service:,.0f}", f"{of.waiting} + {of.running}"]
        for status in found
        for user, of in sorted(status.clients.items())
    ]
    if clients:
        typer.echo("")
        _print_table([["pid", "client", "weight", "service", "waiting + running"], *clients])


def _print_table(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def serve(
    model: str = typer.Option("default", help="A folder, a .gguf file, a Hugging Face id, or the packaged model."),
    task: str = typer.Option("auto", help="generate, embed, or auto: what the model is for; `default` generates."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; one that others reach needs --api-key-file."),
    port: int = typer.Option(8000, min=0, max=65535, help="0 takes any port that is free."),
    api_key_file: str = typer.Option("", help="Keys that may ask: a line `key` or `name key` for each."),
    name: str = typer.Option("", help="What clients call the model; else its own name, or `default`."),
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
    device: str = typer.Option("auto", help="auto, cpu, cuda or cuda:N."),
    threads: int = typer.Option(0, min=0, help="CPU threads; 0 takes all cores."),
    context_length: int = typer.Option(0, min=0, help="Most tokens of prompt and answer; 0 is the model's own."),
) -> None:
    """Serve a model over HTTP in OpenAI's protocol: completions, chat completions or embeddings; models, metrics."""
    from spark_llm.config_kinds import DEVICE
    from spark_llm.engine.config import DTYPES, EngineSpec

    if dtype not in DTYPES:
        raise typer.BadParameter(f"one of {', '.join(DTYPES)}", param_hint="--dtype")
    if task not in ("auto", "generate", "embed"):
        raise typer.BadParameter("one of auto, generate, embed", param_hint="--task")
    try:
        device = DEVICE.parse(device)
    except ValueError:
        raise typer.BadParameter(DEVICE.expected, param_hint="--device") from None
    try:
        from spark_llm.engine.encoder.config import natural_task
        from spark_llm.engine.model.source import resolve
        from spark_llm.engine.serve.main import ServeOptions
        from spark_llm.engine.serve.main import serve as run
    except ImportError as error:
        typer.echo(f"{error}: pip install 'spark-llm[serve]'", err=True)
        raise typer.Exit(2) from None
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        spec = EngineSpec(
            model=model,
            task=natural_task(resolve(model)) if task == "auto" else task,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            device=device,
            threads=threads,
            context_length=context_length,
        )
        run(spec, ServeOptions(host=host, port=port, key_file=Path(api_key_file) if api_key_file else None, name=name))
    except LlmError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


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
