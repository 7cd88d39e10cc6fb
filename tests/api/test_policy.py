"""dil.load and Policy: against the backend's own passes, transformers, and a second load."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bare_model
from transformers import AutoTokenizer

import lite_dil as dil

ASKED = [{"role": "user", "content": "what is tea"}]


@pytest.fixture
def policy(tiny: str, backend_name: str) -> dil.Policy:
    return dil.load(tiny, backend=backend_name, dtype="float32", lora_r=4, seed=3)


def disturb(policy: dil.Policy, size: float = 0.05) -> None:
    """Change the adapter's weights as training would."""
    if policy.backend.name == "mlx":
        import mlx.core as mx
        from mlx.utils import tree_map

        model = policy.backend.model  # type: ignore[attr-defined]
        model.update(tree_map(lambda value: value + size * mx.ones_like(value), model.trainable_parameters()))
        return
    with torch.no_grad():
        for weight in policy.backend.adapters["policy"].weights.values():  # type: ignore[attr-defined]
            weight += size


def weights(folder: Path) -> dict[str, np.ndarray]:
    from trainings import weights as read

    return read(folder)


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Names come when they are used; what each is of is the same object as in its own module."""
    code = (
        "import sys, lite_dil as dil\n"
        "heavy = {'numpy', 'torch', 'mlx', 'transformers', 'rich', 'yaml', 'lite_dil.config', 'lite_dil.generation'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert set(dil.__all__) <= set(dir(dil))\n"
        "for name in dil.__all__: getattr(dil, name)\n"
        "import logging\n"
        "assert isinstance(logging.getLogger('lite_dil').handlers[0], logging.NullHandler)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not hasattr(dil, "lode")


def test_logps_are_those_of_the_rendered_conversation(policy: dil.Policy, tiny: str) -> None:
    """The oracle renders by transformers' own template and takes whole logits."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), bare_model(tiny)

    def oracle(response: str) -> float:
        prompt = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
        start = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        ids = tokenizer(prompt + response + "<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
        assert torch.equal(ids[:, : start.shape[1]], start)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return float(logps[start.shape[1] - 1 :].sum())

    expected = [oracle("good bread"), oracle("a small red house")]
    np.testing.assert_allclose(policy.logps(ASKED, ["good bread", "a small red house"]), expected, atol=1e-3)
    np.testing.assert_allclose(policy.logps(["what is tea"] * 2, ["good bread", "a small red house"]), expected, atol=1e-3)
    assert policy.logps("what is tea", "good bread") == pytest.approx(expected[0], abs=1e-3)
    with pytest.raises(dil.UserError, match="2 prompts and 1 responses"):
        policy.logps(["what", "is"], ["tea"])


def test_the_reference_is_the_adapter_off(policy: dil.Policy) -> None:
    assert policy.log_ratio("what is tea", "good bread") == 0
    before = policy.logps("what is tea", "good bread")
    disturb(policy)
    after = policy.logps("what is tea", "good bread")
    with policy.as_reference():
        assert policy.logps("what is tea", "good bread") == before
        inside = policy.log_ratio("what is tea", "good bread")
    assert policy.logps("what is tea", "good bread") == after
    assert policy.log_ratio(["what is tea"], ["good bread"]) == [inside] == [pytest.approx(after - before, abs=1e-9)]
    assert inside != 0


def test_answers(policy: dil.Policy) -> None:
    """A prompt's draw is its own; a stream says what generate says; several answers are a list a prompt."""
    draw = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5}
    one, two = policy.generate(["what is tea", "how do I make bread"], **draw)  # type: ignore[call-overload]
    assert policy.generate("what is tea", **draw) == one  # type: ignore[call-overload]
    assert "".join(policy.stream(ASKED, **draw)).strip() == one  # type: ignore[arg-type]
    several = policy.generate(ASKED, n=3, **draw)  # type: ignore[call-overload]
    assert several[0] == one and len(set(several)) == 3
    assert [row[0] for row in policy.generate(["what is tea", "how do I make bread"], n=1, **draw)] == [one, two]  # type: ignore
    stream = policy.stream("what is tea", max_new_tokens=8)
    disturb(policy, 0.3)
    with policy.as_reference():  # a stream goes on as what it began as
        reference = policy.generate("what is tea", max_new_tokens=8)
        said = "".join(stream).strip()
    assert said == policy.generate("what is tea", max_new_tokens=8) != reference
    with pytest.raises(dil.UserError, match="at temperature 0 are all the same"):
        policy.generate("what is tea", n=2)


def test_fresh_is_a_second_load(policy: dil.Policy, tiny: str, tmp_path: Path) -> None:
    """To the last bit; and what is saved is loaded again, as it was."""
    policy.save(tmp_path / "first")
    disturb(policy)
    saved = policy.save(tmp_path / "changed")
    ratio = policy.log_ratio("what is tea", "good bread")
    fresh = policy.fresh().save(tmp_path / "fresh")
    first, again, changed = weights(tmp_path / "first"), weights(fresh), weights(saved)
    assert all(np.array_equal(first[name], again[name]) and not np.array_equal(first[name], changed[name]) for name in first)
    assert policy.log_ratio("what is tea", "good bread") == 0
    with dil.load(adapter=saved, backend=policy.backend.name, dtype="float32", trainable=False) as other:
        assert other.log_ratio("what is tea", "good bread") == pytest.approx(ratio, abs=1e-4)
        with pytest.raises(dil.UserError, match="for inference"):
            other.fresh()
    with pytest.raises(dil.UserError, match="already exists"):
        policy.save(saved)


def test_closing_gives_the_memory_back(tiny: str, backend_name: str, tmp_path: Path) -> None:
    """Also where its run is still at hand."""
    rows = [{"prompt": f"what is {i}", "chosen": "tea", "rejected": "bread"} for i in range(4)]
    with dil.load(tiny, backend=backend_name, dtype="float32", lora_r=4) as policy:
        policy.generate("tea", max_new_tokens=2)
        assert list(policy.stream("tea", max_new_tokens=2)) is not None
        policy.log_ratio("tea", "bread")
        run = dil.train(policy, rows, max_steps=1, report_samples=0, output_dir=tmp_path / "run")
        held = weakref.ref(policy.backend), weakref.ref(policy.backend.model)  # type: ignore[attr-defined]
    gc.collect()
    assert [ref() for ref in held] == [None, None] and run.policy is policy
    policy.close()
    assert "closed" in repr(policy)
    with pytest.raises(dil.UserError, match="was closed"):
        policy.generate("tea")
    if backend_name == "mlx":
        import mlx.core as mx

        gc.collect()
        before = mx.get_active_memory()
        with dil.load(tiny, backend="mlx", dtype="float32"):
            assert mx.get_active_memory() > before + 2**18
        assert mx.get_active_memory() <= before + 2**16


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 8}, "bits is 8; expected 4"),
        ({"learning_rate": 1e-4}, "learning_rate is for training; give it to dil.train"),
        ({"layuot": "plain"}, "unknown option 'layuot' .did you mean 'layout'"),
        ({"reference": "base"}, "without one the reference is the base"),
        ({"lora_r": 0}, "--lora-r is 0; expected between 1 and 1024"),
        ({"trainable": False, "lora_r": 4}, "lora_r: only for training"),
    ],
)
def test_options_that_cannot_be(tiny: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(dil.UserError, match=said):
        dil.load(tiny, **given)  # type: ignore[arg-type]
