"""Access tokens: of the environment and of saved logins, in whatever a command prints and in every file that it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import write_pairs
from hub_server import Echo, serve

import lite_dil as dil
from lite_dil.api.telling import Logged
from lite_dil.base import html
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.redaction import redacted
from lite_dil.cli.main import main
from lite_dil.cli.progress import Terminal

ODD = "not-of-the-usual-form"
USUAL = "hf_" + "aBcDeFgHiJ" * 3


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the variables nor the home folder of whoever runs the tests."""
    for name in list(os.environ):
        if name.endswith(("TOKEN", "API_KEY")):
            monkeypatch.delenv(name)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "NETRC", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SMTP_PASSWORD"]
)
def test_a_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"the server says: {ODD}!"
    assert redacted(text) == text
    monkeypatch.setenv(name, f"{ODD}\n")
    assert redacted(text) == "the server says: ***!"


def test_a_variable_that_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/some/token")
    monkeypatch.setenv("SKIP_PASSWORD", "true")
    assert redacted("true: /home/me/some/token") == "true: /home/me/some/token"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("huggingface/token", ODD),
        ("huggingface/stored_tokens", f"[mine]\nhf_token = {ODD}\n\n[other]\nhf_token = abc\n"),
        (".netrc", f"machine api.wandb.ai\n  login user\n  password {ODD}\n"),
    ],
)
def test_a_saved_login(file: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    path.chmod(0o600)
    assert redacted(f"{ODD} and abc") == "*** and abc"
    path.write_bytes(b"\xff\xfe\0")  # what cannot be read stops nothing
    assert redacted("the rest") == "the rest"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"token {USUAL}.", "token ***."),
        (f"api_org_{'x1' * 17}", "***"),
        (f"hf_oauth_{'ey.J-_' * 8}", "***"),
        ("authorization: Bearer abc.def-ghi/jkl=", "authorization: Bearer ***"),
        ("Authorization: Basic dXNlcjpzZWNyZXQ6bG9uZw==", "Authorization: Basic ***"),
        ("https://me:s3cret@host/x and ssh://git@host/y", "https://***@host/x and ssh://git@host/y"),
        ("https://host/f?X-Amz-Signature=12ab&part=1", "https://host/f?X-Amz-Signature=***&part=1"),
        ("https://host/f?token=12ab", "https://host/f?token=***"),
        # Names that only look a little like one.
        *[(text, text) for text in ("docs/hf_curves.json hf_hub_download", "https://host/a@b", "Basic usage", "--token")],
    ],
)
def test_what_looks_like_a_token(text: str, left: str) -> None:
    assert redacted(text) == left
    assert str(UserError(text)) == first_line(ValueError(text)) == left


COMMANDS = """
import json, sys
from lite_dil.__main__ import main
codes = []
for argv in json.loads(sys.argv[1]):
    sys.argv = ["lite-dil", *argv]
    codes.append(main())
sys.exit(0 if codes == [2] * len(codes) else f"exit codes: {codes}")
"""


@pytest.mark.parametrize(("status", "saved", "token"), [(401, False, USUAL), (400, True, ODD)])
def test_a_hub_that_repeats_the_token(status: int, saved: bool, token: str, tiny: str, tmp_path: Path) -> None:
    home = tmp_path / "huggingface"
    home.mkdir()
    if saved:
        (home / "token").write_text(token)
    data, seen, run = str(write_pairs(tmp_path / "pairs.jsonl")), list[str](), str(tmp_path / "run")
    argvs = [
        ["plan", "--model", "owner/one"],
        ["data", "owner/two", "--model", tiny],
        ["train", data, "--model", "owner/three", "--backend", "cpu", "--output-dir", run],
    ][: 1 if saved else 3]  # where the hub's library has the login from, no command knows
    with serve(Echo, status=status, seen=seen) as (address, _):
        env = (
            os.environ
            | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_DEBUG": "1"}
            | ({} if saved else {"HF_TOKEN": token})
        )
        command = [sys.executable, "-c", COMMANDS, json.dumps(argvs)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert token not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert all(f"owner/{name}" in done.stderr for name in ("one", "two", "three")[: len(argvs)])
    assert f"Bearer {token}" in seen, "it was sent"
    (home / "token").unlink(missing_ok=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


FAILS = """
import logging, warnings, lite_dil.cli.main
def fail():
    logging.getLogger("a_library").warning("logged %s", TOKEN)
    warnings.warn(f"warned {TOKEN}")
    try:
        raise OSError(f"inner {TOKEN}")
    except OSError as error:
        raise RuntimeError(f"outer {TOKEN}") from error
lite_dil.cli.main.main = fail
"""


def test_tracebacks_and_what_libraries_print() -> None:
    command = [sys.executable, "-c", f"TOKEN = {ODD!r}{FAILS}{warm.MAIN}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_TOKEN": ODD}, timeout=60)
    assert done.returncode == 1
    assert ODD not in done.stdout + done.stderr
    for text in ("logged ***", "warned ***", "OSError: inner ***", "RuntimeError: outer ***"):
        assert text in done.stderr, done.stderr


def test_what_displays_say(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", ODD)
    with caplog.at_level("INFO", "lite_dil"):
        Logged().say(f"the hub says {ODD}")
    Terminal().say(f"the hub says {ODD}")
    assert [*caplog.messages, capsys.readouterr().out] == ["the hub says ***", "the hub says ***\n"]
    assert html.text(f"the hub says {ODD}") == "the hub says ***", "in a notebook"


def test_a_run_keeps_none(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The token is in the base model's licence and in a row of the data, both of which somebody else may have written."""
    monkeypatch.setenv("HF_TOKEN", ODD)
    model, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    shutil.copytree(tiny, model)
    (model / "README.md").write_text(f"---\nlicense: other\nlicense_name: of {ODD}\n---\n")
    rows = [{"prompt": f"{word} {ODD} is", "chosen": " this", "rejected": " that"} for word in "abcdefgh"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    flags: list[Any] = ["--model", model, "--backend", "cpu", "--max-steps", 1, "--eval-data", data, "--report-samples", 2]
    assert main([*map(str, ("train", data, *flags, "--output-dir", run))]) == 0
    said = capsys.readouterr()
    assert ODD not in said.out + said.err
    page, card = (run / "report.html").read_text(), (run / "adapter" / "README.md").read_text()
    assert " *** is" in page and "of ***" in card
    for path in (*run.glob("*.html"), *run.glob("*.yaml"), *run.rglob("*.md"), run / "metrics.jsonl", run / "report.json"):
        assert ODD not in path.read_text(), path


def test_an_option_that_holds_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its value would be in the run's config.yaml, and hidden there it could not be resumed."""
    for argv in (
        ["train", "--data", f"https://me:{USUAL}@host/prefs.jsonl"],
        ["plan", "--model", f"./{USUAL}"],
        ["train", "--output-dir", str(tmp_path / USUAL)],
    ):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert "holds an access token" in said and argv[1] in said and USUAL not in said
    with pytest.raises(dil.UserError, match=r"--model holds an access token"):
        dil.load(f"./{USUAL}")
    assert not list(tmp_path.iterdir())
