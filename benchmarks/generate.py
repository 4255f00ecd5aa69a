"""Generation on this machine: its seconds beside those of transformers, beside the machine's own floor, and with
answers of unlike lengths.

    python -m benchmarks.generate
    python -m benchmarks.generate --only spread
    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks.generate --shape 1b --dtype bfloat16    a GPU, no network

Both programs answer the same prompts greedily in one process, in turns (einkorn, transformers, einkorn,
transformers), with as many new tokens for every row; einkorn has compiled before. The floor of a step is what binds:
weights and cache at the bandwidth of a sum over as many bytes, or its products at the rate of a large one. With
`spread`, answers are 1 to 8 times as long as the shortest, in random order, and as many even ones hold as many tokens.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.random_model import add_options, model_of
from benchmarks.sft_step import SMOLLM2

SPREAD = 8  # the longest answer by the shortest


class Ours(NamedTuple):
    """A model and what it is to answer."""

    params: Any
    config: Any
    prompts: list[list[int]]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        options.model = model_of(options, Path(scratch))
        compare(options)


def compare(options: argparse.Namespace) -> None:
    ours = open_ours(options)
    if options.only != "spread":
        seconds = against_transformers(options, ours)
        print_floor(options, ours, seconds)
    if options.only != "even":
        spread(options, ours)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_options(parser, model=SMOLLM2)
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of both programs (default: %(default)s)")
    add("--rows", type=int, default=16, help="rows decoded together (default: %(default)s)")
    add("--prompt", type=int, default=64, help="tokens of a prompt (default: %(default)s)")
    add("--new", type=int, default=128, help="new tokens (default: %(default)s)")
    add("--repeat", type=int, default=2, help="runs of each, in turns (default: %(default)s)")
    add("--requests", type=int, default=96, help="answers of the spread (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="of einkorn (default: %(default)s)")
    add("--only", choices=["even", "spread"], help="one of the two (default: both)")
    return parser.parse_args()


def open_ours(options: argparse.Namespace) -> Ours:
    import jax

    from models.families import decoder_config
    from models.weights import load_params

    folder = Path(options.model)
    config = decoder_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(folder, config, shardings=place, dtype=options.dtype)
    draw = random.Random(0)
    prompts = [[draw.randrange(100, config.vocabulary) for _ in range(options.prompt)] for _ in range(options.rows)]
    return Ours(params, config, prompts)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def against_transformers(options: argparse.Namespace, ours: Ours) -> float:
    """Median seconds of einkorn for all rows."""
    import torch
    from transformers import AutoModelForCausalLM

    from models.generate import GREEDY, complete

    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(device).eval()
    tokens = torch.tensor(ours.prompts, device=device)
    sampling = GREEDY._replace(temperature=options.temperature)

    def einkorn() -> None:
        complete(*ours, max_new_tokens=options.new, stop_ids=(), sampling=sampling)

    @torch.no_grad()
    def transformers() -> None:
        theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=options.new,
            min_new_tokens=options.new,
            do_sample=False,
        ).cpu()

    einkorn()
    programs = {"einkorn": einkorn, "transformers": transformers}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    print(f"{options.rows} rows, prompts of {options.prompt} tokens, {options.new} new ones")
    for _ in range(options.repeat):
        for name, work in programs.items():
            seconds[name].append(timed(work))
            per_step = seconds[name][-1] / options.new
            print(f"  {name:12} {seconds[name][-1]:7.2f} s {1e3 * per_step:7.1f} ms/step", flush=True)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"  transformers / einkorn: {median['transformers'] / median['einkorn']:.2f}")
    return median["einkorn"]


def print_floor(options: argparse.Namespace, ours: Ours, seconds: float) -> None:
    """The least time that this machine could take, from two rates measured now."""
    import jax
    import jax.numpy as jnp

    weights = sum(leaf.size for leaf in jax.tree.leaves(ours.params))
    config, side, width = ours.config, 1536, jnp.dtype(options.dtype).itemsize
    flat = jnp.ones((weights,), options.dtype)
    square = jnp.ones((side, side), options.dtype)
    read, product = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    jax.block_until_ready((read(flat), product(square, square)))
    bandwidth = width * weights / min(timed(lambda: read(flat).block_until_ready()) for _ in range(7))
    rate = 2 * side**3 / min(timed(lambda: product(square, square).block_until_ready()) for _ in range(7))
    places = options.prompt + options.new / 2
    cache = 2 * config.layers * options.rows * config.kv_heads * config.head_width * places
    reading, multiplying = width * (weights + cache) / bandwidth, 2 * weights * options.rows / rate
    prefill = 2 * weights * options.rows * options.prompt / rate
    floor = prefill + options.new * max(reading, multiplying)
    print(
        f"  floor: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s: a step reads for {1e3 * reading:.1f} ms and "
        f"multiplies for {1e3 * multiplying:.1f} ms; all {floor:.2f} s\n  floor / einkorn: {floor / seconds:.2f}"
    )


def spread(options: argparse.Namespace, ours: Ours) -> None:
    """Tokens per second with even and with unlike lengths, in turns; both have as many tokens."""
    from models.generate import complete

    shortest = options.new // SPREAD
    steps = [shortest + (options.new - shortest) * i / (options.requests - 1) for i in range(options.requests)]
    unlike = [round(length) for length in steps]
    random.Random(1).shuffle(unlike)
    lengths = {"even": [round(sum(unlike) / len(unlike))] * len(unlike), "unlike": unlike}
    prompts = [ours.prompts[i % len(ours.prompts)][i // len(ours.prompts) :] for i in range(options.requests)]

    def run(of: list[int], count: int) -> float:
        def work() -> None:
            complete(
                ours.params, ours.config, prompts[:count], max_new_tokens=of[:count], stop_ids=(), slots=options.rows
            )

        return sum(of[:count]) / timed(work)

    for of in lengths.values():
        run(of, 2 * options.rows)  # compiles
    rates: dict[str, list[float]] = {name: [] for name in lengths}
    print(f"{options.requests} answers on {options.rows} slots, of {shortest} to {options.new} tokens, tokens/s")
    for _ in range(options.repeat):
        for name, of in lengths.items():
            rates[name].append(run(of, options.requests))
            print(f"  {name:12} {rates[name][-1]:7.1f}", flush=True)
    median = {name: statistics.median(found) for name, found in rates.items()}
    print(f"  unlike / even: {median['unlike'] / median['even']:.2f}")


if __name__ == "__main__":
    main()
