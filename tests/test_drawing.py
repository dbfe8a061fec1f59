"""Drawing helpers: texts cut to a width that matplotlib measures, and glows that can be seen."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechanex import ValidationError
from mechanex.raag import add_glow_effect, truncate_text

pytest.importorskip("matplotlib").use("Agg")

import numpy  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.font_manager import FontProperties  # noqa: E402
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle  # noqa: E402
from matplotlib.textpath import text_to_path  # noqa: E402

LETTERS = st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_categories=["Cc"])
FONT = FontProperties(size=10)


def width(text: str, font: FontProperties = FONT) -> float:
    return float(text_to_path.get_text_width_height_descent(text, font, False)[0])


def test_a_text_that_fits_stays() -> None:
    text = "A short line, with $signs$ in it"
    assert truncate_text(text, width(text), FONT) == text
    assert truncate_text(text, 1e9, FONT) == text
    assert truncate_text("", 0, FONT) == ""


def test_a_text_that_does_not_fit_is_cut_as_late_as_possible() -> None:
    text = "The quick brown fox jumps over the lazy dog"
    cut = truncate_text(text, 100, FONT)
    assert cut.endswith("...") and text.startswith(cut[:-3]) and width(cut) <= 100
    longer = text[: len(cut) - 3 + 2].rstrip() + "..."
    assert width(longer) > 100
    assert len(truncate_text(text, 100, FontProperties(size=20))) < len(cut)
    assert truncate_text(text, 1, FONT) == "..."


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_categories=["Cc"]), max_size=40),
    st.floats(0, 300),
)
def test_whatever_the_text_it_fits_or_is_three_dots(text: str, room: float) -> None:
    cut = truncate_text(text, room, FONT)
    assert width(cut) <= room or cut == "..." or cut == text == ""
    assert cut == text or (cut.endswith("...") and text.startswith(cut[:-3]))


@pytest.fixture
def axes() -> Iterator[Any]:
    figure = Figure(figsize=(2, 2), dpi=100)
    found = figure.add_axes((0, 0, 1, 1))
    found.set(xlim=(0, 10), ylim=(0, 10))
    found.axis("off")
    yield found


def picture(axes: Any) -> Any:
    out = io.BytesIO()
    axes.figure.savefig(out, format="rgba")
    return numpy.frombuffer(out.getvalue(), dtype=numpy.uint8).reshape(200, 200, 4).astype(int)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rectangle((4, 4), 2, 2),
        lambda: Circle((5, 5), 1),
        lambda: FancyBboxPatch((4, 4), 2, 2, boxstyle="round"),
    ],
    ids=["rectangle", "circle", "box"],
)
@pytest.mark.parametrize("added_first", [True, False])
def test_a_glow_is_seen_around_the_patch_and_fades(axes: Any, make: Any, added_first: bool) -> None:
    patch = make()
    patch.set(facecolor="white", edgecolor="white")
    if added_first:
        axes.add_patch(patch)
    glow = add_glow_effect(patch, axes, "red")
    if not added_first:
        axes.add_patch(patch)
    redness = 255 - picture(axes)[100, :, 1]  # along the row through the middle, from the left
    around = redness[redness > 0]
    assert redness[100] == 0 and redness[0] == 0 and len(around) > 10
    left = redness[: int(numpy.argmax(redness))]
    assert numpy.all(numpy.diff(left[left > 0]) >= 0)
    for outline in glow:
        outline.remove()
    assert (255 - picture(axes)[100, :, 1]).max() == 0


def test_layers_widen_and_fade_behind_the_patch(axes: Any) -> None:
    patch = axes.add_patch(Rectangle((4, 4), 2, 2, linewidth=2, zorder=3))
    glow = add_glow_effect(patch, axes, "blue", n_layers=4, max_alpha=0.4, diff_linewidth=2)
    assert [one.get_linewidth() for one in glow] == [4, 6, 8, 10]
    assert [one.get_alpha() for one in glow] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert all(one.get_zorder() < 3 for one in glow) and patch.get_linewidth() == 2


@pytest.mark.parametrize("options", [{"n_layers": 0}, {"max_alpha": 1.5}, {"max_alpha": -0.1}])
def test_a_glow_that_cannot_be_is_an_error(axes: Any, options: Any) -> None:
    with pytest.raises(ValidationError, match="glow"):
        add_glow_effect(Rectangle((4, 4), 2, 2), axes, "red", **options)
