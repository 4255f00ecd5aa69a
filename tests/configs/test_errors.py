"""Every problem with a configuration, in the words its reader sees: one line each, all at once."""

import random
import textwrap

import pytest

from configs.default import SCHEMA
from configs.fill import fill
from configs.given import Given
from configs.key import Items, Key, Same
from configs.load import ConfigError, load
from configs.nearest import nearest, slips

FINE = {"model.model_name": "m", "data.train.datasets[0].dataset_name": "text_sft"}


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """Loads `run.yaml`, made of a text or of a minimal run, with options; gives the lines of the ConfigError."""
    monkeypatch.chdir(tmp_path)

    def lines(text: str = "", *words: str, name: str = "run.yaml", fine: bool = True) -> tuple[str, ...]:
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        least = [f"--{path}={value}" for path, value in FINE.items()] if fine else []
        with pytest.raises(ConfigError) as error:
            load(name, [*least, *words])
        return error.value.problems

    return lines


def test_all_problems_are_told_at_once_each_with_its_place(problems):
    text = """\
        model:
          torch_dtype_str: float8
        training:
          learning_rate: fast
          max_stepz: 10
          save_steps: 1.5
        """
    assert problems(text, "--training.seed=yes", fine=False) == (
        "model.model_name: missing; add it, or give --model.model_name (run.yaml:1)",
        "model.torch_dtype_str: got 'float8'; allowed: auto, float32, bfloat16, float16, float64, uint8;"
        " did you mean float32? (run.yaml:2)",
        "training.max_stepz: unknown key; did you mean training.max_steps? (run.yaml:5)",
        "training.seed: got true; allowed: a whole number (command line)",
        "training.learning_rate: got 'fast'; allowed: a number at least 0 (run.yaml:4)",
        "training.save_steps: got 1.5; allowed: a whole number (run.yaml:6)",
        "data.train.datasets: missing; give at least one dataset",
    )


@pytest.mark.parametrize(
    ("word", "line"),
    [
        # types
        ("--training.max_steps=1e3", "training.max_steps: got 1e3; allowed: a whole number"),
        ("--training.max_steps=null", "training.max_steps: got null; allowed: a whole number"),
        ("--training.max_steps=true", "training.max_steps: got true; allowed: a whole number"),
        ("--training.max_steps=[1]", "training.max_steps: got a list; allowed: a whole number"),
        ("--training.learning_rate=-1", "training.learning_rate: got -1; allowed: a number at least 0"),
        ("--training.learning_rate=.nan", "training.learning_rate: got .nan; allowed: a number at least 0"),
        ("--training.save_epoch=2", "training.save_epoch: got 2; allowed: true, false"),
        ("--training.run_name=true", "training.run_name: got true; allowed: text, null"),
        ("--training.output_dir={a: b}", "training.output_dir: got a mapping; allowed: text"),
        ("--training.adam_beta1=1", "training.adam_beta1: got 1; allowed: a number at least 0 and below 1"),
        ("--training.lr_scheduler_kwargs=3", "training.lr_scheduler_kwargs: got 3; allowed: a mapping"),
        ("--model.freeze_layers=vision", "model.freeze_layers: got 'vision'; allowed: a list of words"),
        (
            "--data.train.datasets[0].transform_num_workers=0",
            "data.train.datasets[0].transform_num_workers: got 0; allowed: a whole number at least 1, auto, null",
        ),
        ("--data.train.datasets=text_sft", "data.train.datasets: got 'text_sft'; allowed: a list of entries"),
        # words
        (
            "--training.mixed_precision_dtype=bfloat16",
            "training.mixed_precision_dtype: got 'bfloat16'; allowed: NONE, BF16, FP16",
        ),
        (
            "--training.eval_strategy=step",
            "training.eval_strategy: got 'step'; allowed: no, steps, epoch; did you mean steps?",
        ),
        # names
        (
            "--training.trainer_kwargs.max_len=3",
            "training.trainer_kwargs.max_len: unknown key; did you mean training.trainer_kwargs.max_length?",
        ),
        (
            "--training.trainer_kwargs.lmbda=3",
            "training.trainer_kwargs.lmbda: unknown key; did you mean training.gkd.lmbda?",
        ),
        (
            "--training.trainer_kwargs.learning_rate=3",
            "training.trainer_kwargs.learning_rate: unknown key; did you mean training.learning_rate?",
        ),
        (
            "--training.trainer_kwargs.bf16=true",
            "training.trainer_kwargs.bf16: unknown key; did you mean training.mixed_precision_dtype?",
        ),
        ("--training.lr=3", "training.lr: unknown key; did you mean training.learning_rate?"),
        ("--training.pack=3", "training.pack: unknown key; did you mean data.train.pack?"),
        ("--model.name=3", "model.name: unknown key; did you mean model.model_name?"),
        ("--trainign.seed=3", "trainign: unknown key; did you mean training?"),
        ("--mesh.zzz=3", "mesh.zzz: unknown key; known here: data, fsdp, expert, tensor, context"),
        ("--training.xyzxyz=3", "training.xyzxyz: unknown key, and like none known here"),
        # the command line itself
        ("training.seed=3", "training.seed=3: options start with --, as in --training.max_steps 10"),
        ("--=3", "--: no key; options look like --data.train.datasets[0].split test"),
        ("--training.seed", "training.seed: no value given"),
        ("--data.train.datasets[5].split=x", "data.train.datasets[5].split: 5 is past the end of a list of 1"),
        ("--training=3", "training: got 3; allowed: keys"),
        # learning from preferences
        (
            "--training.trainer_type=TRL_DPO --training.trainer_kwargs.loss_type=nll",
            "training.trainer_kwargs.loss_type: got nll; allowed with trainer_type TRL_DPO: sigmoid, hinge, ipo,"
            " exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft,"
            " sigmoid_norm, cpo, cpo_hinge, cpo_ipo, simpo, orpo",
        ),
        (
            "--training.trainer_type=TRL_KTO --training.trainer_kwargs.loss_type=[kto,apo_zero_unpaired]",
            "training.trainer_kwargs.loss_type: got 2 of them; allowed with trainer_type TRL_KTO: one",
        ),
        (
            "--training.trainer_type=TRL_DPO --data.train.pack=true",
            "data.train.pack: not implemented yet with training.trainer_type TRL_DPO",
        ),
        (
            "--data.train.collator_name=dpo_with_padding",
            "data.train.collator_name: dpo_with_padding needs training.trainer_type TRL_DPO, not HF",
        ),
        (
            "--training.trainer_type=TRL_DPO --training.trainer_kwargs.sync_ref_model=true"
            " --training.trainer_kwargs.precompute_ref_log_probs=true",
            "training.trainer_kwargs.precompute_ref_log_probs: sync_ref_model changes the reference; choose one",
        ),
        # what is to come
        (
            "--training.trainer_type=TRL_GKD",
            "not implemented yet: training.trainer_type: TRL_GKD; works now: HF, TRL_SFT, OUMI, TRL_DPO, TRL_KTO,"
            " TRL_GRPO, VERL_GRPO",
        ),
        ("--peft.llm_int8_skip_modules=[a]", "not implemented yet: peft.llm_int8_skip_modules: [a]"),
        ("--peft.lora_bias=all", "not implemented yet: peft.lora_bias: all"),
        ("--peft.lora_init_weights=olora", "not implemented yet: peft.lora_init_weights: OLORA"),
        ("--model.torch_dtype_str=float16", "not implemented yet: model.torch_dtype_str: float16"),
        (
            "--deepspeed={enable_deepspeed: true, zero_stage: ZERO_1, offload_optimizer: {device: nvme}}",
            "deepspeed.offload_optimizer.device: not implemented yet: nvme; allowed: cpu, none",
        ),
        # rules
        (
            "--deepspeed.offload_optimizer={device: cpu}",
            "deepspeed.offload_optimizer: needs enable_deepspeed: true and a zero_stage of ZERO_1 or more",
        ),
        ("--peft.q_lora_bits=5", "peft.q_lora_bits: got 5; allowed: 4, 8"),
        (
            "--training.num_train_epochs=0",
            "training.max_steps: neither max_steps nor num_train_epochs is above 0; set one",
        ),
        ("--model.compile=true", "model.compile: must stay false; say training.compile"),
        ("--mesh.data=0", "mesh.data: got 0; allowed: at least 1, or -1 for all devices that are left"),
        ("--mesh={data: -1, fsdp: -1}", "mesh: got -1 for data and fsdp; allowed: one -1"),
        ("--training.eval_strategy=steps", "training.eval_strategy: steps needs data.validation.datasets"),
        (
            "--training.mixed_precision_dtype=BF16",
            "training.mixed_precision_dtype: BF16 needs model.torch_dtype_str: float32, not auto",
        ),
        (
            "--data.train.train_target=FINAL_ASSISTANT_TURN",
            "data.train.train_target: needs data.train.collator_name: text_completions_only_with_padding",
        ),
        (
            "--data.train.collator_name=text_completions_only_with_padding",
            "data.train.collator_name: text_completions_only_with_padding needs data.train.train_target, "
            "such as ALL_ASSISTANT_TURNS",
        ),
        (
            "--data.validation.collator_name=text_with_padding",
            "data.validation.collator_name: text_with_padding, but data.train has none; say one",
        ),
        (
            "--data.train.datasets[0].dataset_kwargs.subset=a",
            "data.train.datasets[0].dataset_kwargs: subset is a key of its own; say data.train.datasets[0].subset",
        ),
        (
            "--training.reward_functions=[a]",
            "training.reward_functions: needs training.trainer_type TRL_GRPO or VERL_GRPO",
        ),
        (
            "--training.trainer_kwargs={packing: true, max_length: null}",
            "data.train.pack: needs a length; set model.model_max_length",
        ),
        (
            "--training.trainer_kwargs={loss_type: dft, label_smoothing_factor: 0.1}",
            "training.trainer_kwargs.label_smoothing_factor: is for loss_type nll, not dft",
        ),
        (
            "--deepspeed={enable_deepspeed: true, train_batch_size: 8}",
            "deepspeed.train_batch_size: must be auto; say training.per_device_train_batch_size",
        ),
        (
            "--training.max_tokens=1000000",
            "training.max_tokens: needs rows of one length; set data.train.pack: true, or say it in steps",
        ),
        (
            "--training.max_tokens=1000000 --training.max_steps=10",
            "training.max_tokens: max_steps is set too; choose one",
        ),
        (
            "--training.warmup_tokens=1000 --training.warmup_ratio=0.1",
            "training.warmup_tokens: warmup_steps or warmup_ratio is set too; choose one",
        ),
        (
            "--training.lr_scheduler_kwargs={num_decay_tokens: 9, num_decay_steps: 9}",
            "training.lr_scheduler_kwargs.num_decay_tokens: num_decay_steps is set too; choose one",
        ),
        (
            "--fsdp.enable_fsdp=true --deepspeed.enable_deepspeed=true",
            "deepspeed.enable_deepspeed: fsdp.enable_fsdp is true too; choose one",
        ),
    ],
)
def test_a_problem_is_told_in_one_line(problems, word, line):
    words = word.split(" --")
    found = problems("", words[0], *(f"--{word}" for word in words[1:]))
    assert [
        told.removesuffix(" as training.trainer_kwargs.packing)").partition(" (command line")[0] for told in found
    ] == [line]


def test_of_a_method_to_come_only_the_method_is_told(problems):
    text = """\
        model: {freeze_layers: [a]}
        training:
          trainer_type: TRL_GKD
          trainer_kwargs: {neftune_noise_alpha: 0.1}
        """
    assert problems(text) == (
        "not implemented yet: training.trainer_type: TRL_GKD; works now: HF, TRL_SFT, OUMI, TRL_DPO, TRL_KTO, TRL_GRPO,"
        " VERL_GRPO (run.yaml:3)",
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training:\n", "training: empty; give it keys, or take the line out (run.yaml:1)"),
        ("- 1\n", "model.model_name: model would stand in a list (run.yaml:1), which has no keys (command line)"),
        ("- 1\n", "the configuration: got a list; allowed: keys (run.yaml:1)"),
        ("model: big\n", "model: got 'big'; allowed: keys (run.yaml:1)"),
    ],
)
def test_an_empty_or_misshapen_section_is_a_problem(problems, text, line):
    assert line in problems(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "run.yaml:3: a: given twice, the first time in line 1"),
        ("training:\n  seed: 1\n  seed: 2\n", "run.yaml:3: seed: given twice, the first time in line 2"),
        ("a: [1,\n", "run.yaml:2: no valid YAML: expected the node content, but found '<stream end>'"),
        ("a: 1\n\tb: 2\n", "run.yaml:2: no valid YAML: found character '\\t' that cannot start any token"),
        ("a: !!python/object:os.system x\n", None),
        ("a: !!set {x, y}\n", "run.yaml:1: no valid configuration: the tag tag:yaml.org,2002:set is not read here"),
        ("? [a]\n: 1\n", "run.yaml:1: no valid configuration: a key is one word"),
        ("a: &a [*a]\n", "run.yaml:1: no valid configuration: the anchor contains itself"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: no valid YAML: but found another document"),
        ("a: \x01\n", "run.yaml:1: no valid YAML: the character #x0001 is not allowed"),
        ("a: " + "[" * 1200 + "\n", "run.yaml: no valid YAML: nested too deeply"),
        ("a: " + "9" * 5000 + "\n", None),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(problems, text, line):
    (found,) = problems(text)
    assert found == line or (line is None and found.startswith("run.yaml:1: no valid YAML: "))


def test_anchors_cannot_blow_a_file_up(problems):
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
    (line,) = problems("a0: &a0 [x]\n" + laughs)
    assert line.endswith("no valid configuration: it expands to more than 100000 values")


def test_a_file_that_is_not_there_or_no_text_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"^a\.yaml: not a text in UTF-8: invalid start byte at byte 3$"):
        load("a.yaml")
    line = r"^b\.yaml: no such file; -c takes a YAML file, or a Python file with get_config$"
    with pytest.raises(ConfigError, match=line):
        load("b.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1\n", "run.py: no get_config that returns a ConfigDict or a dict"),
        ("def get_config():\n    return 3\n", "run.py: no get_config that returns a ConfigDict or a dict"),
        ("def get_config(:\n", "run.py:1: SyntaxError: invalid syntax"),
        ("def get_config():\n    return {}[1]\n", "run.py:2: KeyError: 1"),
        (
            "from configs.default import get_config as default\n\ndef get_config():\n"
            "    config = default()\n    config.training.max_stpes = 3\n    return config\n",
            "run.py:5: max_stpes: unknown key; did you mean max_steps?",
        ),
        (
            "from configs.default import get_config as default\n\ndef get_config():\n"
            "    config = default()\n    config.training.learning_rate = 'fast'\n    return config\n",
            None,
        ),
    ],
)
def test_a_mistake_in_a_python_file_is_told_with_its_line(problems, text, line):
    (found,) = problems(text, name="run.py", fine=False)
    assert found == line or (line is None and found.startswith("run.py:5: TypeError: "))


def test_a_value_no_yaml_can_say_is_refused(problems):
    text = "def get_config():\n    return {'model': {'model_kwargs': {'f': print}, 'model_name': object()}}\n"
    assert [line.partition(" got ")[0] for line in problems(text, name="run.py", fine=False)][:2] == [
        "model.model_name:",
        "model.model_kwargs:",
    ]


def test_no_error_shows_a_credential(problems):
    secret = "hf_" + "a1B2" * 8
    assert secret not in "\n".join(problems("", f"--training.max_steps={secret}", f"--training.optimizer={secret}"))


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("abc", "acb", 1),
        ("abc", "abd", 1),
        ("kitten", "sitting", 3),
        ("ca", "abc", 3),
    ],
)
def test_slips_are_counted_as_people_make_them(one, other, count):
    assert slips(one, other) == slips(other, one) == count


@pytest.mark.parametrize(
    ("word", "names", "name"),
    [
        ("sft", ("HF", "TRL_SFT"), "TRL_SFT"),
        ("TRL_STF", ("TRL_SFT", "TRL_DPO"), "TRL_SFT"),
        ("zzzz", ("HF", "TRL_SFT"), None),
        ("ab", ("ad", "xy"), "ad"),
        ("a", ("b",), None),
        ("x", (), None),
    ],
)
def test_the_nearest_name_is_the_one_meant(word, names, name):
    assert nearest(word, names) == name


def test_a_typo_in_any_key_is_refused_and_nearly_always_answered_with_that_key():
    dice = random.Random(0)
    right = total = 0
    for path, table in _sections(SCHEMA, ()):
        for name in table:
            for typo in {_slip(name, dice) for _ in range(2)} - table.keys():
                guess = _answer((*path, typo))
                right += guess == ".".join((*path, name)).replace(".0", "[0]")
                total += 1
    assert total > 600
    assert right / total >= 0.95


def _sections(table, path):
    """Every section of the schema with its path; a list's entries stand at 0."""
    yield path, table
    for name, entry in table.items():
        if isinstance(entry, Items):
            yield from _sections(entry.table, (*path, name, "0"))
        elif not isinstance(entry, Key | Same):
            yield from _sections(entry, (*path, name))


def _slip(name: str, dice: random.Random) -> str:
    """The name with one letter left out, added, changed, or two swapped."""
    at, letter = dice.randrange(len(name)), dice.choice("abcdefghijklmnopqrstuvwxyz_")
    rest = name[at + 1 :]
    swapped = name[:at] + rest[:1] + name[at] + rest[1:]
    return dice.choice([name[:at] + rest, name[:at] + letter + name[at:], name[:at] + letter + rest, swapped])


def _answer(path: tuple[str, ...]) -> str | None:
    """The key that is suggested for an unknown one, which must be refused."""
    given = Given(1, "here")
    for word in reversed(path):
        given = Given([given] if word == "0" else {word: given}, "here")
    (line,) = [text for _, text in fill(given).problems if "unknown key" in text]
    return line.partition("did you mean ")[2].partition("?")[0] or None
