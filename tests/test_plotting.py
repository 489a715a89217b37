import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

from opticam.methods import METHODS
from opticam.plotting import (
    METHOD_COLORS,
    METHOD_LABELS,
    condition_panels,
    explanation_figure,
    image_grid,
    interval_table,
    metric_bars,
    metric_values,
    overlay,
    save_figure,
    show_boxes,
    use_style,
)

mpl.use("agg")


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context():
        use_style()
        yield
        mpl.pyplot.close("all")


def test_every_method_has_a_label_and_a_colour():
    assert set(METHOD_LABELS) == set(METHOD_COLORS) == set(METHODS)


def test_overlay_is_brightest_where_the_map_is_one():
    saliency = torch.zeros(1, 8, 12)
    saliency[:, 2, 9] = 1  # row 2, column 9
    picture = overlay(torch.full((3, 8, 12), 0.5), saliency)
    assert picture.shape == (8, 12, 3)
    assert np.unravel_index(picture.sum(-1).argmax(), (8, 12)) == (2, 9)
    assert 0 <= picture.min() < picture.max() <= 1


def test_image_grid_leaves_missing_places_empty():
    figure = image_grid([[torch.rand(3, 4, 4), torch.rand(1, 4, 4)], [torch.rand(3, 4, 4)]], column_titles=["a", "b"])
    assert [len(ax.images) for ax in figure.axes] == [1, 1, 1, 0]
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "", ""]


def test_saved_figures_are_byte_identical_and_whole(tmp_path):
    image, saliency = torch.rand(3, 16, 16), torch.rand(1, 16, 16)
    for suffix in ("png", "pdf", "svg"):
        written = []
        for name in ("one", "two"):
            figure = explanation_figure(image, saliency, image * saliency, ["a", "b", "c"])
            written.append(save_figure(figure, tmp_path / "deep" / f"{name}.{suffix}").read_bytes())
        assert written[0] == written[1]
        assert len(written[0]) > 1000
    assert not [path for path in (tmp_path / "deep").iterdir() if path.name.startswith(".")]


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="Format"):
        save_figure(mpl.figure.Figure(), tmp_path / "figure.xyz")
    assert not list(tmp_path.iterdir())


def test_bars_and_table_show_the_summary():
    summary = pd.DataFrame(
        {"average_gain": [10.0, 75.04], "average_gain_low": [1.0, 66.0], "average_gain_high": [21.0, 83.0]},
        index=pd.Index(["grad_cam", "opti_cam"], name="method"),
    )
    table = interval_table(summary, {"average_gain": "AG"})
    assert table.loc["Opti-CAM", "AG"] == "75.0 [66.0, 83.0]"
    (ax,) = metric_bars(summary, {"average_gain": "AG"}, 20).axes
    assert [bar.get_width() for bar in ax.patches] == [10, 75.04]


def test_conditions_are_groups_of_points():
    summary = pd.DataFrame(
        {"road": [1.0, 5.0], "road_low": [0.0, 4.0], "road_high": [3.0, 7.0]},
        index=pd.Index(["grad_cam", "opti_cam"], name="method"),
    )
    figure = condition_panels({"one": {"a": summary, "b": summary + 1}, "two": {"a": summary}}, "road", "ROAD")
    first, second = figure.axes
    assert [text.get_text() for text in first.get_xticklabels()] == ["a", "b"]
    assert [points[0].get_ydata().tolist() for points in first.containers] == [[1, 2], [5, 6]]
    assert [points[0].get_ydata().tolist() for points in second.containers] == [[1], [5]]
    (bars,) = second.containers[0][2]
    assert bars.get_segments()[0][:, 1].tolist() == [0, 3]


def test_boxes_are_drawn_in_x_and_y():
    figure = image_grid([[torch.rand(3, 20, 20)]])
    show_boxes(figure.axes[0], torch.tensor([[2.0, 5.0, 12.0, 8.0]]))
    (patch,) = figure.axes[0].patches
    assert (patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) == (2, 5, 10, 3)
    show_boxes(figure.axes[0], torch.tensor([[-9.0, 5.0, 12.0, 99.0]]))
    patch = figure.axes[0].patches[1]
    assert (patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) == (1, 5, 11, 13)


def test_metric_values_shows_the_metric_and_the_images():
    rows = pd.DataFrame({"method": ["grad_cam", "grad_cam"], "prob": [0.2, 0.9], "masked_prob": [0.6, 0.3]})
    (ax,) = metric_values(rows, {"first": lambda p, o: p}).axes
    (image,) = ax.images
    values = image.get_array()
    assert values[0, 0] == values[199, 0] == pytest.approx(0.0025)  # p grows to the right only
    assert values[0, 199] == pytest.approx(0.9975)
    assert ax.collections[0].get_offsets().tolist() == [[0.2, 0.6], [0.9, 0.3]]
