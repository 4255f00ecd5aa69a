"""Rotary position embedding, and how its frequencies are scaled.

B rows, L positions, N heads, H head width, P = H / 2 rotated pairs. Pairs are (h, h + P), as in Hugging Face
checkpoints. Source: RoFormer, arXiv:2104.09864, eq. 34; the llama3 scaling is the one of Meta's Llama 3.1 release.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """Rotation frequencies of each pair, radians per position."""

    frequencies: tuple[float, ...]

    def tables(self, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B, L, P] in float32 for the given positions."""
        frequencies_P = jnp.asarray(self.frequencies, jnp.float32)
        angles_BLP = positions_BL.astype(jnp.float32)[..., None] * frequencies_P[None, None, :]
        return jnp.cos(angles_BLP), jnp.sin(angles_BLP)


def rotate(x_BLNH: jax.Array, cos_BLP: jax.Array, sin_BLP: jax.Array) -> jax.Array:
    """Rotate every pair of `x_BLNH` by its position's angle; computed in float32, returned in the dtype of `x_BLNH`."""
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BLP[:, :, None, :], sin_BLP[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLNH.dtype)


def rope_config(fields: Any, *, head_width: int) -> Rope:
    """Frequencies from `config.json`, in transformers 5 form (`rope_parameters`) or the older `rope_theta` +
    `rope_scaling`.
    """
    parameters = dict(fields.get("rope_parameters", {}) or fields.get("rope_scaling", {}))
    theta = parameters.pop("rope_theta", None) or fields["rope_theta"]
    fields.get("rope_theta", None)
    fields.get("rope_scaling", None)
    kind = parameters.pop("rope_type", None) or parameters.pop("type", "default")
    parameters.pop("type", None)
    if kind not in SCALINGS:
        raise ValueError(f"not implemented yet: rope type {kind!r} in config.json; implemented: {', '.join(SCALINGS)}")
    # In float32, rounded where transformers rounds: a last bit of a frequency is an angle of 1e-5 at position 1,000.
    power_P = np.float32(theta) ** (np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width))
    inverse_P = np.float32(1) / power_P
    try:
        scaled_P = SCALINGS[kind](inverse_P, **parameters)
    except TypeError as error:
        raise ValueError(f"rope of type {kind!r} in config.json: {error}") from None
    return Rope(tuple(float(f) for f in np.asarray(scaled_P, np.float32)))


def _default(inverse_P: np.ndarray) -> np.ndarray:
    return inverse_P


def _linear(inverse_P: np.ndarray, *, factor: float) -> np.ndarray:
    return inverse_P / factor


def _llama3(
    inverse_P: np.ndarray,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """Slow pairs (wavelength beyond the trained context) are divided by `factor`, fast ones kept, those between
    interpolated.
    """
    wavelength_P = np.float32(2 * math.pi) / inverse_P
    trained = original_max_position_embeddings
    blend_P = (trained / wavelength_P - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend_P = np.clip(blend_P, 0.0, 1.0)
    return (1 - blend_P) * (inverse_P / factor) + blend_P * inverse_P


SCALINGS: dict[str, Callable[..., np.ndarray]] = {"default": _default, "linear": _linear, "llama3": _llama3}
