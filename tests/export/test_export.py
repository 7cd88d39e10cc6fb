"""lite-dil export as a command: what it refuses, leaves and uploads; GGUF and Ollama folders."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from gguf import GGUFReader
from test_gguf import needs_llama_cpp, read_by
from trainings import export

from lite_dil.cli.main import main
from lite_dil.export import exporting, merge
from lite_dil.models import adapter_files

Trainer = Callable[..., Path]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "merged", "--to", "peft"], "--to is for --format adapter; leave it out with merged"),
        (["--format", "adapter", "--dtype", "float16"], "--dtype is for --format merged and mlx"),
        (["--format", "merged", "--bits", "4"], "--bits is for --format mlx"),
        (["--format", "merged", "--check-rows", "0"], "expected at least 1; --no-check skips the check"),
        (["--format", "merged", "--no-check", "--check-rows", "3"], "--no-check skips the check"),
        (["--format", "merged", "--no-check", "--push-to-hub", "a/b"], "--push-to-hub uploads only what passed the check"),
        (["--format", "merged", "--private"], "--private needs --push-to-hub"),
        (["--format", "gguf", "--outtype", "q9"], "--outtype q9: expected one of f32"),
        (["--format", "gguf", "--outtype", "q4_k_m"], "--outtype q4_k_m (did you mean 'q4_K_M'?): expected one of f32"),
        (["--format", "merged", "--check-data", "none.jsonl"], "none.jsonl: no such file"),
        (["--format", "merged", "--strength", "2"], "--strength 2"),
    ],
)
def test_user_errors(flags: list[str], message: str, tiny: str, trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    assert main(["export", "--adapter", str(run), "--output", str(tmp_path / "out"), *flags]) == 2
    told = capsys.readouterr().err
    assert message in told and " on CPU" not in told, "a model was loaded before"
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left"


def test_nothing_is_overwritten_and_nothing_half_made_is_left(
    tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    command = ["export", "--adapter", str(run), "--format", "merged", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "already" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(merge.tensors, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*command, str(tmp_path / "new")]) == 130
    with monkeypatch.context() as patch:
        patch.setattr(exporting.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        assert main([*command, str(tmp_path / "new")]) == 2
    assert "0.0 GB" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".", "..", "link", "file/below"])
def test_where_nothing_can_be_made_is_told_before_the_work(
    name: str, tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    assert main(["export", "--adapter", str(run), "--format", "merged", "--output", name]) == 2
    assert ("cannot be written (" if name == "file/below" else "expected the name of a new folder") in capsys.readouterr().err


def test_a_program_that_is_ended_leaves_nothing(tiny: str, trained: Trainer, tmp_path: Path) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    code = (
        "import os, signal, sys; from lite_dil.export import merge; from lite_dil.cli.main import main;"
        "merge.write = lambda *_: os.kill(os.getpid(), signal.SIGTERM); sys.exit(main(sys.argv[1:]))"
    )
    command = ["export", "--adapter", str(run), "--format", "merged", "--output", str(tmp_path / "out")]
    out = warm.run(*command, code=code)
    assert out.returncode == 143 and "Traceback" not in out.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_check_says_so(tiny: str, trained: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    report = export(run, tmp_path / "out", "--format", "merged", "--no-check")
    assert report["check"] is None
    assert "--no-check" in capsys.readouterr().out


# ---- gguf and ollama ----


@pytest.mark.parametrize("format", ["gguf", "ollama"])
def test_gguf(format: str, backend_name: str, tiny: str, trained: Trainer, tmp_path: Path) -> None:
    run = trained("--model", tiny, "--backend", backend_name)
    output = tmp_path / "merged"  # as the folder on the way is called
    report = export(run, output, "--format", format, "--outtype", "f32")
    assert report["check"]["mean"] < 1e-2
    modelfile = ["Modelfile"] if format == "ollama" else []
    assert sorted(path.name for path in output.iterdir()) == [*modelfile, "README.md", "export.json", "merged.gguf"]


@needs_llama_cpp
def test_llama_cpp_quantises(tiny: str, trained: Trainer, tmp_path: Path) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    report = export(run, tmp_path / "small", "--format", "gguf", "--outtype", "q4_K_M")
    assert report["check"]["ok"] and report["outtype"] == "q4_K_M" and 0 < report["check"]["mean"] < 1
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["README.md", "export.json", "small.gguf"]
    file = GGUFReader(tmp_path / "small" / "small.gguf")
    assert file.fields["general.file_type"].contents() == 15 and file.fields["general.name"].contents() == "small"
    # Rows of 64 numbers are too short for its blocks of 256, in place of which llama.cpp takes these.
    types = {tensor.tensor_type.name for tensor in file.tensors if "norm" not in tensor.name}
    assert types <= {"Q5_0", "Q8_0", "Q4_K", "Q6_K"} and "Q5_0" in types


def test_where_llama_cpp_is_missing_the_command_is_said(
    tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    read_by("transformers", monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    run = trained("--model", tiny, "--backend", "cpu")
    command = ["export", "--adapter", str(run), "--format", "gguf", "--output", str(tmp_path / "x"), "--outtype", "q4_K_M"]
    assert main(command) == 2
    assert "llama-quantize MODEL.gguf MODEL-q4_K_M.gguf Q4_K_M" in capsys.readouterr().err
    # A program of that name: what it is called with, and that its file is read and checked.
    program = tmp_path / "llama-quantize"
    copies = 'import shutil, sys\nassert sys.argv[3] == "Q4_K_M"\nshutil.copy(*sys.argv[1:3])\n'
    program.write_text(f"#!{sys.executable}\n{copies}")
    program.chmod(0o755)
    assert main(command) == 0
    assert "quantising to q4_K_M with llama.cpp" in capsys.readouterr().out
    program.write_text(f'#!{sys.executable}\nraise SystemExit("no such type")\n')
    assert main([*command[:-3], str(tmp_path / "y"), *command[-2:]]) == 2
    told = capsys.readouterr().err
    assert "llama-quantize failed (exit code 1)" in told and "no such type" in told


def test_the_modelfile_has_the_models_own_sampling(tiny: str, trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(own))
    run = trained("--model", tiny, "--backend", "cpu")
    export(run, tmp_path / "My model", "--format", "ollama", "--model", str(model), "--no-check")
    text = (tmp_path / "My model" / "Modelfile").read_text()
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 20\n" in text
    assert f'cd "{tmp_path}/My model"\n  ollama create my-model -f Modelfile' in capsys.readouterr().out
    export(run, tmp_path / "ollama", "--format", "ollama", "--model", str(model), "--no-check")
    assert "ollama create out -f Modelfile" in capsys.readouterr().out, "the name of the run's folder"
    assert (tmp_path / "ollama" / "out.gguf").is_file()


def test_what_cannot_be_a_gguf_or_an_ollama_model_is_told_before_the_work(
    tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = trained("--model", tiny, "--backend", "cpu")
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    monkeypatch.setattr(exporting.policies, "load", lambda *_: pytest.fail("the model was loaded"))

    def refused(format: str, *flags: str) -> str:
        command = ["export", "--adapter", str(run), "--model", str(model), "--output", str(tmp_path / "out"), *flags]
        assert main([*command, "--format", format]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        return capsys.readouterr().err

    assert "no convert_hf_to_gguf.py there" in refused("gguf", "--llama-cpp", str(tmp_path))
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert "Ollama" in (told := refused("ollama")) and "message" in told
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert "hidden_act = 'gelu'" in refused("gguf")


# ---- the hub ----


def test_what_was_made_is_uploaded_after_its_check(
    tiny: str, trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The upload itself is tested in test_push.py; here, that it is asked for what passed, and for nothing else."""
    from lite_dil.export import push as hub

    run, pushed = trained("--model", tiny, "--backend", "cpu"), []
    monkeypatch.setattr(hub, "check", lambda repo: None)
    monkeypatch.setattr(hub, "push", lambda folder, repo, private, say: pushed.append((folder, repo, private)) or "URL")
    flags = ["--push-to-hub", "owner/name", "--private"]
    for format in ("merged", "adapter"):
        export(
            run,
            tmp_path / format,
            "--format",
            format,
            "--to" if format == "adapter" else "--dtype",
            *(["peft"] if format == "adapter" else ["float32"]),
            *flags,
        )
        assert pushed.pop() == (tmp_path / format, "owner/name", True)
        assert {
            path.relative_to(tmp_path / format).as_posix() for path in (tmp_path / format).rglob("*") if path.is_file()
        } == set(hub._files(tmp_path / format)), "nothing is made that is not published"
        for file in (tmp_path / format).rglob("*"):
            assert not file.is_file() or tiny.encode() not in file.read_bytes(), f"{file} tells of a folder of this machine"
    right = adapter_files.float_adapter
    monkeypatch.setattr(adapter_files, "float_adapter", lambda files, strength: right(files, 0.0))
    assert main(["export", "--adapter", str(run), "--format", "merged", "--output", str(tmp_path / "x"), *flags]) == 1
    assert not pushed
