"""Named adapters on one base: switching is exact, each is trained alone, heads read what they should, all of it in files."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bare_model, batch, config, criterion, load, one_step, oracle_logps

from lite_dil.backends import registry
from lite_dil.backends.types import EACH, END, POLICY, REFERENCE, Head, MicroBatch
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.models.options import ModelOptions
from lite_dil.objectives.loss import NOTHING, SCORES, SUMS, TOKENS

OTHER = {"rank": 3, "alpha": 9.0, "targets": "q_proj,down_proj"}  # another rank, scale and layers than the policy's
NAMES = (POLICY, REFERENCE, "rm")


class BradleyTerry:
    """-log sigmoid(R_chosen - R_rejected) of a head's scores at the end."""

    reads, reference, token_inputs = SCORES, NOTHING, ()

    def __call__(self, policy: Any, reference: Any, inputs: dict[str, Any]) -> Any:
        assert reference is None
        margin = policy[inputs["chosen"], 0] - policy[inputs["rejected"], 0]
        module = __import__("mlx.core" if type(policy).__module__.startswith("mlx") else "torch", fromlist=["logaddexp"])
        return module.logaddexp(-margin, module.zeros_like(margin)).sum()


class Imitation:
    """-log pi of all answers: a loss that reads sums of whichever adapter is trained."""

    reads, reference, token_inputs = SUMS, NOTHING, ()

    def __call__(self, policy: Any, reference: Any, inputs: dict[str, Any]) -> Any:
        return -policy.sum()


def sides(data: Batch) -> list[MicroBatch]:
    chosen, rejected = data.pairs
    return [MicroBatch(data, {"chosen": chosen, "rejected": rejected})]


def logps(backend: Any, data: Batch, names: tuple[str, ...] = NAMES) -> dict[str, np.ndarray]:
    found = {}
    for name in names:
        with backend.using(name):
            found[name] = backend.token_logps(data)
    return found


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
    for name in names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def arrays(backend: Any, name: str) -> dict[str, np.ndarray]:
    """An adapter's files as arrays, to compare with itself."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        backend.save_adapter(Path(folder) / "saved", name)
        files = sorted((Path(folder) / "saved").glob("*.safetensors"))
        return {f"{file.name} {key}": value for file in files for key, value in load_file(file).items()}


def trained(backend: Any, head: Head | None = None, **changes: Any) -> Any:
    """Two steps of the policy and two of another adapter, which are then all different."""
    backend.add_adapter("rm", head=head, **{**OTHER, **changes})
    for _ in range(2):
        one_step(backend, [batch()], criterion(), 1e-2)
        backend.step([MicroBatch(batch(), {})], Imitation(), 1e-2, "rm")
    return backend


LAYOUTS = {"cpu": ("plain", "packed"), "mlx": ("plain", "prefix")}


# Every pair of these.
@pytest.mark.parametrize(
    ("in_4bit", "sharing", "mode"),
    [
        *((False, False, "off"), (True, True, "off"), (False, True, "selective")),
        *((True, False, "selective"), (True, False, "full"), (False, True, "full")),
    ],
)
def test_training_one_adapter_leaves_all_others_alone(
    backend_name: str, tiny: str, in_4bit: bool, sharing: bool, mode: str
) -> None:
    layout, data = LAYOUTS[backend_name][sharing], batch()
    backend = load(backend_name, tiny, layout=layout, gradient_checkpointing=mode, load_in_4bit=in_4bit)
    alone = logps(backend, data, (POLICY, REFERENCE))
    one_step(backend, [data], criterion(), 1e-2)
    alone[POLICY] = backend.token_logps(data)
    backend.add_adapter("rm", **OTHER)
    equal(alone, before := logps(backend, data), (POLICY, REFERENCE))  # a layer that another adapter came to is as it was
    np.testing.assert_array_equal(before["rm"], before[REFERENCE])
    for trains, others in (("rm", (POLICY, REFERENCE)), (POLICY, ("rm", REFERENCE)), ("rm", (POLICY, REFERENCE))):
        backend.step([MicroBatch(data, {})], Imitation(), 1e-2, trains)
        after = logps(backend, data)
        equal(before, after, others)
        assert np.abs(after[trains] - before[trains]).max() > 1e-3
        before = after


def test_blocks_nest_and_end_after_an_exception(backend_name: str, tiny: str) -> None:
    backend, data = trained(load(backend_name, tiny)), batch()
    expected = logps(backend, data)
    seen = []
    with contextlib.suppress(ZeroDivisionError), backend.using("rm"):
        seen.append(("rm", backend.token_logps(data)))
        with backend.adapter_off():
            seen.append((REFERENCE, backend.token_logps(data)))
            with backend.using(POLICY):
                seen.append((POLICY, backend.token_logps(data)))
            seen.append((REFERENCE, backend.token_logps(data)))
        seen.append(("rm", backend.token_logps(data)))
        raise ZeroDivisionError
    seen.append((POLICY, backend.token_logps(data)))
    assert len(seen) == 6
    for name, values in seen:
        np.testing.assert_array_equal(values, expected[name])
    with pytest.raises(KeyError), backend.using("nobody"):
        pass
    with backend.using("rm"):  # a step trains what it says, whichever is on
        one_step(backend, [data], criterion(), 1e-2)
        np.testing.assert_array_equal(backend.token_logps(data), expected["rm"])
    assert (backend.token_logps(data) != expected[POLICY]).any()


def test_another_adapter_changes_nothing_of_the_policys_training(backend_name: str, tiny: str) -> None:
    """Not its weights, not what dropout draws."""
    made, results = [], []
    for beside in (False, True):
        backend = load(backend_name, tiny, lora_dropout=0.3)
        done = [one_step(backend, [batch()], criterion(), 1e-2)]
        if beside:
            backend.add_adapter("rm", **OTHER)
        done += [one_step(backend, [batch()], criterion(), 1e-2) for _ in range(2)]
        made.append(backend)
        results.append(done)
    for one, other in zip(*results, strict=True):
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    equal(arrays(made[0], POLICY), mine := arrays(made[1], POLICY), tuple(mine))


def test_first_weights_are_drawn_from_the_adapters_name(backend_name: str, tiny: str) -> None:
    backend = load(backend_name, tiny, lora_r=4)
    for name in ("one", "mlp"):
        backend.add_adapter(name, 4, 8.0)
    found = {name: arrays(backend, name) for name in (POLICY, "one", "mlp")}
    assert len({frozenset(value) for value in found.values()}) == 1
    keys = [key for key in found["one"] if key.lower().endswith(("lora_a", "lora_a.weight"))]
    assert len(keys) == 2 * 7
    for key in keys:
        assert len({found[name][key].tobytes() for name in found}) == 3
    again = load(backend_name, tiny, lora_r=4)
    again.add_adapter("mlp", 4, 8.0)
    equal(arrays(again, "mlp"), found["mlp"], tuple(found["mlp"]))


def test_names_that_cannot_be(backend_name: str, tiny: str) -> None:
    backend = load(backend_name, tiny)
    backend.add_adapter("rm", 2, 4.0)
    for name in ("rm", POLICY, REFERENCE, "a/b", "a.b", ""):
        with pytest.raises(ValueError, match="adapter '"):
            backend.add_adapter(name, 2, 4.0)
    with pytest.raises(UserError, match="'qproj'"):
        backend.add_adapter("other", 2, 4.0, targets="qproj")
    with pytest.raises(ValueError, match="has no head"):
        backend.scores(batch(), "rm")
    with pytest.raises(ValueError, match="has no head"):
        backend.step(sides(batch()), BradleyTerry(), 1e-3, "rm")
    for call in (lambda: backend.scores(batch(), "nobody"), lambda: backend.step([], Imitation(), 1e-3, "nobody")):
        with pytest.raises(KeyError):
            call()
    with pytest.raises(ValueError, match="reference"):
        backend.step([MicroBatch(batch(), {})], Imitation(), 1e-3, REFERENCE)


# --- heads ---


def merged(model: str, weights: dict[str, np.ndarray], scale: float, leaves: dict[str, torch.Tensor] | None = None) -> Any:
    """A function from ids to last hidden states, by the bare model with W + scale B A put together by hand."""
    bare = bare_model(model)
    parameters = dict(bare.named_parameters())
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()} if leaves is None else leaves
    own = {}
    for key, a in tensors.items():
        name = key.rpartition(" ")[2].removeprefix("base_model.model.")
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            own[f"{layer}.weight"] = parameters[f"{layer}.weight"] + scale * tensors[key.replace("lora_A", "lora_B")] @ a
        elif name.endswith("lora_a"):  # mlx-lm's, transposed
            layer = name.removesuffix(".lora_a")
            own[f"{layer}.weight"] = parameters[f"{layer}.weight"] + scale * (a @ tensors[key.replace("lora_a", "lora_b")]).T

    def states(ids: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(bare, own, kwargs={"input_ids": ids, "output_hidden_states": True})
        return out.hidden_states[-1][0]  # transformers puts it behind the last norm

    return states


def oracle_states(states: Callable[[torch.Tensor], torch.Tensor], data: Batch) -> list[torch.Tensor]:
    """The state of each response token itself, a sequence at a time."""
    found = []
    for response, prompt in zip(data.responses, data.prompt_of, strict=True):
        ids = torch.from_numpy(np.concatenate([data.prompts[prompt], response]))[None]
        found.append(states(ids)[-len(response) :])
    return found


def set_head(backend: Any, name: str, weight: np.ndarray, bias: np.ndarray) -> None:
    """Give a head weights, through its files."""
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as folder:
        backend.save_state(Path(folder))
        file = Path(folder) / "adapters" / name / "head.safetensors"
        save_file({"weight": weight, "bias": bias}, file)
        backend.load_state(Path(folder))


def head_weights(outputs: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(5)
    return draw.normal(size=(outputs, 64)).astype(np.float32) / 8, draw.normal(size=outputs).astype(np.float32)


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize(("at", "outputs"), [(END, 1), (EACH, 3)])
def test_scores_equal_a_linear_map_of_the_bare_models_states(
    backend_name: str, tiny: str, at: str, outputs: int, sharing: bool
) -> None:
    backend = trained(load(backend_name, tiny, layout=LAYOUTS[backend_name][sharing]), Head(outputs, at))
    data = batch(4)
    assert not backend.scores(data, "rm").any()  # it starts at zero, and the loss read no scores
    weight, bias = head_weights(outputs)
    set_head(backend, "rm", weight, bias)
    with torch.no_grad():
        states = oracle_states(merged(tiny, arrays(backend, "rm"), 3.0), data)
    wanted = torch.stack([own[-1] for own in states]) if at == END else torch.cat(states)
    got = backend.scores(data, "rm")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted.numpy() @ weight.T + bias, atol=2e-4)
    np.testing.assert_array_equal(got, backend.scores(data, "rm"))


@pytest.mark.parametrize("mode", ["off", "selective", "full"])
@pytest.mark.parametrize("sharing", [False, True])
def test_a_step_on_scores_learns_by_the_right_gradient(backend_name: str, tiny: str, sharing: bool, mode: str) -> None:
    """Against autograd through the bare model's states: the norm of the gradient of LoRA and head, and the loss."""
    options = {"layout": LAYOUTS[backend_name][sharing], "gradient_checkpointing": mode, "max_grad_norm": 1e9}
    backend, data = trained(load(backend_name, tiny, **options), Head(1)), batch(4)
    weight, bias = head_weights(1)
    set_head(backend, "rm", weight, bias)
    leaves = {key: torch.from_numpy(value).requires_grad_() for key, value in arrays(backend, "rm").items() if "lora" in key}
    head = torch.from_numpy(weight).requires_grad_()
    states = oracle_states(merged(tiny, {}, 3.0, leaves), data)
    score = torch.stack([own[-1] for own in states]) @ head.T
    chosen, rejected = data.pairs
    loss = torch.nn.functional.softplus(score[rejected, 0] - score[chosen, 0]).mean()
    gradients = torch.autograd.grad(loss, [*leaves.values(), head])
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients)).item()
    before = logps(backend, data)
    results = [backend.step(sides(data), BradleyTerry(), 1e-3, "rm") for _ in range(5)]
    assert results[0].loss == pytest.approx(loss.item(), rel=1e-4)
    assert results[0].grad_norm == pytest.approx(norm, rel=1e-3)
    assert results[0].reference is None
    np.testing.assert_allclose(results[0].policy, (score + torch.from_numpy(bias)).detach().numpy(), atol=2e-4)
    assert [one.loss for one in results] == sorted((one.loss for one in results), reverse=True)
    equal(before, after := logps(backend, data), (POLICY, REFERENCE))
    assert (after["rm"] != before["rm"]).any()


def test_a_fresh_head_learns_from_zero(backend_name: str, tiny: str) -> None:
    backend, data = load(backend_name, tiny), batch(4)
    backend.add_adapter("rm", 4, 8.0, head=Head(1))
    losses = [backend.step(sides(data), BradleyTerry(), 1e-2, "rm").loss for _ in range(6)]
    assert losses[0] == pytest.approx(np.log(2))
    assert losses[-1] < 0.5 * losses[0]


# --- files ---


@pytest.mark.parametrize("in_4bit", [False, True])
def test_all_adapters_and_heads_go_on_from_files_bit_for_bit(
    backend_name: str, tiny: str, tmp_path: Path, in_4bit: bool
) -> None:
    def make() -> Any:
        backend = load(backend_name, tiny, lora_dropout=0.2, load_in_4bit=in_4bit)
        backend.add_adapter("rm", **OTHER, dropout=0.3, head=Head(2, EACH))
        backend.add_adapter("judge", 2, 4.0, head=Head(1))
        return backend

    def steps(backend: Any) -> list[Any]:
        done = [one_step(backend, [batch()], criterion(), 1e-2)]
        done.append(backend.step(sides(batch()), BradleyTerry(), 1e-2, "judge"))
        done.append(backend.step([MicroBatch(batch(), {})], Imitation(), 1e-2, "rm"))
        return done

    whole = make()
    steps(whole)
    whole.save_state(tmp_path)
    expected = steps(whole)
    described = json.loads((tmp_path / "adapters" / "rm" / "head.json").read_text())
    assert (described["format"], described["outputs"], described["at"]) == (1, 2, EACH)
    assert not (tmp_path / "adapters" / POLICY / "head.json").exists()
    resumed = make()
    steps(resumed)
    steps(resumed)  # it goes back from anywhere
    resumed.load_state(tmp_path)
    for one, other in zip(expected, steps(resumed), strict=True):
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
        np.testing.assert_array_equal(one.policy, other.policy)
    for name in (POLICY, "rm", "judge"):
        equal(arrays(whole, name), mine := arrays(resumed, name), tuple(mine))


def test_a_state_of_other_adapters_is_refused(backend_name: str, tiny: str, tmp_path: Path) -> None:
    backend, other = load(backend_name, tiny), load(backend_name, tiny)
    backend.save_state(tmp_path)
    other.add_adapter("rm", 2, 4.0)
    with pytest.raises(UserError, match="rm"):
        other.load_state(tmp_path)
    backend.add_adapter("rm", 2, 4.0, head=Head(1))
    backend.save_state(tmp_path)
    with pytest.raises(UserError, match="head"):
        other.load_state(tmp_path)


# --- inference ---


def test_the_bare_base_is_the_policy_where_there_is_no_adapter(backend_name: str, tiny: str, tmp_path: Path) -> None:
    options, data = ModelOptions(model=tiny, dtype="float32"), batch()
    backend = registry.load(backend_name, options, tiny, None, None)
    assert (backend.layout, backend.layout_reason) == ("plain", "")
    with torch.no_grad():
        np.testing.assert_allclose(backend.token_logps(data), oracle_logps(bare_model(tiny), data).numpy(), atol=2e-5)
    with backend.adapter_off():
        off = backend.token_logps(data)
    np.testing.assert_array_equal(backend.token_logps(data), off)
    with pytest.raises(ValueError, match="policy"):
        one_step(backend, [data], criterion(), 1e-3)
    backend.add_adapter("rm", 2, 4.0, head=Head(1))
    np.testing.assert_array_equal(backend.token_logps(data), off)
    assert backend.scores(data, "rm").shape == (len(data.responses), 1)
    with pytest.raises(ValueError, match="inference"):
        backend.step(sides(data), BradleyTerry(), 1e-3, "rm")
    assert backend.generate([[5, 6, 7]], 3, [2]) == registry.load(backend_name, options, tiny, None, None).generate(
        [[5, 6, 7]], 3, [2]
    )


def test_a_loss_of_an_added_adapter_is_compared_with_the_reference(backend_name: str, tiny: str, tmp_path: Path) -> None:
    """The initial adapter, where that is the reference, whichever adapter is trained."""

    class Compared(Imitation):
        reads, reference = TOKENS, TOKENS

        def __call__(self, policy: Any, reference: Any, inputs: dict[str, Any]) -> Any:
            return ((policy - reference) ** 2 * inputs["present"]).sum()

    backend, data = load(backend_name, tiny), batch()
    one_step(backend, [data], criterion(), 1e-2)
    backend.save_adapter(tmp_path / "a")
    other = load(backend_name, tiny, init_adapter=str(tmp_path / "a"), reference="initial-adapter")
    other.add_adapter("rm", **OTHER)
    result = other.step([MicroBatch(data, {})], Compared(), 1e-2, "rm")
    np.testing.assert_allclose(result.reference, backend.token_logps(data), atol=1e-5)
    with backend.adapter_off():
        np.testing.assert_allclose(result.policy, backend.token_logps(data), atol=1e-5)
    with other.adapter_off():
        np.testing.assert_array_equal(result.reference, other.token_logps(data))


# --- one adapter from its files, and a policy with a head ---


@pytest.mark.parametrize("outputs", [0, 2])
def test_an_adapter_of_another_run_is_added_bit_for_bit(backend_name: str, tiny: str, tmp_path: Path, outputs: int) -> None:
    """From where it was trained, also as the policy, onto a base whose own adapters do not change."""
    maker, data = load(backend_name, tiny, lora_r=4), batch(4)
    if outputs:
        maker.set_head(Head(outputs))
        for _ in range(3):
            maker.step(sides(data), BradleyTerry(), 1e-2)
    else:
        one_step(maker, [data], criterion(), 1e-2)
    maker.save_adapter(tmp_path / "rm")
    here = trained(load(backend_name, tiny))
    before = logps(here, data)
    here.load_adapter("added", tmp_path / "rm")
    equal(before, logps(here, data), NAMES)
    np.testing.assert_array_equal(logps(here, data, ("added",))["added"], maker.token_logps(data))
    equal(arrays(here, "added"), mine := arrays(maker, POLICY), tuple(mine))
    if outputs:
        found = maker.scores(data, POLICY)
        np.testing.assert_array_equal(here.scores(data, "added"), found)
        assert found.shape == (8, 2) and found.any()
        bare = registry.load(backend_name, ModelOptions(model=tiny, dtype="float32"), tiny, None, None)  # for inference
        bare.load_adapter("added", tmp_path / "rm")
        np.testing.assert_allclose(bare.scores(data, "added"), found, atol=2e-5)
        with pytest.raises(UserError, match="is a reward model's"):
            load(backend_name, tiny, init_adapter=str(tmp_path / "rm"), reference="base")
    else:
        with pytest.raises(ValueError, match="has no head"):
            here.scores(data, "added")


def test_a_policy_gives_its_head_back(backend_name: str, tiny: str) -> None:
    """A fresh policy is as it was loaded, and trains as if it had never had a head."""
    options = {"lora_r": 4}
    backend, other, data = load(backend_name, tiny, **options), load(backend_name, tiny, **options), batch()
    backend.set_head(Head(1))
    for _ in range(2):
        backend.step(sides(data), BradleyTerry(), 1e-2)
    assert backend.scores(data, POLICY).any()
    backend.renew_policy(config(**options))
    with pytest.raises(ValueError, match="has no head"):
        backend.scores(data, POLICY)
    for each in (backend, other):
        one_step(each, [data], criterion(), 1e-2)
    equal(arrays(backend, POLICY), mine := arrays(other, POLICY), tuple(mine))


def test_a_damaged_head_is_refused(backend_name: str, tiny: str, tmp_path: Path) -> None:
    backend = load(backend_name, tiny)
    backend.set_head(Head(1))
    backend.save_adapter(tmp_path / "rm")
    described = (tmp_path / "rm" / "head.json").read_text()
    for text, why in (
        (described.replace('"outputs": 1', '"outputs": 2'), "."),
        ("[]", "expected an object"),
        ("{", "cannot be"),
    ):
        (tmp_path / "rm" / "head.json").write_text(text)
        with pytest.raises(UserError, match=why):
            load(backend_name, tiny).load_adapter("rm", tmp_path / "rm")
    (tmp_path / "rm" / "head.json").write_text(described)
    (tmp_path / "rm" / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load(backend_name, tiny).load_adapter("rm", tmp_path / "rm")
