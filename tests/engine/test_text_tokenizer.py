"""Tokenizers and chat templates loaded from folders and GGUF metadata, and what can be wrong with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from spark_llm.engine.model.source import ModelSource, resolve
from spark_llm.engine.text.gguf_tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN, TEKKEN_PATTERN
from spark_llm.engine.text.pipeline import TextPipeline
from spark_llm.engine.text.template import ChatTemplate
from spark_llm.engine.text.tokenizer import load_tokenizer
from spark_llm.errors import LlmError

TEXT = "I'LL see 12345 naïve cafés — don't!!\n\n  x\t= {'a': [1, 2]} // 日本語 A\u030a 😀\r\n THE end. "
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def isolated(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


WORDS = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "llama-bpe": isolated(LLAMA3_PATTERN),
    "qwen2": isolated(QWEN2_PATTERN),
    "tekken": isolated(TEKKEN_PATTERN),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def trained(pre: str = "smollm", vocab_size: int = 600) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = WORDS[pre]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    chosen = random.Random(0)
    tokenizer.train_from_iterator([" ".join(chosen.choices(TEXT.split(" "), k=30)) for _ in range(200)], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes for ``tokenizer``."""
    tokens = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    added = tokenizer.get_added_tokens_decoder()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [(3 if added[token].special else 4) if token in added else 1 for token in range(len(tokens))],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def write_gguf(path: Path, tokenizer: dict[str, Any], chat_template: str | None = None) -> ModelSource:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in tokenizer.items():
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            bool: writer.add_bool,
            list: writer.add_array,
        }[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve(str(path))


def write_folder(path: Path, tokenizer: Tokenizer, **config: Any) -> ModelSource:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return resolve(str(path))


def expect(condition: str, word: str) -> Any:
    return pytest.raises(LlmError, match=rf"(?s)^\[{condition}\] .*{word}")


@pytest.mark.parametrize("pre", WORDS)
def test_a_gguf_tokenizer_gives_the_ids_of_the_original(tmp_path: Path, pre: str) -> None:
    original = trained(pre)
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata_of(original, pre), CHATML))
    texts = [TEXT, "<|im_start|>user\n" + TEXT + "<|im_end|><think>\n", "", " ", "\n \n"]
    for text in texts:
        assert loaded.tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text).ids
        ids = original.encode(text).ids
        assert loaded.tokenizer.decode(ids) == original.decode(ids)
    assert loaded.chat_template == CHATML
    assert loaded.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_sentencepiece_merges_are_those_of_transformers(tmp_path: Path) -> None:
    chosen = random.Random(1)
    letters = ["▁", *"abcdefg"]
    longer = dict.fromkeys("".join(chosen.choices(letters, k=chosen.randint(2, 5))) for _ in range(300))
    pieces = [*letters, *longer]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(chosen.randint(0, 50)) for _ in pieces]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    loaded = load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))
    vocab = {text: token for token, text in enumerate(tokens)}
    by_score = {text: scores[token] for text, token in vocab.items() if text in pieces}
    merges = generate_merges({text: vocab[text] for text in pieces}, by_score)
    reference = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    reference.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    for _ in range(200):
        text = "".join(chosen.choices([*" abcdefg", "é", "\n"], k=chosen.randint(1, 20)))
        ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text).ids
        assert loaded.tokenizer.decode(ids) == text
    assert loaded.tokenizer.encode("a").ids[0] == 1  # SentencePiece models begin with <s>
    assert TextPipeline(loaded).frame(None).prefix == "<s>"


@pytest.mark.parametrize("layout", ["config", "named", "file"])
def test_a_folder_gives_tokenizer_template_and_special_tokens(tmp_path: Path, layout: str) -> None:
    template: Any = CHATML
    if layout == "named":
        template = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    eos = {"content": "<|im_end|>", "lstrip": False}
    source = write_folder(tmp_path / "m", trained(), bos_token="<|im_start|>", eos_token=eos, chat_template=template)
    if layout == "file":
        write_folder(tmp_path / "m", trained(), bos_token="<|im_start|>", eos_token=eos)
        (tmp_path / "m" / "chat_template.jinja").write_text(CHATML)
    loaded = load_tokenizer(source)
    assert loaded.chat_template == CHATML
    assert loaded.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert loaded.tokenizer.encode(TEXT).ids == trained().encode(TEXT).ids


def test_truncation_and_padding_that_a_tokenizer_was_saved_with_are_off(tmp_path: Path) -> None:
    tokenizer = trained()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    loaded = load_tokenizer(write_folder(tmp_path / "m", tokenizer))
    assert len(loaded.tokenizer.encode(TEXT * 3).ids) > 32
    assert len(loaded.tokenizer.encode("I").ids) == 1


@pytest.mark.model
def test_a_dummy_model_without_a_tokenizer_gets_the_packaged_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    loaded = load_tokenizer(resolve(f"dummy:{tmp_path / 'config.json'}"))
    assert loaded.special_tokens["bos_token"] == "<|im_start|>"
    write_folder(tmp_path, trained())
    assert load_tokenizer(resolve(f"dummy:{tmp_path / 'config.json'}")).special_tokens == {}


def test_missing_and_damaged_tokenizers_are_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "m", trained())
    (tmp_path / "m" / "tokenizer.json").write_text('{"model": 1}')
    with expect("LLM_TOKENIZER_MISSING", "tokenizer.json cannot be read"):
        load_tokenizer(source)
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"")
    with expect("LLM_TOKENIZER_MISSING", "tokenizer.json is missing; convert tokenizer.model"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tokens": None}, "no tokenizer metadata"),
        ({"model": "bert"}, "unknown kind bert"),
        ({"pre": "mystery"}, "unknown pre-tokenizer mystery"),
        ({"merges": None}, "no tokenizer merges"),
        ({"merges": ["qq zz"]}, "inconsistent merges"),
        ({"token_type": [1, 1]}, "2 token types"),
        ({"model": "llama"}, "no score"),
    ],
)
def test_unusable_gguf_tokenizers_are_named(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    metadata = metadata_of(trained(), "smollm") | change
    source = write_gguf(tmp_path / "m.gguf", {key: value for key, value in metadata.items() if value is not None})
    with expect("LLM_TOKENIZER_MISSING", word):
        load_tokenizer(source)


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "m", trained())
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_attention_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 9}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with expect("LLM_TOKENIZER_MISSING", "the model 100"):
        TextPipeline.load(source)


# --- chat templates ---

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "chatml": CHATML,
    "trims": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{% endfor %} =>",
    "trims the end": "{% for m in messages %}{{ m.content.rstrip() }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}"
    "{{ m.content }}!{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tools and json": "{{ {'a': '<b>é'} | tojson }}{% if tools %}T{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}\n{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n"
    "    {% endif %}\n{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Answer <briefly> & well."])
def test_frames_are_what_transformers_renders(name: str, system: str | None) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=trained(), chat_template=TEMPLATES[name], **SPECIAL)
    frame = ChatTemplate(TEMPLATES[name], SPECIAL, "m").frame(system)
    for message in ["plain", "  spaced \n", "two\n\nlines {{ x }} <b>", "", "\n"]:
        messages = [{"role": "user", "content": message}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert frame.render(message) == expected


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{% for m in messages %}", "does not compile"),
        ("hello", "0 times"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "2 times"),
        ("{{ messages[0].content | upper }}", "0 times"),
        ("{{ messages[0].content | replace('<', '&lt;') }}", "changes the user message"),
        ("{{ messages[0].content | tojson }}", "changes the user message"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "it failed"),
        ("{{ messages.__class__.__mro__ }}{{ messages[0].content }}", "unsafe"),
        ("{{ messages.append(1) }}{{ messages[0].content }}", "unsafe"),
    ],
)
def test_templates_that_cannot_frame_a_message_are_refused(template: str, word: str) -> None:
    with expect("LLM_CHAT_TEMPLATE_INVALID", word):
        ChatTemplate(template, SPECIAL, "m").frame(None)


def test_a_template_that_takes_no_system_message_says_so() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    chat = ChatTemplate(template + "{{ messages[-1].content }}", SPECIAL, "m")
    assert chat.frame(None).render("x") == "x"
    with expect("LLM_CHAT_TEMPLATE_INVALID", r"no system role \(perhaps because of the system message\)"):
        chat.frame("Be kind.")
