"""The linear layer of every family, with or without an adapter beside it.

B rows, L tokens, D inputs, F outputs, R the rank of an adapter.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.lora import Lora, column_norms, dropped
from models.quantized import dequantise

TURNED = "kernel_turned"  # a kernel as [F, D], in the place of one as [D, F]: models/decoding.py


class Linear(nnx.Module):
    """`x @ kernel + bias`, the kernel as [D, F].

    Shapes alone matter here: modules are built abstractly, their values come from files or from
    `models.decoder.init_params`. Where the parameter tree has leaves of an adapter beside the kernel (models/lora.py),
    the decoder gives the module attributes of these names, and its product is the adapted one. Where the kernel is
    quantised (models/quantized.py), the two leaves that stand for it are there in its place; so is a turned one.
    """

    kernel_values: nnx.Param
    kernel_scale: nnx.Param
    kernel_turned: nnx.Param

    lora_a: nnx.Param
    lora_b: nnx.Param
    lora_magnitude: nnx.Param
    dropout_key: nnx.Param

    def __init__(self, inputs: int, outputs: int, *, bias: bool):
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None

    def __call__(self, x_BLD: jax.Array, lora: Lora | None = None) -> jax.Array:
        if hasattr(self, TURNED):
            out_BLF = turned_product(x_BLD, self.kernel_turned[...])
        else:
            out_BLF = matrix_product(x_BLD, self._kernel(x_BLD.dtype))
        if hasattr(self, "lora_a"):
            assert lora is not None, "an adapter without its settings: set Compute.lora"
            out_BLF = self._adapted(x_BLD, out_BLF, lora)
        return out_BLF if self.bias is None else out_BLF + self.bias[...][None, None, :]

    def _kernel(self, dtype: Any) -> jax.Array:
        if hasattr(self, TURNED):
            return self.kernel_turned[...].T
        if hasattr(self, "kernel_values"):
            return dequantise(self.kernel_values[...], self.kernel_scale[...]).astype(dtype)
        return self.kernel[...]

    def _adapted(self, x_BLD: jax.Array, out_BLF: jax.Array, lora: Lora) -> jax.Array:
        """`x W + s dropout(x) A B` (arXiv:2106.09685), and of DoRA `m / |W + s A B|` times that (arXiv:2402.09353,
        eq. 5), whose norm over each column is held fixed (section 4.3). peft drops x in both terms of what DoRA adds.
        """
        a_DR, b_RF = self.lora_a[...], self.lora_b[...]
        seen_BLD = dropped(x_BLD, self.dropout_key[...], lora.dropout) if hasattr(self, "dropout_key") else x_BLD
        change_BLF = lora.scale * matrix_product(matrix_product(seen_BLD, a_DR), b_RF)
        if not hasattr(self, "lora_magnitude"):
            return out_BLF + change_BLF
        norms_F = jax.lax.stop_gradient(column_norms(self._kernel(x_BLD.dtype), a_DR, b_RF, lora.scale))
        factor_F = (self.lora_magnitude[...] / norms_F)[None, None, :]
        seen_BLF = out_BLF if seen_BLD is x_BLD else matrix_product(seen_BLD, self._kernel(x_BLD.dtype))
        return out_BLF + (factor_F - 1) * seen_BLF + factor_F * change_BLF


def linear(layer: Mapping[str, jax.Array], x_BLD: jax.Array, lora: Lora | None) -> jax.Array:
    """The product of a linear layer that stands alone, given as its leaves by name, an adapter's among them."""
    kernel_DF = layer["kernel"]
    module = nnx.eval_shape(lambda: Linear(*kernel_DF.shape, bias="bias" in layer))
    for name, leaf in layer.items():
        setattr(module, name, nnx.Param(leaf))
    return module(x_BLD, lora)


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


def turned_product(x: jax.Array, kernel_FD: jax.Array, **options: Any) -> jax.Array:
    """`x @ kernel.T` [..., F] of few rows [..., D], as `(kernel @ x.T).T`: so XLA on CPU reads a kernel twice as fast.
    Barriers keep it from turning the product back.
    """
    x_DR = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    out_FR = jax.lax.dot_general(kernel_FD, x_DR, (((1,), (0,)), ((), ())), **options)
    return jax.lax.optimization_barrier(out_FR).T.reshape(*x.shape[:-1], kernel_FD.shape[0])
