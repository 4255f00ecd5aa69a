"""The configuration of GRPO: TRL's keys where Oumi has them, and what they come to."""

import re
import textwrap

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from configs import derived, verl
from configs.default import get_config
from configs.load import ConfigError, load

MODEL = "--model.model_name=m"
DATA = "--data.train.datasets=[{dataset_name: letter_count}]"
TRL = ("--training.trainer_type=TRL_GRPO", "--training.reward_functions=[count_letters]")


@pytest.fixture
def loaded(tmp_path):
    """Loads a text with options."""

    def of(*options, text=""):
        file = tmp_path / "run.yaml"
        file.write_text(textwrap.dedent(text))
        return load(str(file), [MODEL, DATA, *options])

    return of


@pytest.fixture
def problems(loaded):
    """The problems of options, without their places."""

    def of(*options):
        with pytest.raises(ConfigError) as error:
            loaded(*options)
        return [line.partition(" (command line")[0] for line in error.value.problems]

    return of


class TestTrl:
    def test_what_nothing_says_is_oumis_or_trls(self, loaded):
        config = loaded(*TRL).config
        kwargs = config.training.trainer_kwargs
        assert derived.loss_types(config) == ("dapo",)
        assert derived.beta(config) == 0.0
        assert derived.completion_length(config) == 256
        assert derived.prompt_length(config) == (None, "left")
        assert derived.drawing(config) == verl.Drawing(generations=8, temperature=0.9, top_p=1.0, top_k=0)
        assert derived.shuffles(config)
        assert not derived.disables_dropout(config)
        assert derived.reward_weights(config) == (1.0,)
        assert (config.training.grpo.epsilon, kwargs.epsilon_high, kwargs.delta) == (0.2, None, None)
        assert (kwargs.scale_rewards, kwargs.importance_sampling_level, kwargs.num_iterations) == ("group", "token", 1)
        assert (config.training.reward_timeout, config.training.learning_rate) == (60.0, 5e-5)

    def test_trls_names_in_trainer_kwargs_mean_oumis_keys_which_win(self, loaded):
        loaded = loaded(
            *TRL,
            "--training.trainer_kwargs={num_generations: 4, max_completion_length: 64, temperature: 1.2, beta: 0.04}",
            "--training.grpo.temperature=0.7",
        )
        assert derived.drawing(loaded.config).generations == 4
        assert derived.completion_length(loaded.config) == 64
        assert derived.drawing(loaded.config).temperature == 0.7
        assert derived.beta(loaded.config) == 0.04
        assert "training.trainer_kwargs.temperature: 1.2 gives way to training.grpo.temperature: 0.7" in loaded.notices

    def test_sampling_and_stops_are_read_from_where_they_may_stand(self, loaded):
        config = loaded(
            *TRL,
            "--training.trainer_kwargs={top_p: 0.9, top_k: 5, min_p: 0.1, generation_kwargs: {stop_strings: [b]}}",
            "--training.grpo={repetition_penalty: 1.1, stop_strings: [a]}",
        ).config
        assert derived.drawing(config) == verl.Drawing(
            generations=8, temperature=0.9, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1
        )
        assert derived.stop_strings(config) == ("a", "b")

    def test_another_engine_is_asked_for_in_vain_and_the_log_says_so_once(self, loaded):
        notices = loaded(*TRL, "--training.grpo.use_vllm=true", "--training.trainer_kwargs.vllm_mode=server").notices
        assert notices == ("no effect here: training.grpo.use_vllm, training.grpo.vllm_mode",)

    def test_rewards_may_be_scaled_in_yes_and_no(self, loaded):
        for said, meant in (("true", "group"), ("false", "none"), ("batch", "batch")):
            config = loaded(*TRL, f"--training.trainer_kwargs.scale_rewards={said}").config
            assert config.training.trainer_kwargs.scale_rewards == meant

    def test_several_rewards_have_a_weight_each(self, loaded, problems):
        two = "--training.reward_functions=[count_letters, own.py:short]"
        config = loaded(*TRL, two, "--training.trainer_kwargs.reward_weights=[1, 0.5]").config
        assert derived.reward_weights(config) == (1.0, 0.5)
        assert problems(*TRL, two, "--training.trainer_kwargs.reward_weights=[1]") == [
            "training.trainer_kwargs.reward_weights: got 1; allowed: one for each of [count_letters, 'own.py:short']"
        ]
        config.training.trainer_kwargs.reward_weights = ["1", "much"]
        with pytest.raises(ValueError, match=r"reward_weights is .* allowed: numbers"):
            derived.reward_weights(config)

    def test_the_keys_of_trl_belong_to_it(self, loaded):
        notices = loaded("--training.trainer_type=TRL_SFT", "--training.trainer_kwargs.num_iterations=2").notices
        assert notices == ("no effect with training.trainer_type TRL_SFT: training.trainer_kwargs.num_iterations",)

    @pytest.mark.parametrize(
        ("option", "line"),
        [
            (
                "--training.grpo.num_generations=1",
                "training.grpo.num_generations: got 1; allowed: at least 2, since the answers to a prompt are compared"
                " with one another",
            ),
            (
                "--training.grpo.temperature=0",
                "training.grpo.temperature: got 0; allowed: a number above 0",
            ),
            (
                "--training.reward_functions=null",
                "training.reward_functions: TRL_GRPO needs what scores answers; name a reward function, or a"
                " file.py:function of yours",
            ),
            (
                "--training.reward_function_kwargs={countdown: {score: 2}}",
                "training.reward_function_kwargs.countdown: is none of training.reward_functions: [count_letters]",
            ),
            ("--data.train.pack=true", "data.train.pack: not implemented yet with training.trainer_type TRL_GRPO"),
            ("--data.train.stream=true", "data.train.stream: not implemented yet with training.trainer_type TRL_GRPO"),
            (
                "--data.train.collator_name=text_with_padding",
                "data.train.collator_name: TRL_GRPO asks prompts, and collates its own answers; take it out",
            ),
            (
                "--training.trainer_kwargs={generation_batch_size: 16, steps_per_generation: 2}",
                "training.trainer_kwargs.generation_batch_size: steps_per_generation is set too; choose one",
            ),
            (
                "--training.trainer_kwargs.generation_kwargs={top_p: 0.9}",
                "training.trainer_kwargs.generation_kwargs.top_p: say it as a key of training.trainer_kwargs or"
                " training.grpo; allowed here: stop_strings",
            ),
            (
                "--training.trainer_kwargs.loss_type=sigmoid",
                "training.trainer_kwargs.loss_type: got sigmoid; allowed with trainer_type TRL_GRPO: dapo, grpo, bnpo,"
                " dr_grpo, cispo, sapo, luspo, vespo",
            ),
            (
                "--training.trainer_kwargs.epsilonhigh=1",
                "training.trainer_kwargs.epsilonhigh: unknown key; did you mean training.trainer_kwargs.epsilon_high?",
            ),
            (
                "--training.grpo.beta=0.1",
                "training.grpo.beta: unknown key; did you mean training.trainer_kwargs.beta?",
            ),
            (
                "--training.trainer_kwargs.use_adaptive_entropy=true",
                "not implemented yet: training.trainer_kwargs.use_adaptive_entropy: true",
            ),
        ],
    )
    def test_what_cannot_run_is_told_in_one_line(self, problems, option, line):
        assert problems(*TRL, option) == [line]

    @pytest.mark.parametrize(
        ("option", "line"),
        [
            (
                ("--training.trainer_type=TRL_DPO", "--training.trainer_kwargs.beta=0"),
                "training.trainer_kwargs.beta: got 0; allowed with trainer_type TRL_DPO: a number above 0",
            ),
            (
                ("--training.trainer_kwargs.shuffle_dataset=true",),
                "training.trainer_kwargs.shuffle_dataset: not implemented yet with training.trainer_type HF",
            ),
        ],
    )
    def test_other_methods_are_told_what_is_not_theirs(self, problems, option, line):
        assert problems(*option) == [line]


class TestSizes:
    @pytest.mark.parametrize(
        ("options", "replicas", "rollout"),
        [
            ({}, 1, (1, 8, 8, 1, 1, 1)),
            ({}, 4, (4, 8, 32, 1, 1, 1)),
            ({"gradient_accumulation_steps": 4}, 1, (4, 8, 8, 4, 1, 1)),
            ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 2, (8, 8, 16, 2, 2, 1)),
            ({"generation_batch_size": 64, "num_iterations": 3}, 2, (8, 8, 16, 1, 12, 3)),
            (
                {"per_device_train_batch_size": 2, "generation_batch_size": 8, "num_generations": 4},
                1,
                (2, 4, 2, 1, 4, 1),
            ),
            ({"gradient_accumulation_steps": 2, "steps_per_generation": 3, "num_iterations": 2}, 1, (3, 8, 8, 2, 3, 2)),
        ],
    )
    def test_trls_are_trls(self, options, replicas, rollout):
        assert derived.rollout(self.config(**options), replicas=replicas) == rollout

    @pytest.mark.parametrize(
        ("options", "replicas", "text"),
        [
            (
                {"per_device_train_batch_size": 6},
                1,
                "a generation has 6 answers, which is no multiple of both num_generations 8 and the 6 answers of a"
                " microbatch (per_device_train_batch_size times devices); the nearest are"
                " training.trainer_kwargs.generation_batch_size: 24",
            ),
            ({"generation_batch_size": 30, "num_generations": 4}, 1, "generation_batch_size: 24 and 32"),
            (
                {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
                1,
                "training.gradient_accumulation_steps is 4, and a generation has 6 microbatches (steps_per_generation"
                " times num_iterations); the nearest are 3 and 6",
            ),
        ],
    )
    def test_what_does_not_divide_is_told_with_what_does(self, options, replicas, text):
        with pytest.raises(ValueError, match=re.escape(text)):
            derived.rollout(self.config(**options), replicas=replicas)

    @given(
        rows=st.integers(1, 12),
        steps=st.integers(1, 12),
        accumulation=st.integers(1, 6),
        group=st.integers(2, 8),
        passes=st.integers(1, 3),
        replicas=st.sampled_from([1, 2, 8]),
    )
    def test_every_answer_of_a_generation_is_learned_from_once_a_pass(
        self, rows, steps, accumulation, group, passes, replicas
    ):
        config = self.config(
            per_device_train_batch_size=rows,
            steps_per_generation=steps,
            gradient_accumulation_steps=accumulation,
            num_generations=group,
            num_iterations=passes,
        )
        try:
            sizes = derived.rollout(config, replicas=replicas)
        except ValueError:
            assume(False)
        assert sizes.answers == sizes.prompts * group == rows * steps * replicas
        assert sizes.updates * sizes.accumulation * sizes.microbatch == sizes.answers * passes

    def config(self, **options):
        """A configuration of TRL_GRPO with these keys, each where it stands."""
        config = get_config()
        config.training.trainer_type = "TRL_GRPO"
        for name, value in options.items():
            places = (config.training, config.training.grpo, config.training.trainer_kwargs)
            next(place for place in places if name in place)[name] = value
        return config
