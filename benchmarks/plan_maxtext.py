"""Einkorn against MaxText's ahead-of-time compile: what a step of Llama-3-8B takes of a slice that is not here.

    python -m benchmarks.plan_maxtext --maxtext-python ~/maxtext/bin/python
    python -m benchmarks.plan_maxtext                          # einkorn alone

The step is the same for both: 16 chips v5e, parameters and AdamW's moments in float32 split over all of them (fsdp 16),
products in bfloat16, every layer recomputed, gradients clipped at 1, packed rows of 2,048 tokens, `--rows` of them a
device. Each program compiles it with its own command, `einkorn plan` and `train_compile`, and says what its compiler
found; they take turns. A compile is what it takes to trace, lower and compile the step, a process all of the command,
CPU what the process took of all cores, which a busy machine changes less. MaxText needs an interpreter of its own
(Python 3.12, `pip install 'maxtext[tpu]'`), both need libtpu (here the extra `tpu`), neither a TPU; only with the same
one do they compare (one of its folders on PYTHONPATH is taken before an installed one). Einkorn's temporaries are what
is alive at the fullest moment, MaxText's what its compiler lays out, of the same program 1 to 3 % more. Ends with code
1 where einkorn takes more than 90 % of MaxText's temporaries, refuses rows that MaxText fits, or compiles longer.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
TARGET, CHIPS, LENGTH = "v5e-16", 16, 2048
ALLOWED = 0.9  # of MaxText's temporaries
LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MODULES = ("maxtext.trainers.pre_train.train_compile", "MaxText.train_compile")  # its names, the newest first
REFUSED = re.compile(r"Exceeded hbm capacity|exceeds available HBM|RESOURCE_EXHAUSTED", re.IGNORECASE)


class Found(NamedTuple):
    """What a program says of a step: GiB a device, None where it does not fit; seconds; those of all cores."""

    arguments: float | None
    temporaries: float | None
    compiling: float
    process: float
    cpu: float


class Ran(NamedTuple):
    """A command's lines with the second each came at, its exit status, the seconds it took, and those of all cores."""

    lines: list[tuple[float, str]]
    status: int
    seconds: float
    cpu: float

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def at(self, words: str) -> float:
        """When the line with these words came; the end where none did, as of a compile that was refused."""
        return next((second for second, line in self.lines if words in line), self.seconds)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        config = written(Path(scratch))
        module = None if options.maxtext_python is None else maxtext_module(options.maxtext_python)
        print(f"Llama-3-8B on {TARGET}, fsdp {CHIPS}, rows of {LENGTH:,} tokens; GiB a device, seconds", flush=True)
        print(
            f"{'rows':>4}  {'program':<8} {'arguments':>9} {'temporaries':>11} {'compile':>8} {'process':>8} {'CPU':>8}"
        )
        held = True
        for rows in options.rows:
            ours = with_einkorn(config, rows)
            show(rows, "einkorn", ours)
            if module is not None:
                theirs = with_maxtext(options.maxtext_python, module, rows, Path(scratch))
                show(rows, "MaxText", theirs)
                held &= compared(ours, theirs)
    if module is None:
        print("MaxText was not asked: --maxtext-python names no interpreter that has it")
    sys.exit(not held)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext-python", type=Path, help="a Python that has MaxText and libtpu (default: none)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 5, 6], help="rows a device (default: 1 5 6)")
    return parser.parse_args()


def written(folder: Path) -> Path:
    """The model's config.json, and einkorn's configuration of the run."""
    (folder / "llama3-8b").mkdir()
    (folder / "llama3-8b/config.json").write_text(json.dumps(LLAMA3_8B), encoding="utf-8")
    settings = {
        "model": {
            "model_name": str(folder / "llama3-8b"),
            "torch_dtype_str": "float32",
            "model_max_length": LENGTH,
        },
        "data": {"train": {"datasets": [{"dataset_name": "text", "dataset_path": "none.jsonl"}], "pack": True}},
        "training": {
            "trainer_type": "OUMI",
            "output_dir": str(folder / "never"),
            "mixed_precision_dtype": "BF16",
            "remat_policy": "full",
            "optimizer": "adamw",
            "max_grad_norm": 1.0,
        },
        "mesh": {"fsdp": CHIPS},
    }
    file = folder / "llama3-8b.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def with_einkorn(config: Path, rows: int) -> Found:
    """`einkorn plan`, which says what lasts, what a batch takes, and how long compiling took."""
    more = [f"--training.per_device_train_batch_size={rows}", "--target", TARGET]
    ran = run([sys.executable, "-m", "launch", "plan", "-c", str(config), *more], dict(os.environ))
    said = dict(line.strip().split("  ", 1) for line in ran.text.splitlines() if "  " in line.strip())
    if "estimate" in ran.text or not {"fits", "does not fit"} & said.keys():
        sys.exit(f"einkorn compiled nothing; it needs libtpu, the extra `tpu`:\n{ran.text[-3000:]}")
    if "does not fit" in said:
        return Found(None, None, ran.seconds - ran.at("compiling for"), ran.seconds, ran.cpu)
    lasting = (gibibytes(said[name]) for name in ("parameters", "optimizer", "batch and constants"))
    compiling = float(said["compiled in"].removesuffix(" s"))
    return Found(sum(lasting), gibibytes(said["temporaries"]), compiling, ran.seconds, ran.cpu)


def gibibytes(text: str) -> float:
    return float(text.split(" GiB", 1)[0])


def with_maxtext(python: Path, module: str, rows: int, folder: Path) -> Found:
    """`train_compile`, which prints its compiled step's memory analysis."""
    settings = {
        "run_name": "planned",
        "base_output_directory": folder,
        "compile_topology": TARGET,
        "compile_topology_num_slices": 1,
        "model_name": "llama3-8b",
        "per_device_batch_size": rows,
        "max_target_length": LENGTH,
        "ici_fsdp_parallelism": CHIPS,
        "dtype": "bfloat16",
        "weight_dtype": "float32",
        "opt_type": "adamw",
        "remat_policy": "full",
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
    }
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    ran = run([str(python), "-m", module, *(f"{k}={v}" for k, v in settings.items())], plain | alone)
    if ran.status and not REFUSED.search(ran.text):
        sys.exit(f"MaxText failed:\n{ran.text[-3000:]}")
    compiling = ran.at("Jitting and compilation complete!") - ran.at("Jitting and compiling train step...")
    sizes = [re.search(rf"{name}_size_in_bytes=(\d+)", ran.text) for name in ("argument", "temp")]
    arguments, temporaries = (None if size is None else int(size[1]) / 2**30 for size in sizes)
    return Found(arguments, temporaries, compiling, ran.seconds, ran.cpu)


def maxtext_module(python: Path) -> str:
    """The name that this interpreter's MaxText has its compiling command under; prints which versions it has."""
    probe = (
        "import importlib.util as u, importlib.metadata as m; "
        f"print(*(n for n in {MODULES} if u.find_spec(n.split('.')[0]) and u.find_spec(n))); "
        "print(*(f'{n} {m.version(n)}' for n in ('maxtext', 'jax', 'libtpu')), sep=', ')"
    )
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, env=plain)
    names, *versions = done.stdout.splitlines() or [""]
    if done.returncode or not names:
        sys.exit(f"--maxtext-python {python}: it has no MaxText: pip install 'maxtext[tpu]'\n{done.stderr[-2000:]}")
    own = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu"))
    print(f"einkorn with {own}; {versions[0]}")
    return names.split()[0]


def run(command: list[str], env: dict[str, str]) -> Ran:
    """Runs a command to its end, and notes when each of its lines comes."""
    begun, before, lines = time.perf_counter(), cpu_seconds(), []
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env={**env, "COLUMNS": "400"}, text=True, **streams) as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - begun, line.rstrip("\n")))
    return Ran(lines, process.returncode, time.perf_counter() - begun, cpu_seconds() - before)


def cpu_seconds() -> float:
    """Of all processes so far that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(rows: int, program: str, found: Found) -> None:
    sizes = ("does not fit" if found.arguments is None else f"{found.arguments:9.2f} {found.temporaries:11.2f}").ljust(
        21
    )
    print(f"{rows:>4}  {program:<8} {sizes} {found.compiling:8.0f} {found.process:8.0f} {found.cpu:8.0f}", flush=True)


def compared(ours: Found, theirs: Found) -> bool:
    """Whether einkorn fits what MaxText fits, in 90 % of its temporaries, compiled in no more time; says where not."""
    if theirs.temporaries is None:
        return True
    if ours.temporaries is None:
        print("      einkorn refuses rows that MaxText fits")
        return False
    share, longer = ours.temporaries / theirs.temporaries, ours.compiling / theirs.compiling
    print(f"      einkorn: {share:.0%} of the temporaries, {longer:.0%} of the time to compile")
    return share <= ALLOWED and longer <= 1


if __name__ == "__main__":
    main()
