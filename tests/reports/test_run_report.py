"""What a run leaves for people: its report and its sample answers, which change nothing, also where it is cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_level_tokenizer, config, load, write_pairs
from safetensors.numpy import load_file
from trainings import metrics

from lite_dil.backends.types import Generated
from lite_dil.base import display
from lite_dil.base.errors import OutOfMemory, TrainingDiverged, UserError
from lite_dil.base.files import HOST
from lite_dil.base.observer import Event, Observers
from lite_dil.batching.batch import Batch
from lite_dil.cli.demo import show
from lite_dil.cli.main import main
from lite_dil.cli.progress import Terminal
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.reader import Row, read_rows
from lite_dil.data.store import StoreWriter
from lite_dil.evaluation.pairs import PairFigures
from lite_dil.models.find import load_tokenizer
from lite_dil.recipes.run import Run
from lite_dil.reports.pairs import read_pairs
from lite_dil.reports.run_report import RunReport, write_report
from lite_dil.reports.samples import SampleAnswers, SamplePrompt, read_samples, sample_prompts, write_samples
from lite_dil.runs.folder import RunFolder

# Of what is above the backends, and the same code for both.
one_backend = pytest.mark.parametrize("backend_name", ["cpu"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture
def flags(tiny: str, data: Path, backend_name: str) -> list[str]:
    """12 pairs in 6 steps of 4, evaluated twice; prompts with room for 40 tokens of an answer."""
    return [
        "--model", tiny, "--backend", backend_name, "--data", str(data), "--eval-data", str(data), "--dtype", "float32",
        "--epochs", "2", "--eval-steps", "3", "--learning-rate", "1e-2", "--max-length", "60", "--report-samples", "3",
    ]  # fmt: skip


def run(flags: Sequence[str], folder: Path, *more: str) -> Path:
    assert main(["train", *flags, "--output-dir", str(folder), *more]) == 0
    return folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], Path]:
    """Runs to the end, once with each flags; the folder is only read."""
    made: dict[tuple[str, ...], Path] = {}

    def once(flags: Sequence[str]) -> Path:
        if tuple(flags) not in made:
            made[tuple(flags)] = run(flags, tmp_path_factory.mktemp("whole") / "run")
        return made[tuple(flags)]

    return once


def learned(folder: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return what was logged, but for what a clock decides, and the adapter."""
    return metrics(folder), load_file(next((folder / "adapter").glob("adapter*.safetensors")))


def test_samples_are_greedy_answers_and_change_nothing(flags: list[str], tiny: str, tmp_path: Path) -> None:
    """Also with dropout, which draws from the random state that generation might have touched."""
    more = ["--lora-dropout", "0.3"]
    with_samples, without = (
        run(flags, tmp_path / "with", *more),
        run(flags, tmp_path / "without", *more, "--report-samples", "0"),
    )
    (lines, weights), (lines_without, weights_without) = learned(with_samples), learned(without)
    assert lines == lines_without
    assert all(np.array_equal(weights[name], weights_without[name]) for name in weights)
    assert not (without / "report_samples.jsonl").exists()
    samples = read_samples(with_samples / "report_samples.jsonl")
    assert len(samples) == 3 and all(sample.held_out and sample.step == 6 for sample in samples)
    assert any(sample.before != sample.after for sample in samples)
    # The oracle: the adapter that was saved, on and off, a prompt at a time.
    backend = load(flags[3], tiny, init_adapter=str(with_samples / "adapter"), reference="base")
    encoder = Encoder(byte_level_tokenizer())
    prompts = [encoder.prompt(sample.prompt) for sample in samples]  # type: ignore[arg-type]
    room = 60 - max(map(len, prompts))
    for sample, prompt in zip(samples, prompts, strict=True):
        after = backend.generate([prompt], room, encoder.end_ids())[0]
        with backend.adapter_off():
            before = backend.generate([prompt], room, encoder.end_ids())[0]
        for answer, text, tokens, cut in (
            (before, sample.before, sample.before_tokens, sample.before_cut),
            (after, sample.after, sample.after_tokens, sample.after_cut),
        ):
            assert (text, tokens, cut) == (encoder.tokenizer.decode(answer.ids).strip(), len(answer.ids), answer.end is None)
    page = (with_samples / "report.html").read_text()
    assert "the held-out data" in page and ">finished<" in page


def test_a_sample_prompt_is_shown_whole_with_what_the_model_saw_of_it(flags: list[str], tmp_path: Path) -> None:
    flags[flags.index("--max-length") + 1] = "16"
    folder = run(flags, tmp_path / "run", "--report-samples", "12")
    encoder = Encoder(byte_level_tokenizer())
    samples = read_samples(folder / "report_samples.jsonl")
    for sample in samples:
        prompt = encoder.prompt(sample.prompt)  # type: ignore[arg-type]
        assert sample.prompt_tokens == len(prompt) and sample.prompt_seen <= len(prompt)
    page = unescape((folder / "report.html").read_text())
    cut = [sample for sample in samples if sample.prompt_seen < sample.prompt_tokens]
    assert cut and page.count("--max-length 16: ") == len(cut)
    assert all(f"saw {sample.prompt_seen} of the prompt's {sample.prompt_tokens} tokens" in page for sample in cut)


@one_backend
def test_without_held_out_data_it_samples_training_prompts_at_checkpoints(flags: list[str], tmp_path: Path) -> None:
    for option in ("--eval-data", "--eval-steps"):
        del flags[flags.index(option) : flags.index(option) + 2]
    folder = run(flags, tmp_path / "run", "--save-steps", "4", "--report-samples", "2")
    samples = read_samples(folder / "report_samples.jsonl")
    assert len(samples) == 2 and not any(sample.held_out for sample in samples)
    assert "the training data" in (folder / "report.html").read_text()
    assert not (folder / "held_out_pairs.json").exists()


def test_a_stopped_run_has_its_report_and_goes_on_with_it(
    flags: list[str], whole_run: Callable[[Sequence[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers with the adapter off are made once, and the report is that of the whole run."""
    whole = whole_run(flags)
    log, folder = RunFolder.log, tmp_path / "stopped"

    def stop(self: RunFolder, line: dict[str, float]) -> None:
        log(self, line)
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", stop)
        assert main(["train", *flags, "--output-dir", str(folder)]) == 130
    page = (folder / "report.html").read_text()
    assert "after 4 of 6 steps" in page
    path = folder / "report_samples.jsonl"
    write_samples(path, [replace(sample, before=f"kept: {sample.before}") for sample in read_samples(path)])
    assert read_samples(path)[0].step == 3
    assert main(["train", "--resume", str(folder)]) == 0
    after = {sample.key: sample for sample in read_samples(path)}
    for sample in read_samples(whole / "report_samples.jsonl"):
        assert after[sample.key].after == sample.after
        assert after[sample.key].before == f"kept: {sample.before}"
    page = (folder / "report.html").read_text()
    assert ">finished<" in page and "6 of 6 steps" in page


@pytest.mark.parametrize(("ends", "evaluated"), [("save_adapter", False), ("log", True)], ids=["evaluation", "samples"])
def test_ctrl_c_after_the_last_step_leaves_out_only_what_is_made_up_for(
    flags: list[str],
    whole_run: Callable[[Sequence[str]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ends: str,
    evaluated: bool,
) -> None:
    """The adapter is there before the last evaluation, which may take long, and before the sample answers."""
    whole, folder = whole_run(flags), tmp_path / "stopped"
    right = getattr(RunFolder, ends)

    def stop(self: RunFolder, what: Any) -> None:
        right(self, what)
        if ends == "save_adapter" or ("eval_loss" in what and what["step"] == 6):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, ends, stop)
        assert main(["train", *flags, "--output-dir", str(folder)]) == 130
    assert f"--resume {folder}" in capsys.readouterr().out.replace("\n", " ")
    assert learned(folder)[1].keys() == learned(whole)[1].keys()
    assert (metrics(folder) == metrics(whole)) == evaluated
    assert {sample.step for sample in read_samples(folder / "report_samples.jsonl")} == {3}
    assert main(["train", "--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(whole)
    assert {sample.step for sample in read_samples(folder / "report_samples.jsonl")} == {6}


@one_backend
@pytest.mark.usefixtures("drawn")
def test_a_diverged_run_has_its_report(flags: list[str], tmp_path: Path) -> None:
    more = ["--logp-reduction", "sum", "--beta", "1e4", "--output-dir", str(tmp_path / "run")]
    assert main(["train", *flags, *more]) == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert ">diverged<" in page and "lower --learning-rate" in page
    assert page == write_report(tmp_path / "run").read_text()  # it is made from the files there, to the curves


@one_backend
def test_a_report_that_cannot_be_written_does_not_end_training(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    folder = run(flags, tmp_path / "run")
    out = capsys.readouterr().out
    assert out.count("report.html: ") == out.count("(Is a directory)") == 3
    assert (folder / "adapter").is_dir() and not (folder / "report.html").is_file()


class Small:
    """A backend whose memory holds so many prompts at once; it answers with a prompt's first token, or none when off."""

    batched = True

    def __init__(self, most: int) -> None:
        self.most, self.off, self.calls = most, False, list[int]()

    @contextmanager
    def adapter_off(self) -> Any:
        self.off = True
        yield
        self.off = False

    def generate(self, prompts: Sequence[Sequence[int]], limit: int, ends: Sequence[int], stop: Any) -> list[Generated]:
        self.calls.append(len(prompts))
        if len(prompts) > self.most:
            raise OutOfMemory("generating", "the library's words")
        return [Generated([] if self.off else [prompt[0]], ends[0]) for prompt in prompts]


def drawn(count: int, rows: int = 30, **options: Any) -> list[SamplePrompt]:
    encoder, writer = Encoder(byte_level_tokenizer()), StoreWriter()
    for number in range(rows):
        row = Row(f"tea {number % 20} " * (1 + number % 20 % 3), ("a", "b"), (1, -1), f"place {number}", "pairs")
        example = encoder.encode(row)
        writer.append(example, example, row.prompt)
    return sample_prompts(writer.store(), count, config(**options))


@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_sample_answers_fit_into_memory_or_are_left_out(most: int, tmp_path: Path) -> None:
    said: list[str] = []
    backend, path = Small(most), tmp_path / "report_samples.jsonl"
    samples = SampleAnswers(
        drawn(5),
        True,
        path,
        backend,
        Encoder(byte_level_tokenizer()),
        200,
        said.append,  # type: ignore[arg-type]
    )
    samples.refresh(7)
    samples.refresh(9)
    assert bool(read_samples(path)) == (most > 0)
    assert [sample.step for sample in read_samples(path)] == ([9] * 5 if most else [])
    assert all(sample.before_tokens == 0 and sample.after_tokens == 1 for sample in read_samples(path))
    assert any("no sample answers" in text for text in said) == (most == 0)
    assert not most or max(backend.calls[-3:]) <= most  # what was too large once is not tried again


def answering(backend: Any, tiny: str, path: Path, room: int) -> SampleAnswers:
    prompts, encoder = drawn(3), Encoder(load_tokenizer(tiny))
    return SampleAnswers(prompts, True, path, backend, encoder, room + max(len(prompt.ids) for prompt in prompts), print)


def test_ctrl_c_ends_sample_answers_at_the_next_token(backend_name: str, tiny: str, tmp_path: Path) -> None:
    """Before and after the adapter is switched on."""
    backend, path, room = load(backend_name, tiny), tmp_path / "report_samples.jsonl", 12
    for tokens in (3, room + 3):
        asked: list[bool] = []

        def stop(asked: list[bool] = asked, tokens: int = tokens) -> bool:
            asked.append(True)
            return len(asked) > tokens

        answering(backend, tiny, path, room).refresh(1, stop)
        assert not path.exists() and tokens < len(asked) <= tokens + 4  # it is asked once more by each part that ends


@pytest.mark.parametrize(("backend_name", "one_by_one"), [("cpu", False), ("mlx", False), ("mlx", True)])
def test_sample_answers_tell_the_time_left(
    backend_name: str, one_by_one: bool, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tokens that the answers may have: tiny models use up their room."""
    if one_by_one:
        from lite_dil.backends.mlx import generate as mlx_generate

        monkeypatch.setattr(mlx_generate, "batchable", lambda model: False)
    monkeypatch.setattr(display, "SLOW", 0.0)
    backend, room, said = load(backend_name, tiny), 12, list[str]()
    answers = answering(backend, tiny, tmp_path / "report_samples.jsonl", room)
    for parts in (2, 1):  # the answers without the adapter are known at the second time
        said.clear()
        answers.refresh(parts, tell=said.append)
        rows = len(answers.prompts) if one_by_one else 1
        assert room * rows * parts - 1 <= len(said) <= (room + 2) * rows * parts
        assert said[-1] == "at most 0 s left" and all(text.startswith("at most ") for text in said)


def test_sample_answers_that_cannot_be_written_do_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    path, encoder = tmp_path / "report_samples.jsonl", Encoder(byte_level_tokenizer())
    monkeypatch.setattr("secrets.token_hex", lambda _: "0")
    path.with_name(f".{path.name}.{os.getpid()}-{HOST}.0.partial").mkdir()
    backend: Any = Small(5)
    answers = SampleAnswers(drawn(2), True, path, backend, encoder, 200, said.append, every=2)
    for step in (1, 2, 3, 4):
        answers.after_step(Event(step, 5))
    assert len(backend.calls) == 4 and not path.exists()  # before and after, at steps 2 and 4
    assert len(said) == 2 and all("cannot be written" in text for text in said)
    assert not answers.left_out
    answers.after_step(Event(5, 5, stop=lambda: True))
    assert answers.left_out and len(backend.calls) == 4


def test_prompts_are_drawn_by_the_seed_each_once_and_with_room() -> None:
    places = [[prompt.place for prompt in drawn(5, seed=seed)] for seed in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
    assert len({prompt.ids for prompt in drawn(20)}) == 20  # of 30 rows, 10 come twice
    assert drawn(1)[0].place in [prompt.place for prompt in drawn(6)]
    lengths = sorted(len(prompt.ids) for prompt in drawn(20))
    roomy = drawn(5, max_length=128 + lengths[4])
    assert max(len(prompt.ids) for prompt in roomy) <= lengths[4] < lengths[-1]
    # More prompts than have room: one without would cut the answers to all the others.
    few = drawn(10, max_length=128 + lengths[4])
    assert few and max(len(prompt.ids) for prompt in few) <= lengths[4]
    assert len(drawn(10, max_length=10)) == 10


@one_backend
def test_answers_of_a_run_that_saved_nothing_are_not_taken_for_this_ones(flags: list[str], tmp_path: Path) -> None:
    """The next run in its folder may be of another model, and is another one for the trackers."""
    folder = tmp_path / "run"
    run(flags, folder, "--report-to", "tensorboard")
    path, ids = folder / "report_samples.jsonl", (folder / "trackers.json").read_text()
    before = path.read_text()
    path.write_text(before.replace('"before": "', '"before": "of another model: '))
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints")
    run(flags, folder, "--resume", "auto", "--report-to", "tensorboard")
    assert path.read_text() == before
    assert (folder / "trackers.json").read_text() != ids


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (ZeroDivisionError(), "failed", "ended with an error after 20 of 20 steps: ZeroDivisionError"),
        (UserError("no <room>"), "failed", "ended with an error after 20 of 20 steps: no &lt;room&gt;"),
        (TrainingDiverged("why"), "diverged", "diverged after 20 of 20 steps: why"),
        (KeyboardInterrupt(), "interrupted", "interrupted by Ctrl-C after 20 of 20 steps"),
    ],
)
def test_an_error_ends_the_report_and_the_trackers(error: BaseException, state: str, said: str, tmp_path: Path) -> None:
    from reported import make_run

    make_run(tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "report.json").read_text()) | {"state": "running"}
    report = RunReport(RunFolder(tmp_path / "run"), facts, None, str, print)
    with pytest.raises(type(error)), Observers([report]):
        raise error
    page = (tmp_path / "run" / "report.html").read_text()
    assert f">{state}<" in page and said in page


@pytest.mark.parametrize("loss", ["lsif", "dpo", "sft"])
def test_the_demo_shows_what_any_loss_has(loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from reported import make_run

    make_run(tmp_path, loss=loss, form="demonstrations" if loss == "sft" else "pairs", text="[bold]tea[/] :tea:")
    show(Run(None, tmp_path, False, print, None), Terminal())  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "[bold]tea[/] :tea:" in out
    assert "length: 20 tokens" in out
    assert f"nats {'per token' if loss == 'lsif' else 'per response'}" in out
    assert ("held-out pairs" in out) == (loss != "sft")


def test_what_is_said_stands_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().say("prefs.jsonl:100: field 'chosen' [red]is[/] :cat:")
    assert capsys.readouterr().out == "prefs.jsonl:100: field 'chosen' [red]is[/] :cat:\n"


def test_the_held_out_pairs_are_recorded_one_by_one(flags: list[str], tiny: str, data: Path, tmp_path: Path) -> None:
    """Held out are the training pairs with their sides swapped, so that a policy that learns gets them wrong."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    flags[flags.index("--eval-data") + 1] = str(tmp_path / "swapped.jsonl")
    folder = run(flags, tmp_path / "run", "--report-samples", "0", "--beta", "0.5")
    pairs = read_pairs(folder / "held_out_pairs.json")
    assert pairs is not None and pairs.step == 6
    # The oracle: the adapter that was saved, on and off, an example at a time.
    backend, encoder = (
        load(flags[3], tiny, init_adapter=str(folder / "adapter"), reference="base"),
        Encoder(byte_level_tokenizer()),
    )
    expected = []
    for row in read_rows(str(tmp_path / "swapped.jsonl")):
        one = Batch.of([encoder.encode(row)])
        policy = backend.sequence_logps(one)
        with backend.adapter_off():
            f = (policy - backend.sequence_logps(one)) / one.lengths
        expected.append((*map(int, one.lengths), 0.5 * (f[0] - f[1]), row))
    found = sorted(zip(pairs.chosen_tokens, pairs.rejected_tokens, pairs.margins, strict=True))
    np.testing.assert_allclose(np.array(found), np.array(sorted(each[:3] for each in expected)), atol=1e-4)
    last = [line for line in metrics(folder) if "eval_loss" in line][-1]
    assert np.mean(pairs.right) == last["eval_rewards/accuracies"] < 0.5
    assert np.mean(pairs.margins) == pytest.approx(last["eval_rewards/margins"], abs=1e-6)  # type: ignore[arg-type]
    worst = sorted((each for each in expected if each[2] <= 0), key=lambda each: each[2])[:10]
    assert len(pairs.wrong) == len(worst) > 5
    for pair, (chosen, rejected, margin, row) in zip(pairs.wrong, worst, strict=True):
        assert (pair.chosen_tokens, pair.rejected_tokens, pair.place) == (chosen, rejected, row.place)
        assert pair.margin == pytest.approx(margin, abs=1e-4) and 0.5 * (
            pair.chosen_log_ratio - pair.rejected_log_ratio  # type: ignore[operator]
        ) == pytest.approx(margin, abs=1e-4)
        assert row.prompt[-1]["content"] in pair.prompt  # type: ignore[index]
        assert (pair.chosen, pair.rejected) == tuple(str(answer).strip() for answer in row.answers)
    assert (folder / "report.html").read_text().count('<div class="dim">margin -') == len(worst)


def test_what_is_not_finite_is_the_worst_and_a_gap(tiny: str) -> None:
    """By hand: f is 0 and 2, nan and 1, 3 and 1, with a beta of 2."""
    examples = [Example((1,), ((5,), (6, 7)), (1, -1), f"row {i}") for i in range(3)]
    figures = PairFigures(2.0)
    figures.add(np.array([0.0, 2, np.nan, 1, 3, 1]), Batch.of(examples))
    pairs = figures.at(4, Encoder(byte_level_tokenizer()))
    assert (pairs.margins, pairs.right) == ([-4.0, None, 4.0], [False, False, True])
    assert [(pair.place, pair.margin, pair.chosen_log_ratio) for pair in pairs.wrong] == [
        ("row 1", None, None),
        ("row 0", -4.0, 0.0),
    ]
    assert json.loads(json.dumps(asdict(pairs), allow_nan=False))["step"] == 4
