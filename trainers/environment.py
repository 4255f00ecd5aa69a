"""On what a run runs: versions of the packages that decide its numbers, and devices."""

import importlib.metadata
import platform

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def versions() -> dict[str, str | None]:
    """The version of Python and of each of `PACKAGES`, None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def describe_environment() -> dict[str, str]:
    """Devices, system and versions in words, for people."""
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    installed = {name: version for name, version in versions().items() if version is not None}
    return {"devices": devices + processes, "system": platform.platform(terse=True)} | installed


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
