"""A policy as lm-eval's language model, against lm-eval's own HFLM with the same adapter."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import bare_model, make_checkpoint
from peft import PeftModel
from transformers import AutoTokenizer

from lite_dil.backends.options import EngineOptions
from lite_dil.backends.types import POLICY, REFERENCE
from lite_dil.base.display import Silent
from lite_dil.base.errors import UserError
from lite_dil.config import adapter_source
from lite_dil.evaluation.benchmarks import harness
from lite_dil.evaluation.benchmarks.measure import measure_tasks
from lite_dil.evaluation.benchmarks.tasks import load_tasks
from lite_dil.evaluation.store import ResultStore
from lite_dil.evaluation.stored_model import StoredModel
from lite_dil.generation import policy as policies
from lite_dil.generation.policy import Policy

harness.require()
from lm_eval.api.instance import Instance  # noqa: E402

from lite_dil.evaluation.benchmarks.language_model import PolicyLM  # noqa: E402

CONTEXT = 48
LAYOUTS = [("cpu", "plain"), ("cpu", "packed"), ("mlx", "plain"), ("mlx", "prefix")]
LONG = " ".join(["the capital of France is Paris and tea"] * 12)
# Choices of one and of many tokens, an empty context, one that ends in a space, a BOS in the text, and those that are cut.
# No two are the same tokens split in two ways: there HFLM takes the log-prob of a one-token choice from the wrong place.
SCORED = [
    ("the capital of France is", " Paris"),
    ("the capital of France is", " a red house and you"),
    ("the capital of France is ", "Paris"),
    ("", "the red house"),
    ("<|endoftext|>a blue", " house"),
    (LONG, " Paris"),
    (LONG, " a small river of tea"),
    ("what", " is"),
]
TEXTS = ["the red house", LONG + " good bread", "a"]
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 12}
WRITTEN = [
    ("the capital of France is", GREEDY | {"until": ["zzz"]}),
    ("the red house", GREEDY | {"until": ["zzz"]}),
    (LONG, GREEDY | {"until": ["zzz"]}),
    ("what is", {"until": ["\n\n"], "max_gen_toks": 6}),
]


def instances(kind: str, requests: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, request, number, ("task", number, 1)) for number, request in enumerate(requests)]


@pytest.fixture(scope="module")
def model(shared: Callable[..., Path]) -> str:
    """A tiny model with a short context."""

    def make(folder: Path) -> None:
        config = json.loads((make_checkpoint(folder) / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))

    return str(shared("short-context", make))


@pytest.fixture(scope="module")
def run(trained: Callable[..., Path], model: str) -> Path:
    return trained("--model", model, "--backend", "cpu")


@pytest.fixture(scope="module")
def expected(model: str, run: Path) -> dict[str, dict[str, Any]]:
    """What HFLM says, without and with the adapter."""
    from lm_eval.models.huggingface import HFLM

    found = {}
    for name in (REFERENCE, POLICY):
        # Loaded by PEFT itself: HFLM would first make the vocabulary that of the tokenizer, which here is smaller.
        whole: Any = bare_model(model)
        if name == POLICY:
            with warnings.catch_warnings(action="ignore"):  # of PEFT about transformers
                whole = PeftModel.from_pretrained(whole, str(run / "adapter"))
        lm = HFLM(pretrained=whole, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=1)
        found[name] = {
            "scores": lm.loglikelihood(instances("loglikelihood", SCORED), disable_tqdm=True),
            "rolling": lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in TEXTS]), disable_tqdm=True),
            "texts": lm.generate_until(instances("generate_until", WRITTEN), disable_tqdm=True),
        }
        text = found[name]["texts"][0]
        # A stop in the middle of what greedy decoding says, which differs between models.
        stop = GREEDY | {"until": [text[len(text) // 2 : len(text) // 2 + 2]]}
        found[name]["stop"] = stop
        found[name]["stopped"] = lm.generate_until(
            instances("generate_until", [("the capital of France is", stop)]), disable_tqdm=True
        )
    assert found[REFERENCE]["scores"] != found[POLICY]["scores"]
    return found


@contextmanager
def opened(run: Path, backend: str, layout: str, strength: float = 1.0) -> Iterator[Policy]:
    source = adapter_source.find(str(run), {"backend": backend, "dtype": "float32"}, strength)
    engine = EngineOptions(layout=layout, gradient_checkpointing="off", max_length=CONTEXT)
    with policies.load(source, lambda _: None, engine=engine) as policy:
        assert policy.backend.layout == layout
        yield policy


def language_model(policy: Policy, adapter: str, store: ResultStore | None = None, chat: bool = False) -> PolicyLM:
    stored = StoredModel(policy, adapter, store or ResultStore(None, {}), Silent().bar, lambda _: None)
    return PolicyLM(stored, chat)


def same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)


@pytest.mark.parametrize(("backend", "layout"), LAYOUTS)
def test_its_answers_are_those_of_hflm(backend: str, layout: str, run: Path, expected: dict[str, dict[str, Any]]) -> None:
    with opened(run, backend, layout) as policy:
        for adapter in (REFERENCE, POLICY):
            lm, said = language_model(policy, adapter), expected[adapter]
            assert lm.max_length == CONTEXT
            same(lm.loglikelihood(instances("loglikelihood", SCORED)), said["scores"])
            assert lm.truncated == {("task", 5), ("task", 6)}
            rolling = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS]))
            assert rolling == pytest.approx(said["rolling"], abs=1e-3)
            assert lm.generate_until(instances("generate_until", WRITTEN)) == said["texts"]
            asked = instances("generate_until", [("the capital of France is", said["stop"])])
            assert lm.generate_until(asked) == said["stopped"]
    assert said["stopped"] != said["texts"][:1]


def test_contexts_that_were_cut_are_counted_for_each_task(run: Path, tmp_path: Path) -> None:
    """By items, whatever the number of their choices."""
    for name, question in (("long", LONG), ("short", "what"), ("sums", LONG)):
        row: dict[str, Any] = {"choices": [" a", " b"], "answer": 0} if name != "sums" else {"answer": 2}
        rows = [{"question": f"{question} {number}"} | row for number in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_tasks(",".join(str(path) for path in tmp_path.glob("*.jsonl")), None, lambda _: None)
    loaded["tasks"]["sums"].set_config(key="generation_kwargs", value={"until": [], "max_gen_toks": 4})
    with opened(run, "cpu", "packed") as policy:
        found = measure_tasks(lambda chat: language_model(policy, POLICY, chat=chat), loaded, "none", None, True)
    assert {name: how["truncated"] for name, how in found.settings.items()} == {"long": 2, "short": 0, "sums": 2}


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_greedy_continuations_are_seen(backend: str, run: Path) -> None:
    """What the model itself says is greedy, token by token; one other token is not."""
    with opened(run, backend, {"cpu": "packed", "mlx": "prefix"}[backend]) as policy:
        lm = language_model(policy, POLICY)
        (answer,) = policy.backend.generate([[5, 6, 7]], 6, [2])
        right = list(answer.ids)
        wrong = [*right[:3], (right[3] + 1) % 512, *right[4:]]
        found = lm._loglikelihood_tokens([(None, [5, 6, 7], right), (None, [5, 6, 7], wrong), (None, [5, 6, 7], right[:1])])
        assert [greedy for _, greedy in found] == [True, False, True]


def test_at_strength_0_it_is_the_base(run: Path, expected: dict[str, dict[str, Any]]) -> None:
    with opened(run, "cpu", "packed", strength=0.0) as policy:
        requests = instances("loglikelihood", SCORED)
        found = language_model(policy, POLICY).loglikelihood(requests)
        assert found == language_model(policy, REFERENCE).loglikelihood(requests)
        same(found, expected[REFERENCE]["scores"])


def test_known_results_are_not_computed_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file, whose damaged line is computed again; sampled texts of a repeated request differ, and stay."""
    sampled = ("the red house", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []})
    asked = [*instances("generate_until", WRITTEN), *instances("generate_until", [sampled, sampled])]
    with opened(run, "cpu", "packed") as policy:

        def answers() -> tuple[ResultStore, list[Any]]:
            store = ResultStore(tmp_path, {"model": "x"})
            lm = language_model(policy, POLICY, store)
            return store, [lm.loglikelihood(instances("loglikelihood", SCORED)), lm.generate_until(asked)]

        store, first = answers()
        assert store.found == 0 and first[1][-1] != first[1][-2]
        (path,) = tmp_path.glob("*.jsonl")
        lines = path.read_text().splitlines()
        lines[2] = lines[2].replace('"value"', '"values"')
        path.write_text("\n".join(lines) + "\n")
        store, again = answers()
        assert (store.damaged, store.found) == (1, len(lines) - 2) and again == first
        monkeypatch.setattr(policy.backend, "token_hits", None)
        monkeypatch.setattr(policy.backend, "generate", None)
        assert answers()[1] == first
        assert ResultStore(tmp_path, {"model": "y"}).found == 0


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"until": [], "max_gen_toks": CONTEXT}, "generates 48 tokens"),
        ({"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0, "top_k": 5}, "top_k"),
        ({"until": [], "max_gen_toks": 4, "num_beams": 4}, "num_beams"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings: dict[str, Any], what: str, run: Path) -> None:
    with opened(run, "cpu", "plain") as policy:
        lm = language_model(policy, POLICY)
        with pytest.raises(UserError, match=what):
            lm.generate_until(instances("generate_until", [("the", settings)]))
        with pytest.raises(UserError, match="without a token"):
            lm.loglikelihood(instances("loglikelihood", [("the", "")]))
        with pytest.raises(UserError, match="longer than the model's context"):
            lm.loglikelihood(instances("loglikelihood", [("the", LONG)]))


def test_what_is_not_finite_is_not_kept() -> None:
    store = ResultStore(None, {})
    with pytest.raises(ValueError, match="not finite"):
        store.add({"a": (float("nan"), False)})
    assert not store.known
