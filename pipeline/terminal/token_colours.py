"""The colours of tokens: orange below zero, grey at zero, blue above, in seven steps.

The steps are colours of the 256-colour palette, so that they are the same there. Blue and orange also differ for
colour-blind eyes, and both darken away from zero. Without colours, the tokens below zero are underlined.
"""

from rich.style import Style

STEPS = ("#d75f00", "#ffaf5f", "#ffd7af", "#dadada", "#afd7ff", "#5fafff", "#005fff")
TEXTS = (*["#000000"] * 6, "#ffffff")  # on each step
ZERO = len(STEPS) // 2


def step(value: float, scale: float) -> int:
    """The place of a value's colour in ``STEPS``; the first and the last are for −scale and scale, and beyond."""
    return ZERO + round(ZERO * max(-1.0, min(value / scale, 1.0)))


def colour(value: float, scale: float) -> Style:
    """The style of a token in a terminal."""
    place = step(value, scale)
    return Style(color=TEXTS[place], bgcolor=STEPS[place], underline=place < ZERO)
