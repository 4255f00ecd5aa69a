"""The linear layer of every family.

B rows, L tokens, D inputs, F outputs, R the rank of an adapter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Module):
    """`x @ kernel + bias`, the kernel as [D, F].

    Shapes alone matter here: modules are built abstractly, their values come from files or from
    `models.decoder.init_params`.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool):
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        out_BLF = matrix_product(x_BLD, self.kernel[...])
        return out_BLF if self.bias is None else out_BLF + self.bias[...][None, None, :]


def matrix_product(x_BLD: jax.Array, kernel_DF: jax.Array, **options: Any) -> jax.Array:
    """A product of matrices, [B L, D] by [D, F], in both passes.

    XLA on CPU transposes whole activations for a weight gradient that sums over two dimensions, which took longer than
    the product itself. Merging rows and tokens costs nothing unless both are split over devices; then they stay apart.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["context"] > 1:
        return jax.lax.dot_general(x_BLD, kernel_DF, (((2,), (0,)), ((), ())), **options)
    B, L, D = x_BLD.shape
    out = jax.lax.dot_general(x_BLD.reshape(B * L, D), kernel_DF, (((1,), (0,)), ((), ())), **options)
    return out.reshape(B, L, kernel_DF.shape[1])
