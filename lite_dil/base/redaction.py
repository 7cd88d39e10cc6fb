"""Hide access tokens in every text that leaves the program: messages, logs, tracebacks, reports and cards."""

from __future__ import annotations

import netrc
import os
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

HIDDEN = "***"
# Variables such as HF_TOKEN, HUGGING_FACE_HUB_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY; not HF_TOKEN_PATH.
_NAMES = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "APIKEY", "ACCESS_KEY", "PRIVATE_KEY", "SECRET_KEY")
_LEAST = 12  # characters: shorter values are switches or ordinary words, and real tokens are longer
_SHAPES = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"
    r"|\bhf_(?:oauth|jwt)_[\w.-]{20,}"
    r"|\bwandb_v\d_\w{20,}"
    r"|(?<=Bearer )(?=[\w.~+/=-]*\d)[\w.~+/=-]{12,}"  # with a digit: neither is a token without, but English
    r"|(?<=Basic )(?=[\w+/=]*\d)[\w+/=]{16,}"
    r"|(?<=authorization: Bearer )[\w.~+/=-]{12,}|(?<=authorization: Basic )[\w+/=]{12,}"
    r"|(?<=://)[^/?#@\s:]*:[^/?#@\s]+(?=@)"  # https://user:token@host
    r"|(?<=://)[^/?#@\s:]{12,}(?=@)"  # https://token@host
    # Signed addresses of large files.
    r"|(?<=[?&])(?P<key>[\w-]*(?:token|signature|credential|password|secret|api[_-]?key))=[^&\s'\")]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Return a text without this process's secrets, and without anything in the shape of one.

    Known are the values of variables whose names end like HF_TOKEN or WANDB_API_KEY, the logins of the Hugging Face hub, and
    the passwords in ~/.netrc, where `wandb login` puts its key. All are read at every call, since a login may come late.
    """
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _SHAPES.sub(_hide, text)


def _hide(found: re.Match[str]) -> str:
    return f"{found['key']}={HIDDEN}" if found["key"] else HIDDEN


def _known() -> set[str]:
    found = {value for name, value in os.environ.items() if name.upper().endswith(_NAMES)}
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    for variable, place in (
        ("HF_TOKEN_PATH", os.path.join(home, "token")),
        ("HF_STORED_TOKENS_PATH", os.path.join(home, "stored_tokens")),
        ("NETRC", "~/.netrc"),
    ):
        path = os.path.expanduser(os.environ.get(variable) or place)
        with suppress(OSError):
            found |= _saved(path, variable == "NETRC", os.stat(path).st_mtime_ns)
    return {line.strip() for value in found for line in value.splitlines() if len(line.strip()) >= _LEAST}


@lru_cache(maxsize=8)
def _saved(path: str, passwords: bool, changed: int) -> frozenset[str]:
    """Return the secrets in a file, one a line or behind its "="; `changed` is when it was written, for the cache alone."""
    try:
        if passwords:
            return frozenset(login[2] or "" for login in netrc.netrc(path).hosts.values())
        return frozenset(line.rpartition("=")[2] for line in Path(path).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return frozenset()


class Redacted:
    """A stream for text that hides secrets in what is written to it; in all else it is `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, which must hold a secret whole for it to be found; return its length."""
        self._stream.write(redacted(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
