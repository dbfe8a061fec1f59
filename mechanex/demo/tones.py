"""What the demo steers towards, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["N_LAYERS", "STEPS", "STRENGTHS", "TONES", "Tone"]

# In calibrated doses; examples are shown at 0 and 1.
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
# Of a model, that are tried for each tone.
N_LAYERS = 3


@dataclass(frozen=True)
class Tone:
    """One tone and where its vector comes from.

    Args:
        name: the tone, as in ``bundled.tone_words``.
        dataset: the contrastive dataset.
        sign: 1 where the tone is the dataset's positive side, -1 where it is the negative one.
    """

    name: str
    dataset: str
    sign: int


TONES = (
    Tone("angry", "calm_angry", -1),
    Tone("hopeful", "hopeful_gloomy", 1),
    Tone("gloomy", "hopeful_gloomy", -1),
)

# Of the progress bar: for a tone its vectors, the plain model on train prompts, two for each layer, and the strengths;
# before them all torch, the rest of the library and the model.
STEPS = 3 + len(TONES) * (2 + 2 * N_LAYERS + len(STRENGTHS))
