"""What preference methods share: the log-probability of every answer in a batch, under policy and reference.

B rows, L positions, K answers of a row. A row is a prompt with its answers (`input_pipeline/pairs.py`): `branches`
tells them apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.config import Compute, DecoderConfig
from models.decoder import Params, head, routed_hidden_states
from models.lora import merged, with_dropout
from models.moe import RouterStats
from models.vision import Images
from trainers.logprobs import row_sums, token_scores
from trainers.preference import desensitized
from trainers.reference import Frozen, reference_params
from trainers.step import Batch

LOGGED = ("entropy", "mean_logit", "correct")  # what `preference.token_metrics` logs


class Scorer(NamedTuple):
    """How a model scores a batch. `shared`: prompts stand once, and branches part from them, if there are any; logits
    are divided by `temperature`.
    """

    config: DecoderConfig
    compute: Compute
    shared: bool
    temperature: float = 1.0

    def scores(
        self,
        params: Params,
        batch: Batch,
        weights_BL: jax.Array,
        *,
        also: tuple[str, ...] = (),
        entropy_gradient: bool = False,
    ) -> tuple[dict[str, jax.Array], RouterStats | None]:
        """`token_scores` of the targets with a weight, float32 [B, L], and what the routers did."""
        segments_BL, branches_BL = batch["segments"], batch.get("branches")
        if branches_BL is not None and not self.shared:  # every answer is a document of its own
            segments_BL = jnp.where(segments_BL > 0, segments_BL + branches_BL, 0)
        hidden_BLD, routers = routed_hidden_states(
            params,
            self.config,
            tokens_BL=batch["tokens"],
            positions_BL=batch["positions"],
            segments_BL=segments_BL,
            branches_BL=branches_BL if self.shared else None,
            images=Images.of(batch),
            compute=self.compute,
        )
        out = head(params, self.config)
        found = token_scores(
            hidden_BLD,
            out.kernel_VD,
            batch["targets"],
            also=also,
            weights_BL=weights_BL,
            bias_V=out.bias_V,
            softcap=out.softcap,
            temperature=self.temperature,
            entropy_gradient=entropy_gradient,
        )
        return found, routers

    def policy(self, params: Params, frozen: Frozen, key: jax.Array | None) -> Params:
        """The whole model being trained; with a key, its adapter drops some of its inputs."""
        params, lora = merged(params, frozen.model), self.compute.lora
        return params if key is None or lora is None or not lora.dropout else with_dropout(params, lora, key)

    def reference(self, frozen: Frozen, batch: Batch) -> jax.Array:
        """The reference's log-probability of every target of an answer [B, L], or where it is known beforehand that of
        each answer, at its first.
        """
        if "reference" in batch:
            return batch["reference"]
        return self.scores(reference_params(frozen), batch, batch["weights"])[0]["logprob"]


def branch(batch: Batch, number: int) -> jax.Array:
    """1.0 for the predictions [B, L] that belong to a row's answer of this number."""
    return jnp.where(batch["branches"] == number, batch["weights"], 0.0)


def by_answer(values_BL: jax.Array, batch: Batch, together: int) -> jax.Array:
    """Values [B, L] of rows that have so many answers each, as a row for each answer [B * together, L], 0 wherever
    others stand; as they are where rows have one.
    """
    if together == 1:
        return values_BL
    numbers_K = jnp.arange(1, together + 1, dtype=batch["branches"].dtype)
    own_BKL = batch["branches"][:, None, :] == numbers_K[None, :, None]
    return jnp.where(own_BKL, values_BL[:, None, :], 0).reshape(-1, values_BL.shape[1])


def prompt_and_answer(batch: Batch, number: int) -> jax.Array:
    """1.0 for every prediction [B, L] of a prompt and its answer of this number."""
    own_BL = (batch["segments"] > 0) & ((batch["branches"] == 0) | (batch["branches"] == number))
    next_BL = jnp.pad(batch["branches"][:, 1:], ((0, 0), (0, 1)))
    more_BL = jnp.pad(batch["segments"][:, 1:] > 0, ((0, 0), (0, 1)))
    last_BL = (next_BL != batch["branches"]) & (batch["branches"] > 0)  # the next token is another answer's
    return jnp.where(own_BL & more_BL & ~last_BL, 1.0, 0.0)


def answer_sums(values_BL: jax.Array, *weights_BL: jax.Array) -> tuple[jax.Array, ...]:
    """The sums over each row's answers, [B] for each of the weights."""
    return tuple(row_sums(values_BL, each) for each in weights_BL)


def answer_tokens(weights_BL: jax.Array) -> jax.Array:
    """How many tokens the answer of these weights has, float32 [B]."""
    return (weights_BL > 0).sum(axis=1).astype(jnp.float32)


def reference_logprobs(
    scorer: Scorer, *, numbers: tuple[int, ...], ld_alpha: float | None = None
) -> Callable[[Frozen, Batch], jax.Array]:
    """A function (frozen, batch [B, L]) → float32 [B, K]: the reference's log-probabilities of the answers of these
    numbers.
    """

    def compute(frozen: Frozen, batch: Batch) -> jax.Array:
        weights = [branch(batch, number) for number in numbers]
        if ld_alpha is not None:
            weights = list(desensitized(*weights, ld_alpha=ld_alpha))
        found, _ = scorer.scores(reference_params(frozen), batch, batch["weights"])
        return jnp.stack(answer_sums(found["logprob"], *weights), axis=1)

    return compute
