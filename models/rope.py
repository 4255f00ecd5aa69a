"""Rotary position embedding, and how its frequencies are scaled for texts beyond the trained context.

B rows, L positions, N heads, H head width, R ≤ H rotated dimensions, P = R / 2 rotated pairs.

Source: RoFormer, arXiv:2104.09864, eq. 34. Scalings are computed as Hugging Face transformers computes them, rounding
included: a last bit of a frequency is an angle of 1e-5 at position 1,000.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Longer(NamedTuple):
    """Other frequencies [P] in documents of more than `context` tokens (LongRoPE, arXiv:2402.13753)."""

    context: int
    frequencies: tuple[float, ...]

    def at(self, lengths_BL: jax.Array) -> jax.Array:
        """Frequencies [1, 1, P], the same for every length beyond the context."""
        return jnp.asarray(self.frequencies, jnp.float32)[None, None, :]


class Growing(NamedTuple):
    """A base θ that grows with the length T of documents of more than `context` tokens (dynamic NTK):
    θ (factor T / context - factor + 1) ^ (R / (R - 2)).
    """

    context: int
    theta: float
    factor: float
    rotated: int

    def at(self, lengths_BL: jax.Array) -> jax.Array:
        """Frequencies [B, L, P] of the documents that are longer than the context, each by its length."""
        lengths_BL = jnp.maximum(lengths_BL, self.context).astype(jnp.float32)
        growth_BL = self.factor * lengths_BL / self.context - (self.factor - 1)
        theta_BL = self.theta * growth_BL ** (self.rotated / (self.rotated - 2))
        return 1 / theta_BL[..., None] ** jnp.asarray(_exponents(self.rotated))[None, None, :]


@dataclass(frozen=True)
class Rope:
    """How positions rotate queries and keys: radians per position of each pair, in documents beyond the trained context
    perhaps others; a factor of cosines and sines; whether pairs are neighbours (2p, 2p + 1) or (p, p + P); and where
    positions have several axes, such as a row and a column, by which of them each pair is turned.
    """

    frequencies: tuple[float, ...]
    beyond: Longer | Growing | None = None
    factor: float = 1.0
    interleaved: bool = False
    axes: tuple[int, ...] = ()

    def tables(self, positions_BL: jax.Array, lengths_BL: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B, L, P] in float32, times the factor, of positions [B, L] or, with axes, [B, L, A].

        `lengths_BL` is the length of the document that each token belongs to; None: the row is one document, which ends
        at its largest position. It is the document that decides, and not the batch, so that packed is as separate.
        """
        frequencies_BLP = jnp.asarray(self.frequencies, jnp.float32)[None, None, :]
        if self.axes and positions_BL.ndim == 3:
            return self._by_axes(positions_BL, frequencies_BLP)
        if self.beyond is not None:
            if lengths_BL is None:
                lengths_BL = jnp.max(positions_BL, axis=1, keepdims=True) + 1
            longer_BL1 = lengths_BL[..., None] > self.beyond.context
            frequencies_BLP = jnp.where(longer_BL1, self.beyond.at(lengths_BL), frequencies_BLP)
        return self._of(positions_BL.astype(jnp.float32)[..., None] * frequencies_BLP)

    def _by_axes(self, positions_BLA: jax.Array, frequencies_BLP: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert self.beyond is None, "positions on axes, and frequencies by length"
        return self._of(positions_BLA[..., np.array(self.axes)].astype(jnp.float32) * frequencies_BLP)

    def _of(self, angles_BLP: jax.Array) -> tuple[jax.Array, jax.Array]:
        cos_BLP, sin_BLP = jnp.cos(angles_BLP), jnp.sin(angles_BLP)
        return (cos_BLP, sin_BLP) if self.factor == 1.0 else (cos_BLP * self.factor, sin_BLP * self.factor)


def rotate(x_BLNH: jax.Array, cos_BLP: jax.Array, sin_BLP: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate the first R dimensions of every head by its position's angles, and leave the others; computed in float32,
    returned in the dtype of `x_BLNH`.
    """
    rotated = 2 * cos_BLP.shape[-1]
    x_BLNR = x_BLNH[..., :rotated].astype(jnp.float32)
    cos, sin = cos_BLP[:, :, None, :], sin_BLP[:, :, None, :]
    if interleaved:
        first, second = x_BLNR[..., 0::2], x_BLNR[..., 1::2]
    else:
        first, second = jnp.split(x_BLNR, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    x_BLNR = jnp.stack(turned, axis=-1).reshape(x_BLNR.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    x_BLNR = x_BLNR.astype(x_BLNH.dtype)
    if rotated == x_BLNH.shape[-1]:
        return x_BLNR
    return jnp.concatenate([x_BLNR, x_BLNH[..., rotated:]], axis=-1)


def document_lengths(positions_BL: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """The length of each token's document, int32 [B, L]: one more than the document's last position.

    A document's tokens stand together, in order, and have one segment number, unlike their neighbours'.
    """
    L = positions_BL.shape[1]
    index_L = jnp.arange(L, dtype=jnp.int32)[None, :]
    next_BL = jnp.concatenate([segments_BL[:, 1:], jnp.full_like(segments_BL[:, :1], -1)], axis=1)
    ends_BL = jnp.where(segments_BL != next_BL, index_L, L - 1)
    end_BL = jax.lax.cummin(ends_BL, axis=1, reverse=True)
    return (positions_BL + (end_BL - index_L) + 1).astype(jnp.int32)


class Plain(NamedTuple):
    """What every scaling begins with: the base, how many dimensions of a head rotate, the longest text meant to come,
    and the longest in pretraining (each None where config.json says none).
    """

    theta: float
    rotated: int
    context: int | None
    original: int | None


class Scaled(NamedTuple):
    """What a scaling makes: frequencies [P], the factor of cosines and sines, what differs in long documents."""

    frequencies: np.ndarray
    factor: float = 1.0
    beyond: Longer | Growing | None = None


def rope_config(
    fields: Any,
    *,
    head_width: int,
    layer_type: str | None = None,
    theta: float | None = None,
    partial: float = 1.0,
    interleaved: bool = False,
) -> Rope:
    """Rotation from `config.json` (a `models.families.Fields`): transformers 5's `rope_parameters`, or what older files
    have instead.

    `layer_type` names the layers, where a family rotates by type of layer; `theta` (None: the file must have one) and
    `partial`, the rotated part of each head, are the family's own where the file says nothing. ValueError where the
    file asks for what is not computed here.
    """
    parameters = _parameters(fields, layer_type)
    kind = _kind(parameters)
    if kind not in SCALINGS:
        raise ValueError(f"not implemented yet: rope type {kind!r} in config.json; implemented: {', '.join(SCALINGS)}")
    base = parameters.pop("rope_theta", None) or theta
    if base is None:
        raise ValueError("config.json lacks the base of its rotary positions: rope_theta, or rope_parameters with one")
    part = parameters.pop("partial_rotary_factor", None)
    sections = parameters.pop("mrope_section", ())
    parameters.pop("mrope_interleaved", None)  # a family is or is not: `alternating`
    original = fields.get("original_max_position_embeddings", None) or parameters.get(
        "original_max_position_embeddings"
    )
    if kind in ("llama3", "yarn", "longrope"):
        parameters.pop("original_max_position_embeddings", None)
    plain = Plain(
        theta=float(base),
        rotated=int(head_width * (partial if part is None else part)),
        context=fields.get("max_position_embeddings", None),
        original=original,
    )
    try:
        scaled = SCALINGS[kind](plain, **parameters)
    except TypeError as error:
        raise ValueError(f"rope of type {kind!r} in config.json: {error}") from None
    axes = tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))
    if axes and (len(axes) != len(scaled.frequencies) or scaled.beyond is not None):
        pairs = len(scaled.frequencies)
        raise ValueError(f"mrope_section in config.json: {sections} for {pairs} pairs of rope type {kind!r}")
    return Rope(_floats(scaled.frequencies), scaled.beyond, float(scaled.factor), interleaved, axes)


def alternating(rope: Rope) -> Rope:
    """Rotation whose pairs take turns, time, height, width, time, …, until one axis has as many as before and the rest
    is time's.
    """
    axes = [0] * len(rope.frequencies)
    for axis in (1, 2):
        for pair in range(axis, min(3 * rope.axes.count(axis), len(axes)), 3):
            axes[pair] = axis
    return replace(rope, axes=tuple(axes))


def axial_rope(*, head_width: int, theta: float) -> Rope:
    """Rotation of patches: the first half of the pairs by their row, the second by their column, at the same
    frequencies.
    """
    each = _floats(1 / _powers(theta, head_width // 2))
    return Rope(each * 2, axes=(0,) * len(each) + (1,) * len(each))


def _parameters(fields: Any, layer_type: str | None) -> dict[str, Any]:
    """All that the file says about rotation in layers of a type, in today's words."""
    stored, older = fields.get("rope_parameters", {}), fields.get("rope_scaling", {})
    theta = fields.get("rotary_emb_base", fields.get("rope_theta", None))
    part = fields.get("rotary_pct", fields.get("partial_rotary_factor", None))
    if layer_type is None:
        own = older or stored
        if nested := [name for name, value in own.items() if isinstance(value, Mapping)]:
            raise ValueError(f"not implemented yet: rotation by type of layer in config.json: {', '.join(nested)}")
    else:
        if stored and layer_type not in stored:
            raise ValueError(f"rope_parameters in config.json: no entry for {layer_type!r}, but {', '.join(stored)}")
        own = stored.get(layer_type) or {}
        local = fields.get("rope_local_base_freq", None)
        if layer_type == "sliding_attention":  # neither `rope_theta` nor `rope_scaling` ever meant these layers
            theta = local
        else:
            own = {**own, **older}
    return {"rope_theta": theta, "partial_rotary_factor": part} | dict(own)


def _kind(parameters: dict[str, Any]) -> str:
    """Take the kind of scaling out of the parameters; LongRoPE went by other names in the first files of Phi 3."""
    older = parameters.pop("type", None)
    kind = parameters.pop("rope_type", None) or older or "default"
    if kind == "mrope":  # what older files call the axes of Qwen2-VL's positions
        return "default"
    return "longrope" if kind == "su" or (kind == "yarn" and "long_factor" in parameters) else kind


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values.astype(np.float32))


def _exponents(rotated: int) -> np.ndarray:
    """0, 2 / R, 4 / R, … in float32 [P]."""
    return np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)


def _powers(theta: float, rotated: int) -> np.ndarray:
    """θ ^ (2 p / R) of a base in float32, rounded to it once [P]; the frequencies are the inverses."""
    return (np.float64(np.float32(theta)) ** _exponents(rotated).astype(np.float64)).astype(np.float32)


def _default(plain: Plain) -> Scaled:
    return Scaled(1 / _powers(plain.theta, plain.rotated))


def _linear(plain: Plain, *, factor: float) -> Scaled:
    """All frequencies divided, as if positions were closer (arXiv:2306.15595)."""
    return Scaled(1 / _powers(plain.theta, plain.rotated) / factor)


def _dynamic(plain: Plain, *, factor: float) -> Scaled:
    if plain.context is None:
        raise TypeError("max_position_embeddings is missing")
    growth = factor * plain.context / plain.context - (factor - 1)  # 1, but for what rounding leaves of `factor`
    theta = plain.theta * growth ** (plain.rotated / (plain.rotated - 2))
    growing = Growing(plain.context, plain.theta, factor, plain.rotated)
    return Scaled(1 / _powers(theta, plain.rotated), beyond=growing)


def _llama3(plain: Plain, *, factor: float, low_freq_factor: float, high_freq_factor: float) -> Scaled:
    """Slow pairs (wavelength beyond the trained context) are divided by `factor`, fast ones kept, those between
    interpolated (Meta's Llama 3.1 release).
    """
    original = _original(plain)
    inverse_P = 1 / _powers(plain.theta, plain.rotated)
    wavelength_P = 1 / inverse_P * (2 * math.pi)
    blend_P = (1 / wavelength_P * original - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended_P = (1 - blend_P) * inverse_P / factor + blend_P * inverse_P
    slow_P = wavelength_P > np.float32(original / low_freq_factor)
    fast_P = wavelength_P < np.float32(original / high_freq_factor)
    return Scaled(np.where(slow_P, inverse_P / factor, np.where(fast_P, inverse_P, blended_P)))


def _yarn(
    plain: Plain,
    *,
    factor: float | None,
    attention_factor: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> Scaled:
    """Pairs that turn fewer than `beta_slow` times in the trained context are divided by `factor`, those that turn more
    than `beta_fast` times kept, a ramp between (arXiv:2309.00071, §3.2 and 3.4).
    """
    original, R = _original(plain), plain.rotated
    if factor is None:
        factor = _times(plain, original)

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
    elif attention_factor is None:
        attention_factor = magnitude(1)

    def pair_that_turns(times: float) -> float:
        return R * math.log(original / (times * 2 * math.pi)) / (2 * math.log(plain.theta))

    first, last = pair_that_turns(beta_fast or 32), pair_that_turns(beta_slow or 1)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, R - 1)
    width = (last + 0.001 if last == first else last) - first
    powers_P = _powers(plain.theta, R)
    ramp_P = np.clip((np.arange(len(powers_P), dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
    kept_P = 1 - ramp_P
    return Scaled(1 / (factor * powers_P) * (1 - kept_P) + 1 / powers_P * kept_P, attention_factor)


def _longrope(
    plain: Plain,
    *,
    short_factor: list[float],
    long_factor: list[float],
    factor: float | None = None,
    attention_factor: float | None = None,
) -> Scaled:
    """Each pair is divided by a factor of its own, of which there is a list for documents within the trained context
    and one for those beyond (arXiv:2402.13753).
    """
    if plain.original is None:
        raise TypeError("original_max_position_embeddings is missing")
    powers_P = _powers(plain.theta, plain.rotated)
    if not len(short_factor) == len(long_factor) == len(powers_P):
        raise TypeError(f"{len(short_factor)} and {len(long_factor)} factors for {len(powers_P)} pairs")
    if factor is None:
        factor = _times(plain, plain.original)
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(plain.original))
    short_P, long_P = (1 / (np.asarray(each, np.float32) * powers_P) for each in (short_factor, long_factor))
    return Scaled(short_P, attention_factor, Longer(plain.original, _floats(long_P)))


def _original(plain: Plain) -> int:
    """The longest text in pretraining, which is the longest there is where the file names no other."""
    if (original := plain.original or plain.context) is None:
        raise TypeError("original_max_position_embeddings is missing")
    return original


def _times(plain: Plain, original: int) -> float:
    if plain.context is None:
        raise TypeError("factor and max_position_embeddings are missing")
    return plain.context / original


SCALINGS: dict[str, Callable[..., Scaled]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
