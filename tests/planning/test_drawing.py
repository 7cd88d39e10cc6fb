"""What plan says drawing answers needs, against the measured peak of live bytes, and a plan of an on-policy run."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config
from live_bytes import mlx_peak_bytes, nothing, peak_bytes, random_examples
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from lite_dil.backends import registry
from lite_dil.backends.torch.classifier import Classifier
from lite_dil.backends.types import MicroBatch
from lite_dil.base.errors import UserError
from lite_dil.base.memory import GIB, Memory
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.data.encoder import Example
from lite_dil.models.shape import ModelShape, read_shape
from lite_dil.online.loss import POLICY_GRADIENT
from lite_dil.planning import auto
from lite_dil.planning.drawing import Drawing
from lite_dil.planning.estimate import Load
from lite_dil.planning.estimate_mlx import MLXStep
from lite_dil.planning.peak import estimate
from lite_dil.planning.reward_models import reward_bytes, rewarding_bytes, uncounted

ONLINE: dict[str, Any] = {"loss": "rloo", "reward": "answer:number", "samples": 8, "max_new_tokens": 40, "max_length": 300}


@pytest.mark.parametrize(
    ("backend_name", "options"), [("cpu", {}), ("cpu", {"dtype": "bfloat16", "load_in_4bit": True}), ("mlx", {})]
)
def test_drawing_is_within_a_few_percent(llama: str, backend_name: str, options: dict[str, Any]) -> None:
    made = config(**ONLINE, model=llama, batch_size=2, gradient_accumulation_steps=1, optim="adamw", **options)
    peak = peak_bytes if backend_name == "cpu" else mlx_peak_bytes
    gc.collect()
    before = peak(nothing)
    backend = registry.load(backend_name, made, llama, made, made)
    part = Batch.of(random_examples(Load((9,), ((5, 5),)), 2048))
    backend.step([MicroBatch(part, {"weights": torch.ones(2).numpy()})], POLICY_GRADIENT, 1e-5)  # the optimiser's state
    drawing = Drawing.of(made)
    assert (drawing.answers, drawing.prompts, drawing.prompt, drawing.tokens) == (16, 2, 260, 40)
    prompts = [[3 + (7 * i + 11 * j) % 2000 for j in range(260 - i)] for i in range(2)]  # of unequal lengths
    found: list[Any] = []
    measured = (
        peak(lambda: found.extend(backend.generate([p for p in prompts for _ in range(8)], 40, [2047], range(16)))) - before
    )
    assert min(len(one.ids) for one in found) > 30
    if backend_name == "mlx":
        said = MLXStep(made, read_shape(llama), backend.dtype_name, Load.worst(made), metal=False).estimate()
    else:
        said = estimate(made, read_shape(llama), backend_name, backend.dtype_name, Load.worst(made))
    ratio = dict(said.phases)["drawing answers"] / measured
    print(f"{ratio:.3f} of {measured / 2**20:.1f} MiB")
    assert ratio == pytest.approx(1, abs=0.05)


def test_the_largest_pass_of_drawn_answers() -> None:
    made = config(**{**ONLINE, "batch_size": 4})
    assert Load.worst(made).responses == ((40,) * 8, (40,) * 7)  # 600 tokens
    assert Load.worst(config(**ONLINE, batch_size=1)).responses == ((40,) * 8,)
    assert Load.worst(config(**ONLINE, batch_size=4, row_tokens=30)).responses == ((40,),)


def test_an_8b_models_keys_and_values_by_pencil() -> None:
    made = config(**{**ONLINE, "max_new_tokens": 256, "max_length": 1024, "batch_size": 4, "gradient_accumulation_steps": 4})
    drawing = Drawing.of(made)
    assert (drawing.answers, drawing.prompts) == (16, 2)  # 16 x 1024 tokens are eight rows of 2048
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    shape = ModelShape.of({**llama, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256})
    assert drawing.on_torch(shape, 2)["cache"] == 16 * 1023 * 2 * 8 * 128 * 32 * 2


def test_plan_of_an_on_policy_run(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + 1?", "answer": n + 1}) + "\n" for n in range(6)))
    flags = (
        f"--model {llama} --backend cpu --loss rloo --reward answer:number --samples 8 --max-new-tokens 40 --max-length 300"
    )
    flags += f" --data {data} --batch-size 2 --gradient-accumulation-steps 1 --num-iterations 2"
    assert main(["plan", *flags.split(), "--memory", "4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Drawn at once: 16 answers of at most 40 tokens, to prompts of at most 260." in said
    assert "The largest pass: 15 answers of 40 tokens to 2 prompts" in said
    assert "Steps: 6, over 6 examples an epoch" in said  # three sets of answers, two steps on each
    # With as many keys as queries they take more than training does.
    wide = json.loads((Path(llama) / "config.json").read_text()) | {"num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    other = [*flags.replace(llama, str(tmp_path)).split(), "--gradient-checkpointing", "full", "--dtype", "float32"]
    assert main(["plan", *other, "--memory", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["components"]["cache"] == 2 * 4 * 16 * 299 * 256 * 4
    assert main(["plan", *other, "--memory", "4"]) == 0
    assert "drawn answers" in (said := capsys.readouterr().out) and "their keys and values" in said
    assert main(["plan", *flags.split(), "--memory", "4", "--tokens-per-second", "9"]) == 2
    assert "an on-policy run with --like" in " ".join(capsys.readouterr().err.split())


def test_auto_splits_a_step_so_that_drawing_fits(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(**{**ONLINE, "max_length": 2000}, model=llama, backend="cpu", dtype="float32", batch_size=16, optim="adamw")
    prompts = [Example(tuple(range(200)), (), (), "here")]

    def chosen(gigabytes: float) -> Any:
        monkeypatch.setattr(auto, "memory_here", lambda backend: Memory(int(gigabytes * GIB), "a test"))
        return auto.fitted(made, prompts, frozenset())[0]

    # At least 33 MiB are needed for a group of eight, and 26 for a single answer.
    large, small = chosen(1), chosen(0.029)
    assert large.max_length == small.max_length == 2000
    assert (large.row_tokens, small.row_tokens) == (200 + 8 * 40, 200 + 40)
    with pytest.raises(UserError, match="GB are needed"):
        chosen(0.01)


def test_models_that_reward_are_counted(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head's adapter in float32 by its run, a classifier in the type of the computation; others are named."""
    (tmp_path / "rm" / "adapter").mkdir(parents=True)
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "rm" / "adapter" / "adapter_model.safetensors")
    save_file({"score": torch.zeros(11)}, tmp_path / "rm" / "adapter" / "head.safetensors")
    reward = f"answer:number,{tmp_path / 'rm'}"
    made = config(**ONLINE | {"reward": reward, "eval_reward": f"hf:{llama}"}, model=llama, dtype="bfloat16")
    weights = sum(each.numel() for path in Path(llama).glob("*.safetensors") for each in load_file(path).values())
    assert reward_bytes(made, 2) == 4 * (15 + 7 + 11) + 2 * weights and not uncounted(made)
    assert estimate(made, read_shape(llama), "cpu", "bfloat16", Load((9,), ((5, 5),))).rewards == reward_bytes(made, 2)
    flags = ["--data", str(tmp_path / "q.jsonl"), "--model", llama, "--loss", "rloo", "--reward", f"{reward},hf:some/one"]
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "one", "answer": "1"}) + "\n")
    assert main(["plan", *flags]) == 0
    assert "Not counted: hf:some/one (its files are not here)." in " ".join(capsys.readouterr().out.split())


def test_each_weight_is_counted_once_and_a_hub_id_in_its_cache(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards beside a consolidated file; adapters in both formats; a checkpoint; the hub's cache."""
    snapshot = tmp_path / "hub" / "models--some--one" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--some--one" / "refs").mkdir()
    (tmp_path / "hub" / "models--some--one" / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text((Path(llama) / "config.json").read_text())
    save_file({"a": torch.zeros(11)}, snapshot / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(13)}, snapshot / "model-00002-of-00002.safetensors")
    save_file({"a": torch.zeros(11), "b": torch.zeros(13)}, snapshot / "consolidated.safetensors")
    names = {name: f"model-0000{at}-of-00002.safetensors" for at, name in enumerate("ab", 1)}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    adapter = tmp_path / "run" / "checkpoints" / "step-3" / "adapters" / "policy"
    adapter.mkdir(parents=True)
    for name in ("adapter_model", "adapters", "head"):
        save_file({"w": torch.zeros(17)}, adapter / f"{name}.safetensors")
    for reward, expected in (
        ("hf:some/one", 2 * 24),
        (str(adapter.parent.parent), 4 * 34),
        (f"implicit:{snapshot}", 0),  # no adapter
        ("hf:some/other", 0),
    ):
        made = config(**ONLINE | {"reward": reward}, model=llama)
        assert (reward_bytes(made, 2), bool(uncounted(made))) == (expected, not expected)
    (snapshot / "model-00002-of-00002.safetensors").unlink()  # half a download
    made = config(**ONLINE | {"reward": "hf:some/one"}, model=llama)
    assert reward_bytes(made, 2) == 0 and uncounted(made) == ["hf:some/one (its files are not here)"]


def test_a_classifiers_pass_is_within_a_few_percent(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2048, "num_labels": 1}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", **sizes, **heads, pad_token_id=1)
    ).save_pretrained(tmp_path)
    scorer = Classifier(str(tmp_path), "--reward", "cpu", "float32")
    for length, rows in ((300, 13), (1500, 2)):  # the MLP is the peak, and attention with its mask
        sequences = [[3 + (7 * i + j) % 2000 for j in range(length - i)] for i in range(rows)]
        before = peak_bytes(nothing)
        measured = peak_bytes(lambda some=sequences: scorer.scores(some)) - before
        made = config(**ONLINE | {"reward": f"hf:{tmp_path}", "max_length": length}, model=str(tmp_path), batch_size=8)
        ratio = rewarding_bytes(made, 4) / measured
        print(f"{length}: {ratio:.3f} of {measured / 2**20:.1f} MiB")
        assert 0.99 <= ratio <= 1.05
    found = estimate(made, read_shape(str(tmp_path)), "cpu", "float32", Load.worst(made))
    assert dict(found.phases)["rewarding answers"] > rewarding_bytes(made, 4)
    (tmp_path / "config.json").write_text('{"dim": 7}')
    assert uncounted(made) == [f"hf:{tmp_path} (its passes, of a kind not known here)"]
