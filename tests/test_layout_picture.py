"""The picture of layouts: what a person reads from it, and that it fails in one sentence."""

import sys

import numpy as np
import pytest

from bsa_export.errors import BsaError
from bsa_export.sparsity.configs import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    FixedSparsityConfig,
    windowed_for,
)
from bsa_export.sparsity.layouts import make_layouts
from bsa_export.sparsity.pictures import DROPPED, KEPT, layout_figure, plot_layouts
from bsa_export.version import install_hint

pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra [plot]")


def titles(figure):
    return [panel.get_title() for panel in figure.axes]


def near(color, pixels):
    """Where an image [rows, columns, RGB] of 0 to 255 has a color, give or take the blur of resampling."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(pixels[..., :3].astype(int) - wanted).max(axis=-1) < 40


def panel_pixels(figure, number=0):
    """The pixels inside of a panel's frame, [rows, columns, RGBA]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())
    box = figure.axes[number].get_window_extent()
    top, bottom = round(len(image) - box.y1), round(len(image) - box.y0)
    return image[top:bottom, round(box.x0) : round(box.x1)]


@pytest.mark.parametrize("blocks", [16, 64, 128])
def test_pixels_show_the_blocks(blocks):
    layouts = make_layouts(windowed_for(512, 2), blocks * 64, 2)
    pixels = panel_pixels(layout_figure(layouts, 64, "windowed"))
    assert min(pixels.shape[:2]) > 4 * blocks
    rows, columns = (((np.arange(blocks) + 0.5) * size / blocks).astype(int) for size in pixels.shape[:2])
    centers = pixels[np.ix_(rows, columns)]
    assert np.array_equal(near(KEPT, centers), layouts[0][0] != 0)
    assert np.array_equal(near(DROPPED, centers), layouts[0][0] == 0)


def test_a_single_global_block_of_1024_can_be_seen():
    config = BSLongformerSparsityConfig(2, 64, num_sliding_window_blocks=1, global_block_indices=[700])
    pixels = panel_pixels(layout_figure(make_layouts(config, 65536, 2), 64, "bslongformer"))
    assert pixels.shape[1] < 1024
    column = round(700.5 / 1024 * pixels.shape[1])
    shades = pixels[100:200, column - 3 : column + 4, 0].min(axis=1)
    assert (shades < 130).all()
    assert (pixels[100:200, column - 12 : column - 6, 0] > 200).all()


def test_a_panel_for_each_distinct_layout_says_whose_it_is():
    config = FixedSparsityConfig(12, 64, True, 4, 1, num_different_global_patterns=3)
    layouts = make_layouts(config, 4096, 6)
    figure = layout_figure([*layouts, layouts[0][[1] * 12]], 64, "fixed")
    assert titles(figure) == [
        "layers 0-5, heads 0, 3, 6, 9\n29.7% of blocks kept",
        "layers 0-5, heads 1, 4, 7, 10 and 12 more\n29.7% of blocks kept",
        "layers 0-5, heads 2, 5, 8, 11\n29.7% of blocks kept",
    ]
    assert figure.axes[0].get_xlabel() == "key token" and figure.axes[0].get_ylabel() == "query token"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "1,024", "2,048", "3,072", "4,096"]


@pytest.mark.parametrize(
    "layers, heads, expected",
    [(6, 12, "all layers, all heads"), (1, 12, "the one layer, all heads"), (6, 1, "all layers, the one head")],
)
def test_one_layout_for_all(layers, heads, expected):
    figure = layout_figure(make_layouts(windowed_for(512, heads), 1024, layers), 64, "windowed")
    assert titles(figure) == [f"{expected}\n57.8% of blocks kept"]


def test_a_long_layout_is_joined_by_a_picture_of_its_start():
    figure = layout_figure(make_layouts(windowed_for(512, 2), 65536, 2), 64, "windowed", source_length=512)
    assert titles(figure) == ["all layers, all heads\n1.0% of blocks kept", "the same\nfirst 4,096 tokens"]
    assert figure.axes[1].get_xlim() == (0, 4096)


def test_many_layouts_are_cut_and_counted():
    config = BigBirdSparsityConfig(12, 64, True)
    figure = layout_figure(make_layouts(config, 1024, 3, different_layout_per_layer=True), 64, "bigbird")
    assert len(figure.axes) == 24
    assert figure.get_suptitle() == "bigbird\nthe first 24 of 36 distinct layouts"


@pytest.mark.parametrize("source_length, framed", [(512, True), (1024, False), (None, False)])
def test_the_sources_length_is_framed_where_the_layout_is_longer(source_length, framed):
    layouts = make_layouts(windowed_for(512, 2), 1024, 2)
    figure = layout_figure(layouts, 64, "windowed", source_length)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("dense model's 512 tokens" in legend) == framed
    assert bool(figure.axes[0].patches) == framed


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_suffix_says_the_format(tmp_path, suffix, start):
    path = tmp_path / f"layout.{suffix}"
    path.write_bytes(b"an older picture")
    plot_layouts(path, make_layouts(windowed_for(512, 2), 1024, 2), 64, "windowed", 512)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["layout.xyz", "layout", "layout.txt"])
def test_other_suffixes_are_refused_and_nothing_is_written(tmp_path, name):
    with pytest.raises(BsaError, match=f"plot: expected a picture ending in .png, .svg or .pdf, found '{name}'"):
        plot_layouts(tmp_path / name, make_layouts(windowed_for(512, 2), 1024, 2), 64, "windowed")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    path = tmp_path / "absent" / "layout.png"
    with pytest.raises(BsaError) as refusal:
        plot_layouts(path, make_layouts(windowed_for(512, 2), 1024, 2), 64, "windowed")
    assert str(refusal.value) == f"{path.parent}: there is no such folder"
    (tmp_path / "absent").mkdir()
    path.mkdir()
    with pytest.raises(BsaError) as refusal:
        plot_layouts(path, make_layouts(windowed_for(512, 2), 1024, 2), 64, "windowed")
    assert str(refusal.value) == f"{path}: cannot be written, found Is a directory"
    assert list(path.parent.iterdir()) == [path]


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BsaError) as refusal:
        plot_layouts(tmp_path / "layout.png", make_layouts(windowed_for(512, 2), 1024, 2), 64, "windowed")
    assert str(refusal.value).endswith(install_hint("plot"))
