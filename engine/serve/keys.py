"""Who may use a server: API keys of a file, and the name that scheduling knows each by."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from spark_llm.errors import LlmError

_LEAST_CHARACTERS = 16


class ApiKeys:
    """The keys of ``path``: a line for each, the key alone or after its holder's name; ``#`` begins a comment.

    Only their digests are kept. path None: everyone may. Raises LLM_INVALID_ARGUMENT.
    """

    def __init__(self, path: Path | None) -> None:
        self._names: dict[bytes, str] | None = None
        if path is None:
            return
        self._names = {}
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _invalid(path, "a file of keys that can be read") from error
        for line in lines:
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) > 2 or len(words[-1]) < _LEAST_CHARACTERS:
                raise _invalid(
                    path, f"lines of a key, or of a name and a key, of {_LEAST_CHARACTERS} characters or more"
                )
            self._names[_digest(words[-1])] = words[0] if len(words) == 2 else f"key-{len(self._names) + 1}"
        if not self._names:
            raise _invalid(path, "a file with at least one key")

    def holder(self, authorization: str) -> str | None:
        """Who sent a header ``Authorization``; None: nobody who may. "" where everyone may."""
        if self._names is None:
            return ""
        scheme, _, key = authorization.partition(" ")
        shown = _digest(key.strip())
        # all are compared, each in constant time: how long it takes tells nothing
        found = [name for digest, name in self._names.items() if hmac.compare_digest(digest, shown)]
        return found[0] if found and scheme.lower() == "bearer" else None

    def reached_as(self, host: str) -> bool:
        """May a request's ``Host`` be this? Without keys only a name of this host: a page whose own name was made to
        point here (DNS rebinding) is not to use the model through its reader's browser."""
        if self._names is not None:
            return True
        try:
            return _is_loopback(urlsplit(f"//{host}").hostname or "")
        except ValueError:  # no name of any host
            return False

    def check_host(self, host: str) -> None:
        """Raises LLM_SERVE_NEEDS_KEY where others than this host's users could come in without a key."""
        if self._names is None and not _is_loopback(host):
            raise LlmError("LLM_SERVE_NEEDS_KEY", host=host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _invalid(path: Path, expected: str) -> LlmError:
    return LlmError("LLM_INVALID_ARGUMENT", argument="--api-key-file", value=repr(str(path)), expected=expected)
