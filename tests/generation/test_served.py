"""Answers drawn by a server: a small one of vLLM's kind on this machine that really draws, with transformers and PEFT."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, bare_model
from peft import PeftModel
from trainings import run

from lite_dil.cli.main import main
from lite_dil.models.find import cache_dir


class Server(BaseHTTPRequestHandler):
    model: Any  # a PeftModel, once an adapter was loaded
    base: str
    posts: list[tuple[str, dict[str, Any]]]
    given: list[list[int]]
    stale = False  # serve the first adapter for ever
    unloads = True
    change: Callable[[dict[str, Any]], object] = staticmethod(lambda choice: choice)  # what is returned for a choice
    one = threading.Lock()  # a model is not safe in several threads

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        kind.posts.append((self.path, asked))
        if self.path == "/v1/load_lora_adapter":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                if kind.model is None:
                    kind.model = PeftModel.from_pretrained(bare_model(kind.base), asked["lora_path"], asked["lora_name"])
                elif not kind.stale:
                    kind.model.load_adapter(asked["lora_path"], asked["lora_name"])
            self._send(200, b"Success")
        elif self.path == "/v1/unload_lora_adapter":
            self._send(*(200, b"Success") if kind.unloads else (500, b"no such thing"))
        else:
            with kind.one:
                choices = [kind.change(self._choice(asked, i)) for i in range(asked["n"])]
            self._send(200, json.dumps({"choices": choices}).encode())

    @torch.no_grad()
    def _choice(self, asked: dict[str, Any], index: int) -> dict[str, Any]:
        kind = type(self)
        if not kind.stale:
            kind.model.set_adapter(asked["model"])
        draw, ids, logps = np.random.default_rng([asked["seed"], index]), list[int](), list[float]()
        while len(ids) < asked["max_tokens"] and not set(ids) & set(asked["stop_token_ids"]):
            found = kind.model(torch.tensor([asked["prompt"] + ids])).logits[0, -1].double().log_softmax(-1).numpy()
            ids.append(int(draw.choice(len(found), p=np.exp(found) / np.exp(found).sum())))
            logps.append(float(found[ids[-1]]))
        kind.given.append(ids)
        ended = ids[-1] in asked["stop_token_ids"]
        choice = {"index": index, "text": "?", "finish_reason": "stop" if ended else "length"}
        return {**choice, "token_ids": ids, "logprobs": {"token_logprobs": logps}}

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tiny: str) -> Iterator[tuple[str, type[Server]]]:
    kind = type("Own", (Server,), {"model": None, "base": tiny, "posts": [], "given": []})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_address[1]}", kind
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.fixture
def flags(tiny: str, tmp_path: Path) -> list[str]:
    data, code = tmp_path / "questions.jsonl", tmp_path / "rewards.py"
    data.write_text("".join(json.dumps({"prompt": " ".join(WORDS[at : at + 3])}) + "\n" for at in range(4)))
    code.write_text("def vowels(completions, **_):\n    return [sum(c in 'ae' for c in text) for text in completions]\n")
    own = ["--model", tiny, "--data", str(data), "--reward", f"{code}:vowels"]
    text = """--backend cpu --dtype float32 --loss rloo --samples 3 --max-new-tokens 5 --refill 0 --batch-size 2 --max-steps 3
        --gradient-accumulation-steps 1 --learning-rate 0.3 --warmup-ratio 0 --logging-steps 1 --report-samples 0"""
    return [*own, *text.split()]


def test_a_run_on_the_answers_of_a_server(flags: list[str], server: tuple[str, type[Server]], tmp_path: Path) -> None:
    url, kind = server
    lines = run([*flags, "--sampler", url], tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert sorted(row["ids"] for row in rows) == sorted(kind.given)
    # The adapter of each step, loaded before its answers; each was dropped when the next was there, the last at the end.
    names = [asked["lora_name"] for path, asked in kind.posts if path.endswith("/load_lora_adapter")]
    assert len(set(names)) == 3 and names == [a["lora_name"] for path, a in kind.posts if path.endswith("unload_lora_adapter")]
    assert [a["model"] for path, a in kind.posts if path.endswith("completions")] == [name for name in names for _ in range(6)]
    assert not any((cache_dir() / "served").iterdir())
    asked = [a for path, a in kind.posts if path.endswith("completions")]
    assert {(a["n"], a["max_tokens"], a["temperature"], a["top_p"], a["top_k"]) for a in asked} == {(1, 5, 1, 1, -1)}
    assert sorted(row["seed"] % 2**31 for row in rows) == sorted(a["seed"] for a in asked)
    assert all(row["log_ratio"] == 0 for row in rows[:6]) and any(row["log_ratio"] != 0 for row in rows[6:])
    assert lines[-1]["grad_norm"] > 0


def _with(**changed: Any) -> Callable[[dict[str, Any]], object]:
    """Return a change of a choice: each named field through its function."""
    return lambda choice: choice | {name: change(choice[name]) for name, change in changed.items()}


def _logps(change: Callable[[list[float]], object]) -> Callable[[dict[str, Any]], object]:
    return _with(logprobs=lambda logprobs: {"token_logprobs": change(logprobs["token_logprobs"])})


def _shorter(choice: dict[str, Any]) -> dict[str, Any]:
    """Cut a choice before its limit, which it says it has reached."""
    few = {"token_ids": [token for token in choice["token_ids"][:2] if token > 2], "finish_reason": "length"}
    few["token_ids"] = few["token_ids"] or [5]
    return choice | few | {"logprobs": {"token_logprobs": [-1.0] * len(few["token_ids"])}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda choice: {"text": choice["text"]}, "no token_ids"),
        (lambda choice: "text", "expected `choices` with one object"),
        (_with(token_ids=lambda ids: ["1"] * len(ids)), "no token_ids"),
        (_with(token_ids=lambda ids: [-1, *ids[1:]]), "token -1 is not one of the model's"),
        (_with(token_ids=lambda ids: [10**6, *ids[1:]]), "token 1000000 is not one of the model's"),
        (
            _with(token_ids=lambda ids: [5] * 6, logprobs=lambda _: {"token_logprobs": [-1.0] * 6}),
            "nor is as long as max_tokens 5",
        ),
        (_shorter, "nor is as long as max_tokens 5"),
        (_with(logprobs=lambda _: None), "with one finite number for each token"),
        (_with(logprobs=lambda _: [-1.0]), "with one finite number for each token"),
        (_logps(lambda logps: logps[1:]), "with one finite number for each token"),
        (_logps(lambda logps: [float("nan"), *logps[1:]]), "with one finite number for each token"),
        (_logps(lambda logps: [float("-inf"), *logps[1:]]), "with one finite number for each token"),
        (_logps(lambda logps: [value - 0.2 for value in logps]), "differ from the policy's by 0.2 nats"),
    ],
)
def test_a_choice_that_cannot_be_the_policys_is_refused(
    flags: list[str],
    server: tuple[str, type[Server]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    said: str,
) -> None:
    url, kind = server
    kind.change = staticmethod(change)
    assert main(["train", *flags, "--sampler", url, "--output-dir", str(tmp_path / "run")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    # The adapter has been dropped, although no step was taken.
    assert [path for path, _ in kind.posts if path.endswith("adapter")] == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    assert not any((cache_dir() / "served").iterdir())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("stale", "its log-probs differ from the policy's by"),
        ("gone", "cannot be reached"),
        ("unloads", "/v1/unload_lora_adapter answers 500: no such thing"),
    ],
)
def test_a_server_that_fails_is_named(
    flags: list[str],
    server: tuple[str, type[Server]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    said: str,
) -> None:
    url, kind = server
    setattr(kind, fault, fault != "unloads")
    url = "http://127.0.0.1:9" if fault == "gone" else url
    assert main(["train", *flags, "--sampler", url, "--output-dir", str(tmp_path / "run")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not any((cache_dir() / "served").iterdir())
