"""How long a model folder takes to load, against the least it could take, and the memory beyond its arrays.

    python benchmarks/load.py --model ~/.cache/einkorn/SmolLM2-135M-Instruct

The least is to read all bytes of the weight files, and to put as many as the arrays have, which lie there ready, onto
the devices. Both run in turns (load, least, load, least), each in a process of its own, which first starts its backend
and then takes the time. Files are in the page cache, after a first reading that is not timed, so that this measures
the program and not the disk. Memory is the peak resident set, over what it was before, less the arrays.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = Path("~/.cache/einkorn/SmolLM2-135M-Instruct").expanduser()
BAR = 1.5  # load / least
READ = 16 << 20  # bytes read at a time


def main() -> None:
    options = parse()
    if options.one:
        sys.path.insert(0, str(ROOT))
        print(json.dumps({"load": load, "least": least}[options.one](Path(options.model), options.dtype)))
        return
    compare(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(SMOLLM2), help="model folder (default: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the arrays (default: %(default)s)")
    add("--devices", type=int, default=1, help="fake devices on CPU that share the arrays (default: %(default)s)")
    add("--repeat", type=int, default=5, help="runs of each (default: %(default)s)")
    add("--one", choices=["load", "least"], help=argparse.SUPPRESS)  # this script calls itself with it
    return parser.parse_args()


def compare(options: argparse.Namespace) -> None:
    """Runs both in turns, prints every run, then the medians and their ratio; exits with 1 beyond the bar."""
    print(
        f"{Path(options.model).name} in {options.dtype}, {options.devices} devices, {os.cpu_count()} processors,",
        end=" ",
    )
    print("load {:.1f} {:.1f} {:.1f}".format(*os.getloadavg()))
    run(options, "least")  # fills the page cache
    results: dict[str, list[dict[str, float]]] = {"load": [], "least": []}
    for _ in range(options.repeat):
        for what, found in results.items():
            found.append(run(options, what))
            print(
                f"  {what:6} {found[-1]['seconds']:7.3f} s   arrays {found[-1]['arrays'] / 1e6:7.1f} MB"
                + (f"   beyond them {found[-1]['beyond'] / 1e6:7.1f} MB" if what == "load" else ""),
                flush=True,
            )
    loading, shortest = (statistics.median(one["seconds"] for one in results[what]) for what in ("load", "least"))
    print(f"  load / least: {loading / shortest:.2f}, to be at most {BAR}")
    sys.exit(loading / shortest > BAR)


def run(options: argparse.Namespace, what: str) -> dict[str, float]:
    """This script again, as a process that does one of the two."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
    command = [sys.executable, __file__, "--model", options.model, "--dtype", options.dtype, "--one", what]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def load(folder: Path, dtype: str) -> dict[str, float]:
    """The model as training loads it."""
    import jax

    from models.decoder import abstract_params
    from models.families import decoder_config
    from models.sharding import make_mesh, parameter_shardings
    from models.weights import load_params

    config = decoder_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    shardings = parameter_shardings(abstract_params(config, dtype=dtype), make_mesh({"fsdp": -1}))
    return timed(lambda: load_params(folder, config, shardings=shardings, dtype=dtype), jax)


def least(folder: Path, dtype: str) -> dict[str, float]:
    """The bytes of the files, and as many as the arrays have onto the devices, without a glance at what they mean."""
    import jax
    import numpy as np

    from models.decoder import abstract_params
    from models.families import decoder_config
    from models.hub import weight_files
    from models.sharding import make_mesh, parameter_shardings

    config = decoder_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    abstract = abstract_params(config, dtype=dtype)
    shardings = parameter_shardings(abstract, make_mesh({"fsdp": -1}))

    host = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract)

    def read_and_put() -> Any:
        buffer = bytearray(READ)
        for file in weight_files(folder):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
        return jax.tree.map(lambda x, to: jax.device_put(x, to, may_alias=False), host, shardings)

    return timed(read_and_put, jax)


def timed(work: Any, jax: Any) -> dict[str, float]:
    """Seconds and peak memory of `work`, which gives a tree of arrays."""
    jax.block_until_ready(jax.numpy.ones(3) + 1)
    before, start = peak(), time.perf_counter()
    arrays = jax.block_until_ready(work())
    seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    return {"seconds": seconds, "arrays": size, "beyond": peak() - before - size}


def peak() -> int:
    """The peak resident set of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
