"""scripts/theorem.py on a tiny model: its divergences against an enumeration, its null setting, a training, its page."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import theorem_page
from theorem import Arm, Trainings
from theorem_world import Drawn, Held, Setting, World, divergence, questions, taken

import lite_dil as dil

QUESTIONS = [f"{first} {second}" for first in ("what is", "where is", "name", "draw") for second in ("one", "red", "it")]


@pytest.fixture(scope="module")
def policy(tiny: str) -> dil.Policy:
    return dil.load(tiny, backend="cpu", dtype="float32")


def test_the_divergence_along_draws_has_the_exact_one_as_its_mean(policy: dil.Policy) -> None:
    """Over all answers of two tokens from a vocabulary of 4, enumerated; the tiny tables have no more."""
    draw = np.random.default_rng(0)
    first, second = (np.log(draw.dirichlet(np.ones(4), 5)) for _ in range(2))  # row 0: the first token; 1 to 4: after each

    def along(table: np.ndarray, answer: tuple[int, ...]) -> np.ndarray:
        return np.stack([table[0], table[1 + answer[0]]])

    answers = list(product(range(4), range(4)))
    logps = {name: taken([along(table, a) for a in answers], answers) for name, table in (("p", first), ("q", second))}
    exact = (np.exp(logps["p"]) * (logps["p"] - logps["q"])).sum()
    each = divergence([along(first, a) for a in answers], [along(second, a) for a in answers])
    assert np.exp(logps["p"]).sum() == pytest.approx(1)
    assert (np.exp(logps["p"]) * each).sum() == pytest.approx(exact)


def test_an_untrained_policy_is_the_reference(policy: dil.Policy) -> None:
    world = World(policy, Setting(3))
    held = Held(world, world.pairs(QUESTIONS, 0), 0)
    start, now = held.start(), held.measure()
    assert now["kl_forward"] == start["kl_forward"] and min(start["kl_forward"]) > 0
    assert now["learned/chosen"] == now["learned/rejected"] == [0.0] * len(QUESTIONS)
    assert np.std(start["true/chosen"]) > 0
    assert all(1 <= len(answer) <= 3 for answer in held.drawn.chosen)


@pytest.mark.parametrize("setting", [Setting(3, None, 0.5), Setting(3, null=True)])
def test_the_true_ratio_is_that_of_the_distributions_drawn_from(policy: dil.Policy, setting: Setting) -> None:
    world = World(policy, setting)
    answers = [(7, 8, 9)] * len(QUESTIONS)
    found = Held(world, Drawn(QUESTIONS, answers, answers), 0).true_ratios("chosen")
    logps = world.next_logps(QUESTIONS, answers, "reference")
    heated = [each / setting.temperature - np.logaddexp.reduce(each / setting.temperature, -1)[:, None] for each in logps]
    assert found == pytest.approx(taken(heated, answers) - taken(logps, answers), abs=1e-4)
    if setting.null:
        assert not found.any()
        assert world.draw(QUESTIONS, 0, "reference") != world.draw(QUESTIONS, 0, "chosen")  # draws of their own


def test_a_training_approaches_and_is_kept(tiny: str, tmp_path: Path) -> None:
    trainings = Trainings(Setting(1, "one two"), QUESTIONS, 8, tmp_path, tiny)
    arm = Arm("bce", 1e-3, 1.0, 0, 25)
    done = trainings.run(arm)
    assert [point["step"] for point in done["points"]] == [20, 25]
    assert np.mean(done["points"][-1]["kl_forward"]) < 0.7 * np.mean(done["start"]["kl_forward"])
    (kept,) = tmp_path.glob("*.json")
    kept.write_text(kept.read_text().replace(done["date"], "kept"))
    assert Trainings(Setting(1, "one two"), QUESTIONS, 8, tmp_path, tiny).run(arm) == done | {"date": "kept"}
    others = [(Setting(1, "three"), QUESTIONS, 8, tiny), (Setting(1, "one two"), QUESTIONS[1:], 8, tiny)]
    others += [(Setting(1, "one two"), QUESTIONS, 7, tiny), (Setting(1, "one two"), QUESTIONS, 8, "another")]
    for setting, prompts, held_out, model in others:  # whose figures are others
        other = Trainings(setting, prompts, held_out, tmp_path, model)
        assert not arm.path(tmp_path, setting, other.asked).exists()
    theorem_page.write_page(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| bce | 0.001 | 1 | 400 |" in page and "| sft | missing |" in page
    assert (tmp_path / "page-system-1-25.png").stat().st_size > 10_000


def test_what_was_trained_otherwise_is_another_row_or_section(tmp_path: Path) -> None:
    ratio = {f"{kind}/{side}": [0.1, 0.3] for kind in ("true", "learned") for side in theorem_page.SIDES}
    figures = {"kl_forward": [1.0, 2.0], "kl_reverse": [1.0, 2.0]} | ratio
    for number, changed in enumerate(({}, {"rate": 2e-4}, {"steps": 20}, {"asked": "b"}, {"clip": 50.0})):
        arm = {"loss": "bce", "rate": 1e-4, "clip": 1.0, "seed": 0, "steps": 10, "setting": "system-1", "asked": "a"}
        arm |= {"start": figures, "date": "2026-12-01"}
        arm |= {"points": [{"step": 10, "answers": 160, "clipped_steps": 0} | figures]} | changed
        (tmp_path / f"{number}.json").write_text(json.dumps(arm))
    theorem_page.write_page(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.count("## Another system prompt") == 4 and page.count("| bce | 0.0001 |") == 4
    assert page.count("| bce | 0.0002 | 1 |") == 1


def test_slope_and_offset() -> None:
    correlation, slope, offset = theorem_page.fit([0.0, 1.0, 3.0], [1.0, 1.5, 2.5])
    assert (correlation, slope, offset) == pytest.approx((1.0, 0.5, 1.0))


def test_questions_are_the_first_of_each_prompt(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "a"}\n{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]}\n'
        '{"prompt": "a"}\n{"prompt": "too long a question"}\n'
    )
    assert questions(file, 5) == ["a", "b"]
