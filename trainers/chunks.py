"""How the tokens of a batch meet the vocabulary: some at a time, each device with its own part of the vocabulary.

B rows, L positions, D width, V vocabulary, N devices; R rows of n positions, where tokens split over devices are rows
of their own; c columns of a chunk.

A chunk's tokens are sent to all devices, and each multiplies them with V / N rows of the head. So no device ever holds
the whole head or its gradient, whatever the mesh, and what is sent are hidden states, of a chunk, and not the head.
Where copies of the model add up their gradients apart (`trainers/step.py`), N are the devices of one copy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.sharding import ROWS, constrain, cooperating

VOCABULARY = ("tensor", "data", "fsdp", "expert", "context")  # what the head's rows are split over
PLACES = (*ROWS, "context")  # what the tokens are
MASKED = -1e30  # finite: 0 times it is 0


class Chunks(NamedTuple):
    """Which tokens meet the vocabulary together: of each of R rows the wanted ones first, so many columns a chunk."""

    order_Rn: jax.Array
    columns: int

    def cut(self, x: jax.Array) -> jax.Array:
        """[B, L, …] in this order, padded with zeros, as pieces [steps, R, c, …]."""
        R, n = self.order_Rn.shape
        steps = -(-n // self.columns)
        x = constrain(x.reshape(R, n, *x.shape[2:]), PLACES)
        x = jnp.take_along_axis(x, self.order_Rn.reshape(R, n, *(1,) * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, [(0, 0), (0, steps * self.columns - n)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(R, steps, self.columns, *x.shape[2:]), 1, 0)

    def joined(self, pieces: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """The inverse of `cut`, of this shape [B, L]."""
        R, n = self.order_Rn.shape
        x = jnp.moveaxis(pieces, 0, 1).reshape(R, -1, *pieces.shape[3:])[:, :n]
        back_Rn = jnp.argsort(self.order_Rn, axis=1)
        x = jnp.take_along_axis(x, back_Rn.reshape(R, n, *(1,) * (x.ndim - 2)), axis=1)
        return x.reshape(*shape, *x.shape[2:])


def chunks_of(wanted_BL: jax.Array, chunk: int) -> Chunks:
    """Chunks of about `chunk` tokens; of more on many devices, so that each has enough to do."""
    mesh = jax.sharding.get_abstract_mesh()
    B, L = wanted_BL.shape
    parts = 1 if mesh.empty or L % mesh.shape["context"] else mesh.shape["context"]
    wanted_Rn = constrain(wanted_BL.reshape(B * parts, L // parts), PLACES)
    R, n = wanted_Rn.shape
    tokens = chunk * max(1, cooperating() // 8)
    return Chunks(jnp.argsort(~wanted_Rn, axis=1, stable=True), max(1, min(n, tokens // R)))


def seen_by_all(piece: Any) -> Any:
    """The tokens of a chunk [R, c, …], each array of which all devices then have, as [T, …]."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim).reshape(-1, *x.shape[2:]), piece)


def given_back(x_TD: jax.Array, piece: jax.Array) -> jax.Array:
    """[T, D] as the piece [R, c, D] that it was made of, in its dtype and where its tokens lie."""
    return constrain(x_TD.reshape(piece.shape), PLACES).astype(piece.dtype)


def split_vocabulary(x: jax.Array) -> jax.Array:
    """An array [V, …] split over all devices, with zeros behind it where these do not divide V."""
    more = -x.shape[0] % cooperating()
    return constrain(jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) if more else x, VOCABULARY)


def narrow_head(head: tuple[jax.Array, jax.Array | None], dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """A head's kernel in the dtype of the products, and its bias, each device with its part."""
    return split_vocabulary(head[0].astype(dtype)), None if head[1] is None else split_vocabulary(head[1])


def of_words(x_TV: jax.Array, vocabulary: int, other: float = 0.0) -> jax.Array:
    """The same array with `other` in the places that `split_vocabulary` put behind the words."""
    if x_TV.shape[1] == vocabulary:
        return x_TV
    return jnp.where((jnp.arange(x_TV.shape[1]) < vocabulary)[None, :], x_TV, other)


def split_logits(logits_TV: jax.Array, vocabulary: int) -> jax.Array:
    """Logits of a chunk, each device with those of its part of the vocabulary; those of no word are masked."""
    return constrain(of_words(logits_TV, vocabulary, MASKED), None, VOCABULARY)


def mean_of_words(x_TV: jax.Array, vocabulary: int) -> jax.Array:
    """The mean [T] over the vocabulary, without what was put behind it."""
    return of_words(x_TV, vocabulary).sum(axis=-1) / vocabulary
