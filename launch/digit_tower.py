"""The vision quickstart's eyes: a small vision tower learns to tell digits apart, before it joins a language model.

A tower that has seen nothing cannot be taught through a language model in minutes, so it learns by itself first, as
CLIP's do on far more: it sorts the training pictures, shifted a little, into ten classes, through a linear layer on the
mean of its features, which is thrown away then. 1,500 steps take some fifteen seconds on two CPU cores. The language
model gets features that tell digits apart, and no word for any of them: that is what fine-tuning is for.
"""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from input_pipeline.processors.processor import grid
from models.config import Compute
from models.sharding import nested, paths
from models.vision import Images, Params, Vision, tower_outputs

STEPS, BATCH, RATE = 1500, 64, 2e-3
SHIFT = 2  # pixels, at most


def trained_tower(
    vision: Vision, leaves: Mapping[str, Any], pictures: np.ndarray, labels: np.ndarray, *, steps: int = STEPS
) -> dict[str, jax.Array]:
    """The leaves of a tower by their paths, `leaves` at first, after it has learned the labels [n] of pictures
    [n, H, W], greys up to 255; says on stderr how many it tells.
    """
    trained: Params = {
        "tower": nested(dict(leaves)),
        "head": {"kernel": jnp.zeros((vision.width, labels.max() + 1)), "bias": jnp.zeros(labels.max() + 1)},
    }
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    state, random = optimizer.init(trained), np.random.default_rng(0)

    @jax.jit
    def step(trained: Params, state: Any, patches_BPC: jax.Array, labels_B: jax.Array) -> tuple[Params, Any]:
        def loss(trained: Params) -> jax.Array:
            scores_BK = _scores(trained, vision, patches_BPC)
            return optax.softmax_cross_entropy_with_integer_labels(scores_BK, labels_B).mean()

        updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    for _ in range(steps):
        rows = random.integers(0, len(pictures), BATCH)
        trained, state = step(trained, state, patches_of(shifted(pictures[rows], random), vision), labels[rows])
    told = jax.jit(lambda trained, patches: _scores(trained, vision, patches))(trained, patches_of(pictures, vision))
    right = int((told.argmax(axis=-1) == labels).sum())
    print(f"a vision tower learned digits: it tells {right:,} of {len(labels):,} pictures right", file=sys.stderr)
    return paths(trained["tower"])


def shifted(pictures: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Pictures [n, H, W], each a few pixels up or down and left or right, on white paper."""
    _, height, width = pictures.shape
    wider = np.pad(pictures, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), constant_values=255)
    corners = random.integers(0, 2 * SHIFT + 1, (len(pictures), 2))
    return np.stack([one[y : y + height, x : x + width] for one, (y, x) in zip(wider, corners, strict=True)])


def patches_of(pictures: np.ndarray, vision: Vision) -> np.ndarray:
    """Pictures [n, H, W], greys up to 255, as the model's image processor makes them: patches [n, P, C], -1 to 1."""
    patch, columns, count = vision.patch, vision.columns, len(pictures)
    scaled = (pictures / 127.5 - 1).astype(np.float32)[:, None].repeat(vision.channels, axis=1)
    cut = scaled.reshape(count, vision.channels, columns, patch, columns, patch)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(count, vision.tile, -1)


def _scores(trained: Params, vision: Vision, patches_BPC: jax.Array) -> jax.Array:
    B = patches_BPC.shape[0]
    ones_BP = jnp.ones((B, vision.tile), jnp.int32)
    places_BP2 = jnp.broadcast_to(grid(vision.columns, vision.columns), (B, vision.tile, 2))
    images = Images(patches_BPC, ones_BP, places_BP2, None)
    features_BPE, _ = tower_outputs({"vision": trained["tower"]["vision"]}, vision, images, Compute())
    head = trained["head"]
    return features_BPE.mean(axis=1) @ head["kernel"] + head["bias"][None, :]
