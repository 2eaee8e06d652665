"""Equal models have equal fingerprints wherever they lie; whatever changes answers changes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spark_llm.engine.model.fingerprint import fingerprint
from spark_llm.engine.model.gguf import open_gguf
from spark_llm.engine.model.source import ModelSource, packaged_path


def folder_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"hidden_size": 8}')
    (path / "tokenizer.json").write_text('{"vocab": {}}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "README.md").write_text("a model")
    draw = np.random.default_rng(0)
    save_file({name: draw.normal(size=(200, 8)).astype(np.float32) for name in ("a", "b")}, path / "model.safetensors")
    return path


def of_folder(path: Path, dtype: str = "float32") -> str:
    return fingerprint(ModelSource("folder", path, path.name), dtype)


def test_a_copy_under_another_name_is_the_same_model(tmp_path: Path) -> None:
    first = folder_model(tmp_path / "one")
    shutil.copytree(first, tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("the same model")
    assert of_folder(first) == of_folder(tmp_path / "two")
    assert len(of_folder(first)) == 32


def change_weight(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["b"] = tensors["b"] + np.float32(1e-3)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        lambda path: (path / "config.json").write_text('{"hidden_size": 9}'),
        lambda path: (path / "tokenizer.json").write_text('{"vocab": {"a": 0}}'),
        lambda path: (path / "chat_template.jinja").write_text("{{ messages[0] }}"),
        lambda path: (path / "generation_config.json").write_text("{}"),
        lambda path: (path / "model.safetensors").rename(path / "other.safetensors"),
    ],
)
def test_what_changes_answers_changes_it(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = folder_model(tmp_path / "model")
    before = of_folder(path)
    change(path)
    assert of_folder(path) != before
    assert of_folder(path, "bfloat16") != of_folder(path)


def test_a_gguf_file_counts_by_its_header_and_each_tensor(tmp_path: Path) -> None:
    packaged = packaged_path()
    if packaged is None:
        pytest.skip("the packaged model is not installed")
    copy = tmp_path / "copy.gguf"
    shutil.copy(packaged, copy)
    first = fingerprint(ModelSource("gguf", packaged, "one"), "float32")
    assert fingerprint(ModelSource("gguf", copy, "two"), "float32") == first
    tensor = list(open_gguf(copy).tensors.values())[-1]
    with copy.open("r+b") as file:
        file.seek(tensor.offset + tensor.num_bytes // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    assert fingerprint(ModelSource("gguf", copy, "two"), "float32") != first
