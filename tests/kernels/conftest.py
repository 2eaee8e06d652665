"""Kernels run on a GPU where there is one, else in Triton's interpreter: the same code, step by step in numpy."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before any import of one

import triton.language
import triton.runtime.interpreter as interpreter

sys.path.append(str(Path(__file__).parent))

_patch = interpreter._patch_lang_tensor


def _patch_for_numpy_2_4(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes an int of an array of one element, which numpy 2.4 no longer allows."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_for_numpy_2_4

_patch_language = interpreter._patch_lang
_patched: set[frozenset[int]] = set()


class _Kept:
    """A patch of triton.language that is not taken back."""

    def restore(self) -> None: ...


def _patch_language_once(fn: Any) -> _Kept:
    """The interpreter patches triton.language anew for each call of a function, which takes half of its time."""
    languages = {id(triton.language), id(triton.language.core)}
    found = frozenset(languages & {id(value) for value in fn.__globals__.values()})
    if found not in _patched:
        _patch_language(fn)
        _patched.add(found)
    return _Kept()


if not torch.cuda.is_available():
    interpreter._patch_lang = _patch_language_once
    # each sum is otherwise checked for overflow by a wider one: a quarter of the time
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests' tensors are."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread; on a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
