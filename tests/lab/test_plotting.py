import re

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from opticam.lab.plotting import (
    condition_panels,
    difference_dots,
    explanation_figure,
    gallery,
    image_grid,
    interval_table,
    latex_table,
    metric_bars,
    metric_scatter,
    metric_values,
    objective_curve,
    overlay,
    overview,
    probability_bars,
    save_figure,
    show_boxes,
    show_table,
    similarity_curves,
    use_style,
)
from opticam.methods import METHODS

mpl.use("agg")


@pytest.fixture(autouse=True)
def style():
    mpl.pyplot.close("all")  # of other tests in this process
    with mpl.rc_context():
        use_style()
        yield
        mpl.pyplot.close("all")


def test_no_two_methods_share_a_label_or_a_colour():
    records = METHODS.values()
    assert len({record.label for record in records}) == len({record.color for record in records}) == len(METHODS)
    assert all(re.fullmatch("#[0-9a-f]{6}", record.color) for record in records)


def test_no_colour_of_a_method_is_pale():
    for record in METHODS.values():
        channels = np.array(mpl.colors.to_rgb(record.color))
        light = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        contrast = 1.05 / (light @ [0.2126, 0.7152, 0.0722] + 0.05)  # to white, by the rules for web pages
        assert contrast > 2.2, record.label


def test_overlay_is_brightest_where_the_map_is_one():
    saliency = torch.zeros(1, 8, 12)
    saliency[:, 2, 9] = 1  # row 2, column 9
    picture = overlay(torch.full((3, 8, 12), 0.5), saliency)
    assert picture.shape == (8, 12, 3)
    assert np.unravel_index(picture.sum(-1).argmax(), (8, 12)) == (2, 9)
    assert 0 <= picture.min() < picture.max() <= 1


def test_overlay_takes_a_gray_photo():
    gray, saliency = torch.rand(1, 8, 12), torch.rand(1, 8, 12)
    assert (overlay(gray, saliency) == overlay(gray.repeat(3, 1, 1), saliency)).all()


def test_a_white_line_runs_inside_of_what_the_map_calls_salient():
    """5x5 pixels at 0.5 in a map of 0.4: their rim of 16 is white, of a large picture the two outer rings."""
    dark, saliency = torch.zeros(3, 12, 12), torch.full((1, 12, 12), 0.4)
    saliency[:, 3:8, 2:7] = 0.5
    white = (overlay(dark, saliency) == 1).all(-1)
    assert white.sum() == 16
    assert white[3, 2:7].all()
    assert not white[4:7, 3:6].any()
    assert not (overlay(dark, torch.ones(1, 12, 12)) == 1).any()  # without an edge
    large = torch.zeros(1, 224, 224)
    large[:, 100:110, 100:110] = 1
    assert (overlay(torch.zeros(3, 224, 224), large) == 1).all(-1).sum() == 100 - 36


def test_image_grid_leaves_missing_places_empty():
    figure = image_grid([[torch.rand(3, 4, 4), torch.rand(1, 4, 4)], [torch.rand(3, 4, 4)]], column_titles=["a", "b"])
    assert [len(ax.images) for ax in figure.axes] == [1, 1, 1, 0]
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "", ""]


def test_image_grid_puts_captions_and_boxes_where_they_belong():
    box, none = torch.tensor([[1.0, 2.0, 5.0, 7.0]]), torch.zeros(0, 4)
    rows = [[torch.rand(3, 9, 9)] * 2] * 2
    figure = image_grid(rows, captions=[[], ["c", "d"]], boxes=[none, box, torch.cat([box, box])])
    assert [[text.get_text() for text in ax.texts] for ax in figure.axes] == [[], [], ["c"], ["d"]]
    assert [len(ax.patches) for ax in figure.axes] == [0, 1, 2, 0]
    assert figure.axes[1].patches[0].get_bbox().extents.tolist() == [1, 2, 5, 7]


@pytest.mark.slow
def test_saved_figures_are_byte_identical_and_whole(tmp_path):
    image, saliency = torch.rand(3, 16, 16), torch.rand(1, 16, 16)
    for suffix in ("png", "pdf", "svg", "PNG"):
        written = []
        for name in ("one", "two"):
            figure = explanation_figure(image, saliency, image * saliency, ["a", "b", "c"])
            written.append(save_figure(figure, tmp_path / "deep" / f"{name}.{suffix}").read_bytes())
        assert written[0] == written[1]
        assert len(written[0]) > 1000
        assert mpl.__version__.encode() not in written[0]
    assert not [path for path in (tmp_path / "deep").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_charts_have_a_palette_that_cannot_be_told_from_their_colours(tmp_path):
    figure = mpl.figure.Figure(figsize=(3, 2))
    ax = figure.subplots()
    for shade, color in enumerate(("#d55e00", "#0173b2", "#029e73", "#e69f00")):
        ax.fill_between([0, 1], shade, shade + 2, color=color, alpha=0.2, lw=0)
        ax.plot([0, 1], [shade, shade + 2], color=color)
    written, full = save_figure(figure, tmp_path / "chart.png"), tmp_path / "full.png"
    figure.savefig(full, dpi=2 * figure.dpi, bbox_inches="tight", pad_inches=0.02)
    with Image.open(written) as chart, Image.open(full) as wanted:
        assert (chart.mode, chart.size, chart.info["dpi"]) == ("P", wanted.size, wanted.info["dpi"])
        off = np.abs(np.asarray(chart.convert("RGB"), int) - np.asarray(wanted.convert("RGB"), int)).max(2)
    assert off.mean() < 0.2
    assert (off > 8).mean() < 0.005, "nothing but edges"
    assert written.stat().st_size < full.stat().st_size / 2
    ax.imshow(np.ones((2, 2, 3)))
    with Image.open(save_figure(figure, tmp_path / "picture.png")) as picture:
        assert picture.mode == "RGBA", "a picture keeps all its colours"


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
    assert interval_table(summary).equals(interval_table(summary, {"average_gain": "AG % ↑"}))
    assert interval_table(summary * np.nan, {"average_gain": "AG"}).loc["Opti-CAM", "AG"] == ""
    tested = summary.assign(average_gain_p=[0.03, 0.01])  # of two tests, 0.01 counts as 0.02 and 0.03 as itself
    assert interval_table(tested)["AG % ↑"].tolist() == ["10.0 [1.0, 21.0]*", "75.0 [66.0, 83.0]*"]
    tested.average_gain_p = [0.03, 0.04]  # 0.06 and 0.06
    assert interval_table(tested)["AG % ↑"].tolist() == ["10.0 [1.0, 21.0]", "75.0 [66.0, 83.0]"]
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
    some = {"a": summary.loc[["grad_cam"]], "b": summary}  # a method that misses a condition stays at its place
    (ax,) = condition_panels({"one": some}, "road", "ROAD").axes
    assert [points[0].get_xdata().round().tolist() for points in ax.containers] == [[0, 1], [1]]


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
    many = pd.DataFrame({"method": list(METHODS), "prob": 0.5, "masked_prob": 0.5})
    (ax,) = metric_values(many, {"first": lambda p, o: p}).axes
    assert len(ax.collections) == len(METHODS)


def test_probability_bars_begin_with_the_class_explained():
    probs, masked_probs = torch.tensor([0.1, 0.6, 0.3, 0.0]), torch.tensor([0.2, 0.1, 0.25, 0.45])
    column = pd.Series(["ant", "bee", "cat", "dog"], index=[3, 2, 1, 0])  # in its order, whatever its index
    figure = probability_bars(probs, masked_probs, column, 2)
    (ax,) = figure.axes
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["cat", "bee", "dog", "ant"]  # of bee 0.6, of dog 0.45
    before, after = ([round(bar.get_width(), 4) for bar in bars] for bars in ax.containers)
    assert (before, after) == ([30, 60, 0, 10], [25, 10, 45, 20])
    assert not mpl.pyplot.get_fignums()


def test_the_objective_curve_marks_its_step_and_the_photos_logit():
    (ax,) = objective_curve(torch.tensor([1.0, 3.0, 2.0]), 1.5, 1).axes
    curve, reference, mark = ax.lines
    assert curve.get_ydata().tolist() == [1, 3, 2]
    assert set(reference.get_ydata()) == {1.5}
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (1, 3)
    assert not mpl.pyplot.get_fignums()


def test_gallery_puts_each_map_over_its_photo():
    photos, maps = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    arguments = photos, ["a", "African hunting dog"], [0.25, 0.5]
    boxes = [torch.tensor([[2.0, 3.0, 4.0, 6.0]]), torch.zeros(0, 4)]
    figure = gallery(*arguments, {"grad_cam": maps}, {"grad_cam": [0.125, 1]}, boxes)
    texts = [ax.texts[0].get_text() for ax in figure.axes]
    assert texts == ["p = 0.250", "p = 0.500", "o = 0.125", "o = 1.000"]
    assert [ax.get_title() for ax in figure.axes[:2]] == ["a", "African\nhunting\ndog"]
    assert [len(ax.patches) for ax in figure.axes] == [1, 0, 0, 0]
    np.testing.assert_allclose(figure.axes[3].images[0].get_array(), overlay(photos[1], maps[1]), atol=1e-6)
    with pytest.raises(ValueError, match="saliency: wanted 2 maps by rise, got 1"):
        gallery(*arguments, {"rise": maps[:1]}, {"rise": [0.75]})


@pytest.mark.slow
def test_dollars_in_class_names_are_no_mathematics():
    name, photo, maps = r"5 $\no$ 10 $", torch.rand(3, 8, 8), torch.rand(1, 8, 8)
    figures = [
        explanation_figure(photo, maps, photo * maps, [name, "b", "c"]),
        probability_bars(torch.tensor([0.1, 0.9]), torch.tensor([0.2, 0.8]), [name, "b"], 0),
        gallery(photo[None], [name], [0.5], {"grad_cam": maps[None]}, {"grad_cam": [0.125]}),
        overview(photo, torch.ones(5, 2, 2), torch.ones(5), maps, [2.0, 3.0, 5.0], {"photo": 1.0}, name, 0.001),
    ]
    for figure in figures:
        figure.canvas.draw()  # what is not mathematics would be refused here
    figure = image_grid([[photo]], column_titles=["$x$"])
    assert figure.axes[0].title.get_parse_math()


def test_tables_are_shown_below_their_title(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda markdown: shown.append(markdown.data.splitlines()))
    show_table(pd.DataFrame({"AG": [1.25]}, index=pd.Index(["Grad-CAM"], name="method")), "**means**")
    show_table(pd.DataFrame({"AG": [1.25, 2]}), floatfmt=".1f")
    assert shown[0][:3] == ["**means**", "", "| method   |   AG |"]
    assert [line.replace(" ", "") for line in shown[1]] == ["|AG|", "|-----:|", "|1.2|", "|2.0|"]


def test_overview_shows_the_feature_maps_the_curve_and_its_references():
    features = torch.zeros(5, 2, 2)
    features[3, 0, 1] = 7  # the fourth of nine places: second row, first column
    figure = overview(
        torch.rand(3, 8, 8),
        features,
        torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]),
        torch.rand(1, 8, 8),
        [2.0, 3.0, 5.0],
        {"photo": 1.0, "Grad-CAM": 1.01},
        "dog",
        0.001,
    )
    maps, weights, curve = figure.axes[1], figure.axes[2], figure.axes[5]
    tiles = maps.images[0].get_array()
    assert tiles.shape == (8, 8, 3)
    bright = tiles.sum(-1) * (tiles.min(-1) < 1)  # without the white between them
    assert np.unravel_index(bright.argmax(), bright.shape) == (3, 1)
    assert [bar.get_height() for bar in weights.patches] == pytest.approx([50, 20, 10, 10, 10])
    assert curve.lines[0].get_ydata().tolist() == [2, 3, 5]
    assert [text.get_text() for text in curve.texts] == ["photo: 1.00", "Grad-CAM: 1.01", "Opti-CAM: 5.00"]
    assert curve.texts[1].get_position()[1] - curve.texts[0].get_position()[1] == pytest.approx(0.5)  # (5 - 1) / 8


def test_latex_table():
    table = pd.DataFrame({"AD % ↓": ["0.3 [0.0, 0.8]"], "n": ["5"]}, index=pd.Index(["Opti-CAM"], name="method"))
    lines = latex_table(table).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        r"\begin{tabular}{lll}",
        r"\toprule",
        r"method & AD \% $\downarrow$ & n \\",
        r"\midrule",
        r"Opti-CAM & 0.3 {\scriptsize [0.0, 0.8]} & 5 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_legend_names_what_any_panel_shows():
    summaries = {
        title: pd.DataFrame({"v": 0.5, "v_low": 0.4, "v_high": 0.6}, pd.Index(methods, name="method"))
        for title, methods in (("A", ["grad_cam"]), ("B", ["grad_cam", "opti_cam"]))
    }
    assert legend_of(condition_panels({title: {"c": one} for title, one in summaries.items()}, "v", "x")) == [
        "Grad-CAM",
        "Opti-CAM",
    ]
    keys = [("o", 1, "s", "grad_cam"), ("o", 1, "s", "layer_cam"), ("p", 1, "s", "grad_cam")]
    curves = pd.DataFrame(
        {"v": [0.1, 0.2, 0.3]}, pd.MultiIndex.from_tuples(keys, names=["order", "position", "stage", "method"])
    )
    figure = similarity_curves(curves, {"v": "v"}, {"o": "O", "p": "P"})
    assert legend_of(figure) == ["Grad-CAM", "Layer-CAM"]
    assert [len(ax.lines) for ax in figure.axes] == [3, 2]  # with the line at 0


def test_what_bars_or_places_cannot_show_is_refused():
    summary = pd.DataFrame({"v": [-56.0, 54], "v_low": [-60.0, 50], "v_high": [-50.0, 60]}, ["grad_cam", "opti_cam"])
    with pytest.raises(ValueError, match="summary: wanted percentages from 0 to 100"):
        metric_bars(summary, {"v": "V"}, 3)
    with pytest.raises(ValueError, match=r"^summary: wanted methods of different labels, got Grad-CAM, Grad-CAM$"):
        metric_bars(summary.abs().set_axis(["grad_cam", "Grad-CAM"]), {"v": "V"}, 3)
    index = pd.MultiIndex.from_tuples([("A", "a"), ("B", "b"), ("A", "c")])
    with pytest.raises(ValueError, match="differences: wanted the rows of a group together"):
        difference_dots(pd.DataFrame({"v": 0.0, "v_low": 0.0, "v_high": 0.0, "v_p": 1.0}, index), {"v": "V"})
    with pytest.raises(ValueError, match="rows: wanted at least one picture"):
        image_grid([])


def test_boxes_go_with_their_pictures_where_rows_differ_in_length():
    picture = torch.rand(3, 8, 8)
    figure = image_grid([[picture], [picture, picture]], boxes=[torch.tensor([[1.0, 1, 5, 5]])] * 3)
    assert [len(ax.patches) for ax in figure.axes] == [1, 0, 1, 1]


@pytest.mark.parametrize("suffix", ["eps", "svgz", "webp", "jpg", "pdf"])
def test_figures_of_any_kind_are_written(tmp_path, suffix):
    figure, ax = mpl.pyplot.subplots()
    ax.plot([0, 1])
    assert save_figure(figure, tmp_path / f"f.{suffix}").stat().st_size > 500


@pytest.mark.slow
def test_dots_are_filled_where_holm_says_so_and_empty_where_there_is_no_value():
    """Of two tests, 0.02 counts as 0.04 and 0.06 as itself."""
    index = pd.MultiIndex.from_tuples([("layer", "early"), ("layer", "late"), ("start", "random")])
    differences = pd.DataFrame({"logit": [1.0, -2.0, np.nan], "logit_p": [0.06, 0.02, np.nan]}, index=index)
    differences["logit_low"], differences["logit_high"] = differences.logit - 0.5, differences.logit + 0.5
    figure = difference_dots(differences, {"logit": "logit"})
    (ax,) = figure.axes
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots[:2]] == [1, -2]
    assert [dot.get_markerfacecolor() == "w" for dot in dots[:2]] == [True, False]
    assert np.isnan(dots[2].get_xdata()[0])
    labels = {text.get_text(): text.get_position()[1] for text in ax.get_yticklabels()}
    assert [*labels] == ["early", "late", "random"]
    assert [dot.get_ydata()[0] for dot in dots] == [*labels.values()]
    heads = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert heads["layer"] < labels["early"] < labels["late"] < heads["start"] < labels["random"]
    assert ax.yaxis_inverted()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clear after Holm's correction", "not clear"]
    twice = differences.join(differences.add_prefix("more_"))
    axes = difference_dots(twice, {"logit": "a", "more_logit": "b"}, linear=1).axes
    assert [ax.get_xscale() for ax in axes] == ["symlog"] * 2
    assert axes[0].get_xlim() == axes[1].get_xlim()


def test_methods_that_share_a_place_are_shown_larger():
    names = ["fake_cam", "grad_cam", "layer_cam", "ablation_cam", "opti_cam"]
    points = {"ep": [60.0, 79, 79.5, 78.5, 74], "ag": [0.0, 9.5, 9, 8.5, 73]}
    summary = pd.DataFrame(points, index=pd.Index(names, name="method"))
    summary = summary.assign(**{f"{c}_{end}": summary[c] for c in ("ep", "ag") for end in ("low", "high")})
    (ax,) = metric_scatter(summary, "ep", "ag", {"ep": "EP", "ag": "AG"}).axes
    (inset,) = ax.child_axes
    (left, right), (low, high) = inset.get_xlim(), inset.get_ylim()
    assert [left < x < right and low < y < high for x, y in zip(*points.values(), strict=True)] == [0, 1, 1, 1, 0]
    assert not metric_scatter(summary[::4], "ep", "ag", {"ep": "EP", "ag": "AG"}).axes[0].child_axes
    rounded = summary.assign(ep_low=summary.ep + 1e-9)  # an interval whose end is the mean, but for rounding
    metric_scatter(rounded, "ep", "ag", {"ep": "EP", "ag": "AG"})


def test_charts_are_as_wide_as_a_column_with_text_of_7_to_8_points(tmp_path):
    summary = pd.DataFrame(
        {"average_gain": [10.0, 75.0], "average_gain_low": [1.0, 66.0], "average_gain_high": [21.0, 83.0]},
        index=pd.Index(["grad_cam", "opti_cam"], name="method"),
    )
    figure = metric_bars(summary, {"average_gain": "AG"}, 20)
    written = mpl.image.imread(save_figure(figure, tmp_path / "bars.png"))
    assert written.shape[1] / (2 * figure.dpi) == pytest.approx(85 / 25.4, abs=0.1)
    sizes = {text.get_fontsize() for text in figure.findobj(mpl.text.Text) if text.get_text()}
    assert min(sizes) >= 7
    assert max(sizes) <= 8


def test_curves_show_similarity_by_stage_in_the_order_given():
    index = pd.MultiIndex.from_tuples(
        [("cascading", 1, "top", "grad_cam"), ("cascading", 2, "bottom", "grad_cam")],
        names=["order", "position", "stage", "method"],
    )
    curves = pd.DataFrame({"ssim": [0.8, 0.3], "ssim_low": [0.7, 0.1], "ssim_high": [0.9, 0.4]}, index=index)
    (ax,) = similarity_curves(curves, {"ssim": "SSIM"}, {"cascading": "from the logits down"}).axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["top", "bottom"]
    (curve,) = [line for line in ax.lines if line.get_label() == "Grad-CAM"]
    np.testing.assert_allclose(curve.get_xydata(), [[0, 0.8], [1, 0.3]])
    (band,) = ax.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6).tolist()}
    assert corners == {(0, 0.7), (0, 0.9), (1, 0.1), (1, 0.4)}
    other = curves.iloc[[1]].rename(index={"grad_cam": "opti_cam"})  # only at the second stage
    (ax,) = similarity_curves(pd.concat([curves, other]), {"ssim": "SSIM"}, {"cascading": ""}).axes
    places = {line.get_label(): [*line.get_xdata()] for line in ax.lines}
    assert (places["Grad-CAM"], places["Opti-CAM"]) == ([0, 1], [1])
