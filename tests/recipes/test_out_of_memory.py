"""Memory that runs out at chosen points, by a real torch.OutOfMemoryError in the real code: the run goes on, the same."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import batch, config, criterion, examples, load, one_step, write_pairs
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import metrics, same_weights

from lite_dil.backends import registry
from lite_dil.backends.torch import adapters as torch_adapters
from lite_dil.backends.torch import reading as torch_reading
from lite_dil.base.errors import OutOfMemory
from lite_dil.base.halving import Halving
from lite_dil.batching.batch import Batch, by_batch
from lite_dil.batching.schedule import Limits, Schedule, computed_tokens
from lite_dil.cli.main import main


class Canary:
    """Lives as long as the activation that it is tied to."""


class Fault:
    """Runs out of memory in passes of more than `tokens` tokens, after `spared` of them; `times` times at most."""

    def __init__(self, tokens: int = 0, spared: int = 0, times: float = 1) -> None:
        self.tokens, self.spared, self.times = tokens, spared, times
        self.raised, self.canaries = 0, list[Any]()

    def __call__(self, activation: torch.Tensor | None = None) -> None:
        assert not any(canary() for canary in self.canaries), "the failed pass is still held"
        if activation is not None and activation.shape[:-1].numel() <= self.tokens:
            return
        self.spared -= 1
        if self.spared >= 0 or self.raised >= self.times:
            return
        self.raised += 1
        if activation is not None:
            activation.canary = canary = Canary()  # type: ignore[attr-defined]
            self.canaries.append(weakref.ref(canary))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def in_a_pass(backend: Any, fault: Fault, wanted: Callable[[], bool]) -> None:
    backend.decoder.layers[1].mlp.register_forward_hook(lambda module, inputs, out: fault(out) if wanted() else None)


def in_a_step(backend: Any) -> bool:
    return backend.switch.layers[0].lora_dropout.training


def is_reference(backend: Any) -> bool:
    return backend.switch.layers[0]._disable_adapters


def reference(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    in_a_pass(backend, fault, lambda: is_reference(backend))


def evaluation(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    in_a_pass(backend, fault, lambda: not (in_a_step(backend) or torch.is_grad_enabled()))


def forward(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    in_a_pass(backend, fault, lambda: in_a_step(backend) and not is_reference(backend))


def computed_again(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    in_a_pass(backend, fault, torch.is_grad_enabled)  # with full checkpointing that is in the backward pass


def head(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    original = torch_reading.token_logps

    def call(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            fault(hidden)
        return original(hidden, *args)

    patch.setattr(torch_reading, "token_logps", call)


def backward(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    def hook(module: Any, inputs: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda grad: fault(grad))  # not `out`, which would hold itself

    backend.decoder.layers[0].register_forward_hook(hook)


def clipping(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    original = torch.nn.utils.clip_grad_norm_

    def call(*args: Any) -> torch.Tensor:
        fault()
        return original(*args)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", call)


def states(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    """While the optimiser's states are made."""
    if hasattr(backend.adapters["policy"].optimizer, "get_state_buffer"):
        owner, name = backend.adapters["policy"].optimizer, "get_state_buffer"
    else:
        owner, name = torch, "zeros_like"
    make, create = getattr(owner, name), torch_adapters.create_states
    making = False

    def faulty(*args: Any, **kwargs: Any) -> torch.Tensor:
        if making or owner is not torch:
            fault()
        return make(*args, **kwargs)

    def call(optimizer: Any) -> None:
        nonlocal making
        making = True
        try:
            create(optimizer)
        finally:
            making = False

    patch.setattr(owner, name, faulty)
    patch.setattr(torch_adapters, "create_states", call)


def update(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    backend.adapters["policy"].optimizer.register_step_pre_hook(lambda *args: fault())


Point = Callable[[Any, Fault, pytest.MonkeyPatch], None]
POINTS: list[Point] = [reference, forward, head, backward, clipping, states, update]


def take(backend: Any, steps: int, fault: Fault | None = None) -> list[Any]:
    """Steps of two micro-batches; one that runs out of memory is taken again as it was."""
    objective, results = criterion(loss="dpo", beta=10.0), []
    while len(results) < steps:
        data = [batch(2, seed=2 * len(results)), batch(3, seed=2 * len(results) + 1)]
        failed = None
        try:
            results.append(one_step(backend, data, objective, 1e-2))
        except OutOfMemory as error:
            failed = error
        if failed:
            assert failed.__context__ is None
            assert fault is not None
            policy = backend.adapters["policy"]
            assert all(parameter.grad is None for parameter in policy.parameters)
            assert bool(policy.optimizer.state) == bool(results), "a first step that failed has no optimiser's state"
            assert not any(canary() for canary in fault.canaries)
            with backend.adapter_off():
                assert is_reference(backend)
            assert not is_reference(backend)
    return results


def fresh(model: str, options: dict[str, Any]) -> Any:
    """A backend with dropout; with "scaler" its first steps are skipped."""
    options = {"lora_dropout": 0.3, "max_grad_norm": 0.1, **options}
    scaled = options.pop("scaler", False)
    backend: Any = load("cpu", model, **options)
    if scaled:
        backend.adapters["policy"].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    return backend


Whole = tuple[dict[str, torch.Tensor], list[Any]]  # the adapter's weights, and the steps' results


@pytest.fixture(scope="module")
def unbroken(tiny: str) -> Callable[[dict[str, Any]], Whole]:
    """Take four steps that do not fail, once with each options."""
    made: dict[str, Whole] = {}

    def once(options: dict[str, Any]) -> Whole:
        if repr(options) not in made:
            backend = fresh(tiny, options)
            torch.manual_seed(3)
            results = take(backend, 4)
            made[repr(options)] = backend.adapters["policy"].weights, results
        return made[repr(options)]

    return once


@pytest.mark.parametrize(
    ("point", "spared", "options"),
    [
        *((point, 3, {}) for point in POINTS),
        *((point, 0, {}) for point in (forward, backward, update)),
        *((point, 1, {"gradient_checkpointing": "full"}) for point in (computed_again, head, backward)),
        (states, 3, {"optim": "paged_adamw_8bit"}),
        (update, 1, {"optim": "paged_adamw_8bit"}),
        *((point, 1, {"scaler": True}) for point in (forward, clipping, update)),
    ],
)
def test_a_step_that_failed_left_no_trace(
    tiny: str,
    unbroken: Callable[[dict[str, Any]], Whole],
    monkeypatch: pytest.MonkeyPatch,
    point: Point,
    spared: int,
    options: dict[str, Any],
) -> None:
    """Bit for bit, with dropout; `spared` is how many micro-batches, updates, or parameters' states went well before."""
    whole, expected = unbroken(options)
    broken, fault = fresh(tiny, options), Fault(spared=spared)
    torch.manual_seed(3)
    point(broken, fault, monkeypatch)
    results = take(broken, 4, fault)
    assert fault.raised == 1
    for one, other in zip(expected, results, strict=True):
        assert (one.loss, one.grad_norm, one.skipped) == (other.loss, other.grad_norm, other.skipped)
        np.testing.assert_array_equal(one.policy, other.policy)
    theirs = broken.adapters["policy"].weights
    assert all(torch.equal(whole[name], theirs[name]) for name in whole)
    assert any(result.skipped for result in expected) == ("scaler" in options)


def test_a_pass_without_gradients_that_failed_holds_nothing(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, fault = load("cpu", tiny), Fault()
    evaluation(backend, fault, monkeypatch)
    expected = load("cpu", tiny).sequence_logps(batch())
    with pytest.raises(OutOfMemory, match="pass without gradients") as caught, backend.adapter_off():
        backend.sequence_logps(batch())
    assert caught.value.__context__ is None
    assert fault.canaries[0]() is None
    np.testing.assert_array_equal(backend.sequence_logps(batch()), expected)


class Full(TorchDispatchMode):
    """A device without a byte left: whatever wants a new tensor fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(value.alias_info is None and "Tensor" in str(value.type) for value in func._schema.returns):
            raise torch.OutOfMemoryError(f"CUDA out of memory: {func}")
        return func(*args, **(kwargs or {}))


def test_an_update_that_has_begun_needs_no_memory(tiny: str) -> None:
    backend: Any = load("cpu", tiny)
    original = backend.adapters["policy"].optimizer.step

    def step() -> None:
        with Full():
            original()

    backend.adapters["policy"].optimizer.step = step
    take(backend, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture
def flags(tiny: str, data: Path) -> list[str]:
    """12 pairs in steps of 4, so that 2 epochs are 6 steps, one pass each."""
    return [
        "--model", tiny, "--backend", "cpu", "--data", str(data), "--dtype", "float32", "--learning-rate", "1e-3",
        "--report-samples", "0",
        "--batch-size", "4", "--gradient-accumulation-steps", "1", "--epochs", "2", "--lora-r", "4",
    ]  # fmt: skip


def broken_at(patch: pytest.MonkeyPatch, point: Point, fault: Fault) -> Fault:
    """Let runs fail; what is checked while loading comes before."""
    original = registry.load

    def load_broken(*args: Any) -> Any:
        backend = original(*args)
        point(backend, fault, patch)
        return backend

    patch.setattr(registry, "load", load_broken)
    return fault


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """But for rounding."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-4), name


@pytest.mark.parametrize(("point", "layout"), [(forward, "packed"), (backward, "plain")])
def test_a_run_goes_on_as_one_that_began_with_smaller_passes(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    point: Point,
    layout: str,
) -> None:
    flags += ["--layout", layout, "--reference-cache", str(tmp_path / "cache"), "--precompute-reference"]
    assert main(["train", *flags, "--output-dir", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        fault = broken_at(patch, point, Fault(tokens=90, times=np.inf))
        assert main(["train", *flags, "--output-dir", str(tmp_path / "broken")]) == 0
    said = re.findall(r"out of memory in step (\d): passes of at most (\d) examples or (\d+) tokens", capsys.readouterr().out)
    assert 1 <= len(said) == fault.raised <= 2
    assert {step for step, *_ in said} == {"1"}
    limits = ["--batch-size", said[-1][1], "--gradient-accumulation-steps", str(4 // int(said[-1][1]))]
    limits += ["--row-tokens", said[-1][2]]
    assert main(["train", *flags, *limits, "--output-dir", str(tmp_path / "small")]) == 0
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "small")
    assert same_weights(tmp_path / "broken" / "adapter", tmp_path / "small" / "adapter")
    assert_same(metrics(tmp_path / "broken"), metrics(tmp_path / "whole"))


@pytest.mark.parametrize(("point", "loss"), [(reference, "lsif"), (forward, "kto"), (clipping, "sft-occupancy")])
def test_a_later_step_that_fails_is_taken_again(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    point: Point,
    loss: str,
) -> None:
    flags += ["--loss", loss]
    assert main(["train", *flags, "--output-dir", str(tmp_path / "whole"), "--reference-cache", str(tmp_path / "a")]) == 0
    with monkeypatch.context() as patch:
        fault = broken_at(patch, point, Fault(spared=2))
        assert main(["train", *flags, "--output-dir", str(tmp_path / "broken"), "--reference-cache", str(tmp_path / "b")]) == 0
    assert fault.raised == 1
    out = capsys.readouterr().out
    assert out.count("out of memory") == 1
    if point is not reference:
        assert re.search(r"out of memory in step 3: .*\b2 examples or \d+ tokens.*\b4 examples or 2048 tokens", out)
    assert_same(metrics(tmp_path / "broken"), metrics(tmp_path / "whole"))


@pytest.mark.parametrize("loss", ["kto", "sft-occupancy"])
def test_passes_without_gradients_are_halved_and_their_figures_are_the_same(
    flags: list[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    loss: str,
) -> None:
    """The check at the start, the precomputed reference, kto's baseline and the evaluation."""
    flags += ["--loss", loss, "--eval-data", str(data), "--eval-steps", "2", "--precompute-reference"]
    assert main(["train", *flags, "--output-dir", str(tmp_path / "whole"), "--reference-cache", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        fault = broken_at(patch, evaluation, Fault(tokens=60, times=np.inf))
        assert main(["train", *flags, "--output-dir", str(tmp_path / "broken"), "--reference-cache", str(tmp_path / "b")]) == 0
    said = re.findall(r"out of memory in a pass without gradients of (\d+) tokens: halved", capsys.readouterr().out)
    sizes = list(map(int, said))
    assert 1 <= len(sizes) == fault.raised
    assert sizes == sorted(set(sizes), reverse=True)  # each size once: from then on it is known
    assert_same(metrics(tmp_path / "broken"), metrics(tmp_path / "whole"))


def test_a_batch_of_answers_is_halved_and_they_are_the_same(
    tiny: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line.partition(', "rejected"')[0] + "}" for line in data.read_text().replace("chosen", "completion").splitlines()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    flags = ["--model", tiny, "--backend", "cpu", "--dtype", "float32", "--data", str(tmp_path / "rows.jsonl")]
    flags += ["--sample-rejected", "1", "--max-length", "60", "--max-steps", "1", "--reference-cache", "off"]
    flags += ["--report-samples", "0"]
    files = [tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"]
    assert main(["train", *flags, "--output-dir", str(tmp_path / "whole"), "--sample-file", str(files[0])]) == 0

    def generating(backend: Any, fault: Fault, patch: pytest.MonkeyPatch) -> None:
        forward = backend.base.forward

        @wraps(forward)  # generation asks for its signature
        def call(*args: Any, **given: Any) -> Any:
            if len(given["input_ids"]) > 3:
                fault()
            return forward(*args, **given)

        backend.base.forward = call

    with monkeypatch.context() as patch:
        fault = broken_at(patch, generating, Fault(times=np.inf))
        assert main(["train", *flags, "--output-dir", str(tmp_path / "broken"), "--sample-file", str(files[1])]) == 0
    assert fault.raised == capsys.readouterr().out.count("out of memory") > 0
    whole, broken = (sorted(file.read_text().splitlines()) for file in files)
    assert whole == broken


@pytest.mark.parametrize("spared", [0, 2])
def test_a_single_example_that_does_not_fit_ends_the_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spared: int
) -> None:
    assert main(["train", *flags, "--output-dir", str(tmp_path / "whole")]) == 0
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        fault = broken_at(patch, forward, Fault(spared=spared, times=np.inf))
        assert main(["train", *flags, "--output-dir", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert fault.raised == 3  # 4, 2 and 1 pairs
    assert out.count(f"step {spared + 1}:") == 2
    assert re.match(r"lite-dil: .*training step \(CUDA .*2\.00 GiB\.\)", err)
    assert "What helps: --gradient-checkpointing full, --4bit, --head-bits 4, a shorter --max-length" in err
    assert "Traceback" not in err
    assert not (folder / "adapter").exists()
    assert (folder / "checkpoints" / "step-2").is_dir() == (spared == 2)
    if spared:
        assert str(folder / "checkpoints" / "step-2") in err and f"--resume {folder} " in err
        assert main(["train", "--resume", str(folder)]) == 0
        assert metrics(folder) == metrics(tmp_path / "whole")
        assert same_weights(folder / "adapter", tmp_path / "whole" / "adapter")


def test_an_evaluation_that_does_not_fit_ends_the_run_and_keeps_what_was_learned(
    flags: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags += ["--eval-data", str(data), "--eval-steps", "3", "--output-dir", str(tmp_path / "run"), "--reference-cache", "off"]
    broken_at(monkeypatch, evaluation, Fault(spared=2, times=np.inf))  # the check at the start is two passes
    assert main(["train", *flags]) == 2
    err = capsys.readouterr().err
    assert "pass without gradients (CUDA" in err
    assert "--gradient-checkpointing" not in err and re.search("--4bit, --head-bits 4, .*--max-length.* 3 is saved", err)


def test_halves_of_a_batch_are_batches_of_half_its_examples() -> None:
    data = [*examples(3), *(e.__class__(e.prompt, e.responses[:1], (-1,), "x") for e in examples(2, seed=4))]
    whole, parts = Batch.of(data), Batch.of(data).halves()
    for part, own in zip(parts, (data[:3], data[3:]), strict=True):
        expected = Batch.of(own)
        assert part.places == expected.places
        for name in ("prompt_of", "signs", "lengths"):
            np.testing.assert_array_equal(getattr(part, name), getattr(expected, name))
        for name in ("prompts", "responses"):
            assert [x.tolist() for x in getattr(part, name)] == [x.tolist() for x in getattr(expected, name)]
    assert Batch.of(data[:1]).halves() == ()
    one, other = Batch.of(data[:1]).split()  # a single example is split between its responses
    for part, response in ((one, data[0].responses[0]), (other, data[0].responses[1])):
        assert (part.prompts[0].tolist(), part.prompt_of.tolist()) == (list(data[0].prompt), [0])
        assert [x.tolist() for x in part.responses] == [list(response)]
    assert one.split() == () and len(whole.split()) == 2
    first, second = by_batch(np.concatenate([whole.lengths, parts[0].lengths]), [whole, parts[0]])
    assert (first.tolist(), second.tolist()) == (whole.lengths.tolist(), parts[0].lengths.tolist())


@pytest.mark.parametrize("layout", ["plain", "packed", "prefix"])
def test_a_schedule_halves_its_largest_pass_until_it_is_one_example(layout: str) -> None:
    schedule = Schedule(config(batch_size=5, gradient_accumulation_steps=2), examples(10), layout)
    first = schedule.batches(1)
    data = {example.prompt: example for example in examples(10)}
    sizes = [max(batch.examples for batch in first)]
    tokens = max(computed_tokens([data[tuple(p.tolist())] for p in batch.prompts], layout) for batch in first)
    assert schedule.halve(first)
    assert schedule.limits == Limits(3, tokens // 2)
    while schedule.halve(batches := schedule.batches(1)):
        sizes.append(max(batch.examples for batch in batches))
        assert sum(batch.examples for batch in batches) == 10
    assert sizes == sorted(sizes, reverse=True)
    assert schedule.halve([first[0].halves()[0].halves()[1]]) is False


def test_what_was_too_large_once_is_halved_at_once() -> None:
    tried, said = list[int](), list[str]()

    def work(piece: range) -> range:
        tried.append(len(piece))
        if len(piece) > 3:
            raise OutOfMemory("a test", "full")
        return piece

    halving: Halving[range] = Halving("a range", len, lambda r: [r[: len(r) // 2], r[len(r) // 2 :]], said.append)
    for _ in range(2):
        assert [i for part in halving.run(work, range(8)) for i in part] == list(range(8))
    assert tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert "a range of 8 tokens" in said[0]
    assert len(said) == 2
