"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once.

It ends with a code of `trainers.exits.Exit`; anything else is a fault of the program, with its traceback.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trainers.exits import TO_MEND, Exit, ending_of

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models on JAX from one configuration file.",
)

tokenizers = typer.Typer(no_args_is_help=True, help="Make a tokenizer.")
app.add_typer(tokenizers, name="tokenizer")

launches = typer.Typer(no_args_is_help=True, help="Start a run elsewhere (launch/README.md).")
app.add_typer(launches, name="launch")

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
CONFIG_HELP = "YAML file, or Python file with get_config(arg), as file.py or file.py:arg."
Config = Annotated[str, typer.Option("--config", "-c", help=CONFIG_HELP)]
ModelName = Annotated[str, typer.Option("--model", "-m", help="Folder or hub name of a model.")]
MaxNew = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token every time.", min=0)]
TopK = Annotated[int, typer.Option(help="Draw from the so many likeliest tokens only; 0: from all.", min=0)]
TopP = Annotated[float, typer.Option(help="Draw from the fewest tokens that reach this probability.", min=0, max=1)]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Image = Annotated[list[Path] | None, typer.Option(help="A picture to talk about; may be given several times.")]


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    config: Config,
    allow_config_change: Annotated[
        bool,
        typer.Option(
            "--allow-config-change",
            help="Resume even though settings of model, data or batch differ from the checkpoint's.",
        ),
    ] = False,
) -> None:
    """Train as the file says. Any key can be set from here: --training.max_steps 10,
    --data.train.datasets[0].dataset_path x
    """
    loaded = _load(config, context.args)
    from launch.distributed import start_alone
    from launch.train import run

    start_alone()
    run(loaded, allow_config_change=allow_config_change)


@app.command(context_settings=OVERRIDES)
def check(context: typer.Context, config: Config) -> None:
    """Resolve and check all that can be without training: keys, files, tokenizer, template, model, mesh, memory; show
    who set what.
    """
    loaded = _load(config, context.args)
    from launch.check import run

    run(loaded)


@app.command(context_settings=OVERRIDES)
def plan(
    context: typer.Context,
    config: Config,
    target: Annotated[str, typer.Option(help="v5e-16, v5p-128, v6e-256 and their kin, or GPUs as 8xh100.")],
    search: Annotated[bool, typer.Option("--search", help="Look for the best mesh, remat and microbatch.")] = False,
    search_compiles: Annotated[int, typer.Option(help="How many of the best to compile, minutes each.", min=0)] = 4,
) -> None:
    """Say whether a run fits accelerators that are not here, and how fast it could be: the step compiled for that TPU
    (needs the extra `tpu`), or an estimate. Reads no weights. Ends with code 1 where it does not fit.
    """
    loaded = _load(config, context.args)
    from launch import plan, search_plan

    if search:
        fits = search_plan.run(loaded, target=target, compiles=search_compiles)
    else:
        fits = plan.run(loaded, target=target)
    if not fits:
        raise typer.Exit(1)


@app.command(context_settings=OVERRIDES)
def inspect(
    context: typer.Context,
    config: Config,
    rows: Annotated[int, typer.Option(help="How many rows to show.", min=1)] = 3,
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
) -> None:
    """Show rows of the data token by token, the trained ones coloured, and how long the rows are."""
    loaded = _load(config, context.args)
    from launch.inspect import run

    run(loaded, rows=rows, split=split)


@app.command()
def chat(
    model: ModelName,
    system: System = None,
    image: Image = None,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    seed: Seed = 0,
) -> None:
    """Talk to a model; its answer appears token by token. An empty line or Ctrl-D ends."""
    from launch.talk import Options, chat

    options = Options(max_new_tokens, temperature, top_k, top_p, seed)
    chat(model, system=system, images=image or (), options=options)


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[list[str], typer.Argument(help="What to answer; several prompts are answered together.")],
    system: System = None,
    image: Image = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Print a model's answer to each prompt."""
    from launch.talk import Options, generate

    options = Options(max_new_tokens, temperature, top_k, top_p, seed)
    generate(model, prompt, system=system, images=image or (), options=options)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A folder checkpoint-N of a run, or a folder with an adapter.")],
    folder: Annotated[Path, typer.Argument(help="Where the model is written.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: that of the run's own export.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a run that trained an adapter: the whole model, with it merged in.")
    ] = False,
) -> None:
    """Write a checkpoint's model as a folder that transformers and vLLM load, or its adapter as one that peft loads; of
    a folder with an adapter, the model with it merged in.
    """
    from launch.export import run

    run(checkpoint, folder, dtype=dtype, merge=merge)


@app.command()
def parity(
    model: ModelName,
    against: Annotated[str | None, typer.Option(help="What PyTorch loads; default: the same model.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the long text; at most the model's positions.", min=17)] = 2048,
    text: Annotated[Path | None, typer.Option(help="A text to compute on; default: einkorn's own source.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where all numbers are written.")] = None,
) -> None:
    """Hold a model in einkorn against the same in PyTorch: logits, loss, gradients, greedy tokens. Ends with code 1
    where they differ. Needs the `parity` extra.
    """
    from launch.parity import run

    if not run(model, against=against, length=length, text=text, json_file=json_file):
        raise typer.Exit(1)


@tokenizers.command("train")
def train_tokenizer(
    files: Annotated[list[str], typer.Argument(help="Files or folders of text: txt, jsonl, parquet, …")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that the tokenizer is written to.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens in all; the model's vocab_size must hold them.")] = 32_000,
    special: Annotated[
        list[str] | None,
        typer.Option(help="A special token, once for each; the first begins, ends and pads a text."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Add the tokens of ChatML and its template.")] = False,
    min_frequency: Annotated[int, typer.Option(help="How often a pair must occur to become a token.", min=1)] = 2,
    limit: Annotated[int | None, typer.Option(help="Bytes of text to learn from; default: all.", min=1)] = None,
    text_field: Annotated[str, typer.Option(help="Column of plain text rows.")] = "text",
) -> None:
    """Learn a byte-level BPE from text, as a folder that AutoTokenizer and model.tokenizer_name take."""
    from launch.tokenizer import Options, train

    names = tuple(special or ("<|endoftext|>",))
    train(files, output, Options(vocab_size, names, min_frequency, limit, chat, text_field))


@launches.command("render", context_settings=OVERRIDES)
def render_launch(
    context: typer.Context,
    config: Config,
    target: Annotated[str, typer.Option(help="tpu-vm, queued-resources, gke-jobset, slurm, kubernetes or skypilot.")],
    given: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the target, NAME=VALUE, once for each.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where it is written; default: shown.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Also give it to gcloud, kubectl, sbatch or sky.")] = False,
) -> None:
    """The script or manifest that starts `einkorn train -c FILE` elsewhere. Further options are train's, as
    --training.max_steps 10.
    """
    from launch import render

    text = render.render(target, config, given or [], context.args)
    if run:
        raise typer.Exit(render.run(target, text, output or render.default_file(target, text)))
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


def main() -> None:
    """The console script: errors that a user can mend are lines, not tracebacks."""
    _own_packages()
    _ask_for_huge_pages()
    one_process = sys.argv[1:2] == ["tokenizer"]  # elsewhere processes are the parallelism
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if one_process else "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
    try:
        app()
    except (*TO_MEND, RuntimeError) as error:
        if (code := ending_of(error)) is None:
            raise
        _fail(error, code)


def _load(source: str, options: list[str]):
    """The configuration, its notices logged; every problem is a line and exit code 2."""
    from configs.load import load

    loaded = load(source, options)
    _start_logging(loaded.config.training.log_level, loaded.config.training.dep_log_level)
    for notice in loaded.notices:
        logging.getLogger("einkorn").info(notice)
    return loaded


def _start_logging(level: str, others: str) -> None:
    """Our own loggers at `training.log_level`, those of libraries at `training.dep_log_level`."""
    logging.basicConfig(level=others.upper(), format="%(message)s", stream=sys.stderr, force=True)
    for name in ("einkorn", "configs", "input_pipeline", "models", "trainers", "launch"):
        logging.getLogger(name).setLevel(level.upper())


def _fail(error: BaseException, code: int) -> None:
    if os.environ.get("EINKORN_DEBUG"):
        raise error
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


def _ask_for_huge_pages() -> None:
    """Start `train` again with transparent huge pages for the C library's memory, which is asked for before a process.

    On CPU every step frees its temporary memory and gets it afresh, gigabytes in pages of 4 KB: 400,000 page faults a
    step without this, 1,500 with it, and a seventh of the time. Whoever sets GLIBC_TUNABLES decides for himself.
    """
    if sys.platform == "linux" and sys.argv[1:2] == ["train"] and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _own_packages() -> None:
    """Refuse to start with another distribution's `configs`, `models`, … in the place of ours."""
    home = Path(__file__).resolve().parent.parent
    for name in ("configs", "input_pipeline", "models", "trainers"):
        found = importlib.util.find_spec(name)
        if found is None or Path(found.origin or "").resolve().parent.parent != home:
            where = "missing" if found is None else found.origin or list(found.submodule_search_locations or ())
            print(
                f"error: package {name} is {where}, not einkorn's own in {home}; uninstall the other", file=sys.stderr
            )
            sys.exit(Exit.BAD_INPUT)
