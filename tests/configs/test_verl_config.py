"""verl's own settings: defaults, what moves to a key here, what does nothing, what is refused, and its sizes."""

import re
import textwrap

import pytest

from configs import derived, verl
from configs.default import SCHEMA
from configs.key import find
from configs.load import ConfigError, load

MODEL = "--model.model_name=m"
VERL = ("--training.trainer_type=VERL_GRPO", "--training.reward_functions=[countdown]")
DATA = "--data.train.datasets=[{dataset_name: countdown}]"


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


def overrides(text):
    return f"--training.verl_config_overrides={text}"


class TestVerl:
    def test_what_nothing_says_is_verls_and_a_group_has_eight(self, loaded):
        says = verl.settings(loaded(*VERL).config)
        assert (says.prompts, says.mini_batch, says.micro_batch, says.ppo_epochs) == (1024, 256, None, 1)
        assert says.drawing == verl.Drawing(generations=8, temperature=0.9, top_p=1.0, top_k=0)
        assert says.evaluation == verl.Drawing(generations=1, temperature=0.0, top_p=1.0, top_k=0)
        assert (says.max_prompt_length, says.max_response_length) == (512, 512)
        assert (says.clip_ratio_low, says.clip_ratio_high, says.clip_ratio_c) == (0.2, 0.2, 3.0)
        assert (says.loss_mode, says.loss_agg_mode, says.adv_estimator) == ("vanilla", "token-mean", "grpo")
        assert (says.use_kl_loss, says.kl_loss_coef, says.kl_loss_type) == (False, 0.001, "low_var_kl")
        assert (says.weight_decay, says.betas, says.grad_clip) == (0.01, (0.9, 0.999), 1.0)
        assert (says.lr_scheduler_type, says.lr_warmup_steps, says.entropy_coeff) == ("constant", None, 0.0)

    def test_every_default_is_a_value_of_its_key(self):
        for name, key in verl.VERL.items():
            assert [*verl.problems(nested(name, key.default))] == [] or key.default is None, name
            assert key.meaning, name

    def test_every_setting_that_moves_has_a_key_here(self):
        for target in verl.INSTEAD.values():
            assert find(SCHEMA, target.split(".")) is not None, target
        for name in verl.IN_PLACE_OF.values():
            assert name in verl.VERL

    def test_no_setting_is_of_two_kinds(self):
        kinds = [set(verl.VERL), set(verl.INSTEAD), set(verl.FILES), set(verl.IDLE), set(verl.SAY)]
        assert len(set().union(*kinds)) == sum(map(len, kinds))

    def test_what_is_set_is_what_it_says(self, loaded):
        text = """
            training:
              verl_config_overrides:
                data: {train_batch_size: 64, filter_overlong_prompts: true, truncation: left}
                algorithm:
                  adv_estimator: rloo
                  norm_adv_by_std_in_grpo: false
                  use_kl_in_reward: true
                  kl_penalty: low_var_kl
                  kl_ctrl: {type: adaptive, kl_coef: 0.01}
                actor_rollout_ref:
                  actor:
                    ppo_mini_batch_size: 16
                    ppo_micro_batch_size_per_gpu: 4
                    ppo_epochs: 2
                    clip_ratio: 0.3
                    clip_ratio_high: 0.4
                    loss_agg_mode: seq-mean-token-sum
                    optim: {weight_decay: 0.1, lr_warmup_steps: 3, warmup_style: cosine, betas: [0.9, 0.95]}
                  rollout: {top_p: 0.8, top_k: 20, val_kwargs: {n: 4, do_sample: true, temperature: 0.6}}
            """
        config = loaded(*VERL, text=text).config
        says = verl.settings(config)
        assert (says.prompts, says.mini_batch, says.micro_batch, says.ppo_epochs) == (64, 16, 4, 2)
        assert (says.adv_estimator, says.norm_adv_by_std_in_grpo, says.use_kl_in_reward) == ("rloo", False, True)
        assert (says.kl_penalty, says.kl_ctrl_type, says.kl_coef) == ("low_var_kl", "adaptive", 0.01)
        assert (says.clip_ratio_low, says.clip_ratio_high) == (0.3, 0.4)
        assert (says.weight_decay, says.lr_warmup_steps, says.lr_scheduler_type) == (0.1, 3, "cosine")
        assert says.betas == (0.9, 0.95)
        assert (says.drawing.top_p, says.drawing.top_k) == (0.8, 20)
        assert says.evaluation == verl.Drawing(generations=4, temperature=0.6, top_p=1.0, top_k=0)
        assert derived.prompt_length(config) == (512, "leave_out")
        assert derived.rollout(config, replicas=2) == (64, 8, 8, 16, 8, 2)

    def test_what_has_a_key_here_moves_there_and_wins(self, loaded):
        loaded = loaded(
            *VERL,
            overrides(
                "{actor_rollout_ref: {actor: {optim: {lr: 1e-6}}, rollout: {n: 5, temperature: 1}}, data:"
                " {max_response_length: 99, max_prompt_length: 77}, trainer: {total_epochs: 2, total_training_steps: 9,"
                " test_freq: 5, save_freq: -1, logger: [console, wandb], resume_mode: auto, experiment_name: a}}"
            ),
            "--training.learning_rate=0.1",
            "--data.validation.datasets=[{dataset_name: countdown, split: test}]",
        )
        training = loaded.config.training
        assert (training.learning_rate, training.num_train_epochs, training.max_steps) == (1e-6, 2.0, 9)
        assert (training.eval_strategy, training.eval_steps, training.save_steps) == ("steps", 5, -1)
        assert (training.enable_wandb, training.enable_tensorboard, training.run_name) == (True, False, "a")
        assert training.try_resume_from_last_checkpoint
        says = verl.settings(loaded.config)
        assert (says.drawing.generations, says.drawing.temperature) == (5, 1.0)
        assert (says.max_prompt_length, says.max_response_length) == (77, 99)
        name = "training.verl_config_overrides.actor_rollout_ref.actor.optim.lr"
        assert loaded.notices == (f"training.learning_rate gives way to {name}",)
        assert loaded.origin["training.learning_rate"] == f"command line as {name}"

    def test_files_of_verls_become_datasets(self, loaded):
        config = loaded(*VERL, overrides("{data: {train_files: [a.parquet, b.parquet], val_files: c.parquet}}")).config
        assert [entry.dataset_path for entry in config.data.train.datasets] == ["a.parquet", "b.parquet"]
        assert [entry.dataset_path for entry in config.data.validation.datasets] == ["c.parquet"]
        assert config.data.train.datasets[0].split == "train"

    def test_what_only_places_work_is_listed_once(self, loaded):
        notices = loaded(
            *VERL,
            overrides(
                "{actor_rollout_ref: {actor: {fsdp_config: {param_offload: true}}, rollout: {gpu_memory_utilization:"
                " 0.5, tensor_model_parallel_size: 2}}, trainer: {n_gpus_per_node: 8}}"
            ),
        ).notices
        assert notices == (
            "training.verl_config_overrides: no effect here: actor_rollout_ref.actor.fsdp_config.param_offload,"
            " actor_rollout_ref.rollout.gpu_memory_utilization,"
            " actor_rollout_ref.rollout.tensor_model_parallel_size, trainer.n_gpus_per_node",
        )

    def test_keys_that_verl_does_not_ask_are_told_with_its_own(self, loaded):
        notices = loaded(*VERL, "--training.weight_decay=0.1", "--training.grpo.epsilon=0.1").notices
        assert notices == (
            "no effect with training.trainer_type VERL_GRPO: training.grpo.epsilon",
            "training.weight_decay: no effect with training.trainer_type VERL_GRPO; say"
            " training.verl_config_overrides.actor_rollout_ref.actor.optim.weight_decay",
        )

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (
                "{actor_rollout_ref: {actor: {clip_ration_high: 0.3}}}",
                "actor_rollout_ref.actor.clip_ration_high: means nothing here; did you mean"
                " actor_rollout_ref.actor.clip_ratio_high?",
            ),
            (
                "{data: {ppo_epochs: 2}}",
                "data.ppo_epochs: means nothing here; did you mean actor_rollout_ref.actor.ppo_epochs?",
            ),
            (
                "{custom_reward_function: {path: own.py}}",
                "custom_reward_function.path: means nothing here; say training.reward_functions: [file.py:function]",
            ),
            ("{zzzzzzzzzz: 1}", "zzzzzzzzzz: means nothing here; configs/verl.py lists what does"),
            (
                "{actor_rollout_ref: {actor: {loss_agg_mode: mean}}}",
                "actor_rollout_ref.actor.loss_agg_mode: got 'mean'; allowed: token-mean, seq-mean-token-sum,"
                " seq-mean-token-mean, seq-mean-token-sum-norm",
            ),
            (
                "{actor_rollout_ref: {actor: {policy_loss: {loss_mode: kl_cov}}}}",
                "actor_rollout_ref.actor.policy_loss.loss_mode: kl_cov: not implemented yet",
            ),
            (
                "{data: {train_batch_size: 8}, actor_rollout_ref: {actor: {ppo_mini_batch_size: 16}}}",
                "actor_rollout_ref.actor.ppo_mini_batch_size: got 16; allowed: at most data.train_batch_size, 8",
            ),
            (
                "{actor_rollout_ref: {rollout: {do_sample: false}}}",
                "actor_rollout_ref.rollout.do_sample: must stay true: answers to a prompt that are all alike teach"
                " nothing",
            ),
            (
                "{actor_rollout_ref: {actor: {optim: {betas: [0.9]}}}}",
                "actor_rollout_ref.actor.optim.betas: got [0.9]; allowed: two numbers at least 0 and below 1",
            ),
            (
                "{data: {max_response_length: 0}}",
                "data.max_response_length: got 0; allowed: a whole number above 0, null",
            ),
        ],
    )
    def test_what_means_nothing_or_no_value_is_told_in_one_line(self, problems, text, line):
        assert problems(*VERL, overrides(text)) == [f"training.verl_config_overrides.{line}"]

    def test_a_group_of_one_is_refused_wherever_it_is_said(self, problems):
        for option in (
            "--training.grpo.num_generations=1",
            overrides("{actor_rollout_ref: {rollout: {n: 1}}}"),
        ):
            (line,) = problems(*VERL, option)
            assert line.startswith("training.grpo.num_generations: got 1; allowed: at least 2")

    def test_one_reward_function_and_no_loss_of_trls(self, problems):
        assert problems(*VERL, "--training.reward_functions=[a, b]") == [
            "training.reward_functions: got 2; allowed with trainer_type VERL_GRPO: one"
        ]
        assert problems(*VERL, "--training.trainer_kwargs.loss_type=dapo") == [
            "training.trainer_kwargs.loss_type: is for TRL's methods; say"
            " training.verl_config_overrides.actor_rollout_ref.actor.policy_loss.loss_mode"
        ]

    @pytest.mark.parametrize(
        ("text", "replicas", "sizes"),
        [
            # The documentation's own file: a step of 128 prompts, and verl's default of 256 for an update.
            ("{data: {train_batch_size: 128}}", 1, (128, 8, 8, 128, 1, 1)),
            ("{data: {train_batch_size: 128}}", 8, (128, 8, 64, 16, 1, 1)),
            ("{}", 8, (1024, 8, 64, 32, 4, 1)),
            (
                "{data: {train_batch_size: 6}, actor_rollout_ref: {rollout: {n: 5}, actor: {ppo_mini_batch_size: 3}}}",
                1,
                (6, 5, 5, 3, 2, 1),
            ),
        ],
    )
    def test_sizes_are_verls(self, loaded, text, replicas, sizes):
        assert derived.rollout(loaded(*VERL, overrides(text)).config, replicas=replicas) == sizes

    @pytest.mark.parametrize(
        ("text", "replicas", "line"),
        [
            (
                "{data: {train_batch_size: 60}, actor_rollout_ref: {actor: {ppo_mini_batch_size: 16}}}",
                1,
                "ppo_mini_batch_size is 16, which does not divide data.train_batch_size 60; the nearest are 15 and 20",
            ),
            (
                "{actor_rollout_ref: {actor: {ppo_micro_batch_size_per_gpu: 3}}}",
                8,
                "ppo_micro_batch_size_per_gpu is 3, which does not divide the 256 answers of an update on a device; the"
                " nearest are 2 and 4",
            ),
            (
                "{data: {train_batch_size: 3}}",
                16,
                "ppo_mini_batch_size 3 times rollout.n 8 is 24 answers, which 16 devices cannot share evenly; the"
                " nearest are 16 and 32 answers",
            ),
        ],
    )
    def test_sizes_that_do_not_divide_are_told_with_those_that_do(self, loaded, text, replicas, line):
        with pytest.raises(ValueError, match=re.escape(line)):
            derived.rollout(loaded(*VERL, overrides(text)).config, replicas=replicas)


def nested(name, value):
    """A setting by its dotted name, as a file has it."""
    for word in reversed(name.split(".")):
        value = {word: value}
    return value
