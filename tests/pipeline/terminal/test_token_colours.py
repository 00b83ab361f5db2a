"""Colours of tokens that people tell apart: in 256 colours, in 16, without any, and with colour-blind eyes."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.color import Color, ColorSystem

from adpa.pipeline.terminal.token_colours import STEPS, TEXTS, ZERO, colour, step

Rgb = tuple[int, int, int]

# Of linear sRGB. Protan and deutan: Viénot, Brettel and Mollon 1999, "Digital video colourmaps for checking the
# legibility of displays by dichromats". Tritan: Brettel, Viénot and Mollon 1997, "Computerized simulation of color
# appearance for dichromats", two half-planes and the plane between them. The numbers are those of libDaltonLens.
VIENOT = {
    "protan": np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
    "deutan": np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]),
}
TRITAN = (
    np.array([[1.01277, 0.13548, -0.14826], [-0.01243, 0.86812, 0.14431], [0.07589, 0.80500, 0.11911]]),
    np.array([[0.93678, 0.18979, -0.12657], [0.06154, 0.81526, 0.12320], [-0.37562, 1.12767, 0.24796]]),
)
TRITAN_PLANE = np.array([0.03901, -0.02788, -0.01113])
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])  # D65
EYES = ["usual", "protan", "deutan", "tritan"]


def shown(index: int, colours: ColorSystem = ColorSystem.TRUECOLOR) -> Rgb:
    """What a terminal with so many colours shows of a step."""
    return tuple(Color.parse(STEPS[index]).downgrade(colours).get_truecolor())  # type: ignore[return-value]


def linear(rgb: Rgb) -> NDArray[np.float64]:
    values = np.array(rgb) / 255
    return np.asarray(np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4))


def contrast(one: Rgb, other: Rgb) -> float:
    """The contrast ratio of WCAG 2."""
    low, high = sorted(float(linear(rgb) @ [0.2126, 0.7152, 0.0722]) for rgb in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: Rgb, eyes: str) -> NDArray[np.float64]:
    """CIE L*a*b* of a colour as these eyes see it."""
    seen = linear(rgb)
    if eyes == "tritan":
        seen = TRITAN[0 if seen @ TRITAN_PLANE >= 0 else 1] @ seen
    elif eyes != "usual":
        seen = VIENOT[eyes] @ seen
    xyz = TO_XYZ @ np.clip(seen, 0, 1) / WHITE
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def difference(one: Rgb, other: Rgb, eyes: str) -> float:
    """CIE76: a difference of 2.3 is just noticeable."""
    return float(np.linalg.norm(lab(one, eyes) - lab(other, eyes)))


def test_values_have_the_step_of_their_share_of_the_scale() -> None:
    values = [-9, -2, -1.7, -1.6, -1, -0.4, -0.3, 0, 0.3, 0.4, 1, 1.6, 1.7, 2, 9]
    assert [step(value, 2.0) for value in values] == [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 6, 6]
    assert [step(value, 0.5) for value in (-0.5, -0.2, 0.0, 0.2, 0.5)] == [0, 2, 3, 4, 6]


@pytest.mark.parametrize("colours", [ColorSystem.TRUECOLOR, ColorSystem.EIGHT_BIT, ColorSystem.STANDARD])
@pytest.mark.parametrize("index", range(len(STEPS)))
def test_the_text_can_be_read_on_every_step(index: int, colours: ColorSystem) -> None:
    text = tuple(Color.parse(TEXTS[index]).downgrade(colours).get_truecolor())
    assert contrast(shown(index, colours), text) >= 4.5  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-3, -2, -1])
def test_256_colours_keep_every_step_and_16_the_signs(value: int) -> None:
    eight = [Color.parse(one).downgrade(ColorSystem.EIGHT_BIT).number for one in STEPS]
    assert len({*eight}) == len(STEPS)
    coloured = [index for index in range(len(STEPS)) if index != ZERO]
    assert [shown(index, ColorSystem.EIGHT_BIT) for index in coloured] == [shown(index) for index in coloured]
    few = [Color.parse(one).downgrade(ColorSystem.STANDARD).number for one in STEPS]
    if value < -1:  # the weakest steps are white there, like zero
        assert few[ZERO + value] not in few[ZERO:]
        assert few[ZERO - value] not in few[: ZERO + 1]


@pytest.mark.parametrize("colours", [ColorSystem.TRUECOLOR, ColorSystem.EIGHT_BIT])
@pytest.mark.parametrize("eyes", EYES)
def test_the_steps_differ_for_every_eye_and_the_signs_most(eyes: str, colours: ColorSystem) -> None:
    steps = [shown(index, colours) for index in range(len(STEPS))]
    assert min(difference(*pair, eyes) for pair in pairwise(steps)) > 10
    below, above = steps[:ZERO], steps[ZERO + 1 :]
    assert min(difference(one, other, eyes) for one in below for other in above) > 30


@pytest.mark.parametrize("colours", [ColorSystem.TRUECOLOR, ColorSystem.EIGHT_BIT])
@pytest.mark.parametrize("eyes", EYES)
def test_the_steps_stay_in_order(eyes: str, colours: ColorSystem) -> None:
    """From yellow to blue, and darker away from zero on both sides."""
    seen = np.array([lab(shown(index, colours), eyes) for index in range(len(STEPS))])
    assert (np.diff(seen[:, 2]) < 0).all()
    lightness = seen[:, 0]
    assert (np.diff(lightness[:ZERO]) > 5).all()
    assert (np.diff(lightness[ZERO + 1 :]) < -5).all()


def test_without_colours_what_is_below_zero_is_underlined() -> None:
    styles = [colour(value, 1.0) for value in (-1, -0.2, -0.1, 0, 0.1, 1)]
    assert [style.underline for style in styles] == [True, True, False, False, False, False]
