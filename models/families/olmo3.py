"""OLMo 3: OLMo 2 with a window in three of four layers; yarn stretches the rotation of the fourth alone."""

from models.config import DecoderConfig, Layer
from models.families import Fields, llama, olmo2

WEIGHTS, IGNORED = olmo2.WEIGHTS, olmo2.IGNORED
THETA = 500_000.0


def config(fields: Fields) -> DecoderConfig:
    """The decoder of an `Olmo3Config`."""
    near = Layer(fields["sliding_window"], llama.rope(fields, theta=THETA, layer_type="sliding_attention"))
    far = Layer(None, llama.rope(fields, theta=THETA, layer_type="full_attention"))
    slides = llama.sliding(fields, llama.all_but_every(fields, 4))
    return olmo2.plain(fields, each=[near if one else far for one in slides])
