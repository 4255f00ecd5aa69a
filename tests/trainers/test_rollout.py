"""Answers become batches: where advantages stand, what is logged, and going on in the midst of a generation."""

import json
from typing import Any

import numpy as np
import pytest

from input_pipeline.prompts import PromptBatches, PromptRow, Prompts, read_prompts
from input_pipeline.reading import Reading
from models.generate import Generated
from trainers.advantages import Valued
from trainers.completions import Completions
from trainers.kl_reward import KlPenalty
from trainers.rollout import Answered, Means, Rollouts, Shape, completion_metrics, completion_of, lines_of
from trainers.step import TrainState

STATE = TrainState(step=np.int32(0), params={}, opt_state=None, halted=False)


def generated(ids: list[int], *, finish: str = "stop", logprob: float = -0.5) -> Generated:
    kept = ids[:-1] if finish == "stop" else ids
    return Generated(kept, finish, ids, np.full(len(ids), logprob, np.float32), None)


def group(*answers: Generated, advantages: list[float]) -> Answered:
    row = PromptRow((5, 6, 7), "how?", {}, 3, "row 3 of a file")
    rewards = np.zeros((len(answers), 1))
    return Answered(row, answers, ("text",) * len(answers), rewards, np.array(advantages))


def test_an_answer_stands_behind_its_prompt_and_is_weighed_where_it_is_predicted():
    first, second = lines_of(
        group(generated([8, 2]), generated([9], finish="length"), advantages=[1.5, -1.5]), mask_truncated=False
    )
    #                                     token, next one, whether that is learned from
    assert first.columns.tolist() == [[5, 6, 0], [6, 7, 0], [7, 8, 1], [8, 2, 1], [2, 0, 0]]
    assert first.more["advantages"].tolist() == [0, 0, 1.5, 1.5, 0]
    assert first.more["sampled_logprobs"].tolist() == [0, 0, -0.5, -0.5, 0]
    assert (first.segments.tolist(), first.positions.tolist(), first.rows) == ([1] * 5, [0, 1, 2, 3, 4], (3,))
    assert second.columns.tolist() == [[5, 6, 0], [6, 7, 0], [7, 9, 1], [9, 0, 0]]


def test_answers_may_share_one_prompt_but_for_its_last_token_which_predicts_the_first_of_each():
    answers = generated([8, 2]), generated([9], finish="length", logprob=-2.0)
    (line,) = lines_of(group(*answers, advantages=[1.5, -1.5]), mask_truncated=True, together=2)
    assert line.columns[:, 0].tolist() == [5, 6, 7, 8, 2, 7, 9]
    assert line.columns[:, 2].tolist() == [0, 0, 1, 1, 0, 0, 0]  # the second was cut off
    assert line.positions.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert line.more["branches"].tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert line.more["advantages"].tolist() == [0, 0, 1.5, 1.5, 0, -1.5, 0]
    assert line.more["sampled_logprobs"].tolist() == [0, 0, -0.5, -0.5, 0, -2, 0]


def test_a_masked_answer_that_was_cut_off_keeps_its_row_and_has_no_weight():
    whole, cut = lines_of(
        group(generated([8, 2]), generated([9, 9], finish="length"), advantages=[1.0, -1.0]), mask_truncated=True
    )
    assert (whole.columns[:, 2].sum(), cut.columns[:, 2].sum()) == (2, 0)
    assert cut.segments.tolist() == [1] * 5


def test_lengths_of_answers_are_logged_and_those_that_ended_by_themselves_apart():
    groups = [group(generated([8, 2]), generated([9] * 4, finish="length"), advantages=[0, 0])]
    assert completion_metrics(groups) == {
        "completions/mean_length": 3,
        "completions/min_length": 2,
        "completions/max_length": 4,
        "completions/mean_terminated_length": 2,
        "completions/min_terminated_length": 2,
        "completions/max_terminated_length": 2,
        "completions/clipped_ratio": 0.5,
    }


def test_rewards_see_a_string_after_a_string_and_a_message_after_messages():
    row = PromptRow((1,), ({"role": "user", "content": "how?"},), {}, 0, "")
    assert completion_of(row, "so") == [{"role": "assistant", "content": "so"}]
    assert completion_of(row._replace(prompt="how?"), "so") == "so"


class Lengths:
    """A reward of an answer's tokens; `asked` keeps what it was called with."""

    names = ("tokens",)
    failures = 0

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def score(self, prompts, completions, completion_ids, columns):
        self.asked.append((prompts, completions, columns))
        return np.array([[float(len(ids))] for ids in completion_ids])


def valued(rewards: np.ndarray, lengths: np.ndarray, group: int, penalties: np.ndarray | None) -> Valued:
    each = (rewards[:, 0] - (0 if penalties is None else penalties)).reshape(-1, group)
    centred = each - each.mean(axis=1, keepdims=True)
    return Valued(centred.reshape(-1), centred.any(axis=1), {"reward": float(rewards.mean())})


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, tiny_chat_model) -> Prompts:
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"grain {'mill ' * i}", "answer": i} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(path)}]}
    reading = Reading(max_length=None, seed=0, trainer="TRL_GRPO")
    return read_prompts(split, AutoTokenizer.from_pretrained(tiny_chat_model), reading=reading)


def rollouts(
    prompts: Prompts,
    judge: Lengths,
    *,
    updates: int = 4,
    attempts: int = 1,
    dull: int = 0,
    penalty: KlPenalty | None = None,
) -> Rollouts:
    """Two prompts a generation, three answers to each, microbatches of two; of the first `dull` prompts of a generation
    all answers are equally long.
    """

    def sample(state, frozen, asked, generation, group):
        return [
            generated([10 + generation] * (1 if place < dull and generation == 0 else 1 + number) + [2])
            for place, _ in enumerate(asked)
            for number in range(group)
        ]

    means = Means(
        sample=sample,
        judge=judge,
        value=valued,
        decode=lambda ids: " ".join(map(str, ids)),
        score=lambda state, frozen, batch: batch["sampled_logprobs"] - 1,
        penalty=penalty,
        attempts=attempts,
    )
    shape = Shape(
        group=3, together=1, rows=2, accumulation=1, updates=updates, max_length=64, mask_truncated=False, seed=7
    )
    return Rollouts(PromptBatches(prompts, size=2, seed=3), means, shape)


def batches(made: Rollouts, count: int) -> list[dict[str, np.ndarray]]:
    return [made.sampled(STATE, None) for _ in range(count)]


def assert_equal(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_a_generation_is_learned_from_round_and_round_and_then_there_is_another(prompts):
    made = rollouts(prompts, Lengths())  # three microbatches of two answers, four updates: the first one comes again
    first, second, third, fourth, next_one = batches(made, 5)
    assert_equal([fourth], [first])
    assert first["tokens"].shape == (1, 2, 64)
    answers = {int(row.max()) for batch in (first, second, third) for row in batch["tokens"][0] * batch["weights"][0]}
    assert next_one["old_logprobs"][next_one["weights"] > 0].tolist()[0] == -1.5
    assert len(answers) >= 1
    assert made.logged()["completions/mean_length"] == 3
    assert made.logged() == {}


@pytest.mark.parametrize("done", [1, 4, 6])
def test_a_run_goes_on_in_the_midst_of_a_generation(prompts, done):
    whole, stopped, judge = rollouts(prompts, Lengths()), rollouts(prompts, Lengths()), Lengths()
    expected = batches(whole, done + 7)[done:]
    batches(stopped, done)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = rollouts(prompts, judge)
    resumed.set_state(state)
    assert_equal(batches(resumed, 7), expected)
    assert resumed.rows == whole.rows


def by_tokens(coefficient: float, **how: Any) -> KlPenalty:
    """A penalty of so much for each token of an answer; its tokens' mean divergence is 1."""
    return KlPenalty(
        lambda state, frozen, batch: (batch["weights"].sum(axis=-1), np.ones(batch["weights"].shape[:2])),
        coefficient,
        **how,
    )


def test_rewards_lose_what_the_penalty_of_the_same_answer_is(prompts):
    plain, lowered = (rollouts(prompts, Lengths(), penalty=penalty) for penalty in (None, by_tokens(0.25)))
    for one, other in zip(batches(plain, 4), batches(lowered, 4), strict=True):
        np.testing.assert_allclose(other["advantages"], 0.75 * one["advantages"], rtol=1e-6)
    logged = lowered.logged()
    assert (logged["actor/reward_kl_penalty"], logged["actor/reward_kl_penalty_coeff"]) == (1, 0.25)


def test_a_weight_that_goes_after_its_target_goes_on_with_the_run(prompts):
    def made() -> Rollouts:
        return rollouts(prompts, Lengths(), penalty=by_tokens(0.25, target=0.5, horizon=60))

    whole, resumed = made(), made()
    batches(whole, 4)
    resumed.set_state(json.loads(json.dumps(whole.get_state())))
    for each in (whole, resumed):
        batches(each, 4)
        each.logged()
        batches(each, 1)
        # 1 is above 0.5, by more than verl's bound of a fifth: the weight grows by 0.2 * 6 answers / 60
        assert each.logged()["actor/reward_kl_penalty_coeff"] == pytest.approx(0.25 * 1.02**2)


def test_another_shape_is_refused(prompts):
    state = rollouts(prompts, Lengths()).get_state()
    with pytest.raises(ValueError, match="updates"):
        rollouts(prompts, Lengths(), updates=8).set_state(state)


def test_rewards_are_given_columns_prompt_by_prompt_and_answer_by_answer(prompts):
    judge = Lengths()
    batches(rollouts(prompts, judge), 1)
    [(asked, completions, columns)] = judge.asked
    assert len(asked) == len(completions) == len(columns["answer"]) == 6
    assert columns["answer"][:3] == [columns["answer"][0]] * 3
    assert asked[0] == f"grain {'mill ' * columns['answer'][0]}"
    assert completions[2] == "10 10 10"


def test_prompts_whose_answers_score_alike_give_way_to_others(prompts):
    judge = Lengths()
    made = rollouts(prompts, judge, attempts=3, dull=1)
    batch = batches(made, 1)[0]
    assert len(judge.asked) == 2  # one prompt of the first two told nothing, so two more were asked
    assert all(np.any(row) for row in batch["advantages"][0]) or batch["advantages"].any()
    assert made.logged()["reward"] > 0


def test_answers_are_kept_in_a_file_and_shown_and_forgotten_where_a_run_goes_on_before_them(prompts, tmp_path):
    shown: list[str] = []
    made = rollouts(prompts, Lengths(), updates=3)
    made.on_answers = Completions(
        tmp_path / "completions.jsonl", names=("tokens",), every=1, rows=2, one_of_each=False, show=shown.append
    )
    for step in range(6):
        made.sampled(STATE._replace(step=np.int32(step)), None)
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 6 + [3] * 6
    assert lines[0].keys() == {"step", "row", "prompt", "completion", "finish", "tokens", "rewards", "advantage"}
    assert lines[1]["rewards"] == {"tokens": 3.0}
    assert len(shown) == 2
    assert shown[0].count("\n") == 2
    made.on_answers.go_on(3)
    assert len((tmp_path / "completions.jsonl").read_text().splitlines()) == 6
    made.on_answers.go_on(0)
    (older,) = tmp_path.iterdir()
    assert older.name.startswith("completions-until-")
