"""The charts of the page: SVG that says what the figures say."""

import re
from html import unescape

from matplotlib.colors import to_hex

from merge_avg.agreement import TensorAgreement
from merge_avg.report._charts import distances, heat_map, layers, svg
from tests.report.helpers import contrast


def tensor(name, norm, *distances):
    """Return the figures of a tensor; only its norm and distances are drawn."""
    return TensorAgreement(name, (10, 10), 100, 100, 0.5, 0.0, norm, distances)


def texts(picture):
    """Return the texts in a picture."""
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture)]


def test_layers_are_named_without_what_all_begin_with():
    """A layer is all tensors up to the first number in their names; the rest go by module."""
    tensors = [
        tensor("model.embed.weight", 1.0, 0.1),
        tensor("model.layers.0.mlp.up.weight", 1.0, 0.1),
        tensor("model.layers.0.attn.weight", 1.0, 0.1),
        tensor("model.layers.10.mlp.weight", 1.0, 0.1),
    ]
    assert layers(tensors)[0] == ["embed", "layers.0", "layers.10"]
    assert layers([tensor("w", 1.0, 0.1)])[0] == ["w"]


def test_distances_of_a_layer_are_over_its_norm():
    """Squares of distances add up, and so do those of norms: 3 and 4 make 5."""
    tensors = [tensor("a.0.v", 3.0, 1.0, 0.0), tensor("a.0.w", 4.0, 1.0, 0.5)]
    (row,) = layers(tensors)[1]
    assert row == [1.0, 0.4]
    # Zeros everywhere are no distance, not a division by zero.
    assert layers([tensor("a.0.v", 0.0, 0.0)])[1] == [[0.0]]


def test_a_heat_map_has_its_numbers():
    """Of few checkpoints each cell has its cosine, and the axes their numbers."""
    picture = svg(heat_map, [[1.0, 0.25, None], [0.25, 1.0, None], [None, None, 1.0]], [1, 2, 4])
    shown = texts(picture)
    assert shown.count("0.25") == 2
    assert {"1", "2", "4"} <= set(shown)
    assert "nan" not in shown
    many = [[1.0 if i == j else 0.9 for j in range(13)] for i in range(13)]
    assert texts(svg(heat_map, many, range(1, 14))).count("0.90") <= 1  # of the scale


def test_numbers_can_be_read_on_their_cells():
    """On each colour of the scale, black or white has a contrast of 4.5 or more."""
    pairs = [[(12 * i + j) / 144 for j in range(12)] for i in range(12)]
    axes = heat_map(pairs, range(1, 13)).axes[0]
    (image,) = axes.images
    assert len(axes.texts) == 144
    for text in axes.texts:
        (j, i), colour = text.get_position(), {"black": "#000000", "white": "#ffffff"}
        cell = to_hex(image.cmap(image.norm(pairs[i][j])))
        assert contrast(colour[text.get_color()], cell) >= 4.5, cell


def test_only_the_farthest_of_many_are_named():
    """Up to eight checkpoints have a line with a name; of more, the three farthest."""
    for count, title, named in [(8, "checkpoint", 8), (9, "farthest", 3)]:
        far = [number / 10 for number in range(count)]
        shown = texts(svg(distances, [tensor("a.0.w", 1.0, *far)], range(1, count + 1)))
        assert title in shown
        labels = [text for text in shown if text.startswith("#")]
        assert labels == [f"#{number}" for number in range(count - named + 1, count + 1)]


def test_lines_differ_by_more_than_colour():
    """Each line has a marker of its own, and at most some 50 of them."""
    axes = distances([tensor(f"a.{n}.w", 1.0, *([0.5] * 8)) for n in range(99)], range(1, 9)).axes[
        0
    ]
    markers = [line.get_marker() for line in axes.lines]
    assert len(set(markers)) == 8
    assert {line.get_markevery() for line in axes.lines} == {3}


def test_pictures_are_the_same_each_time():
    """The same figures give the same bytes, and nothing but the element."""
    pairs = [[1.0, 0.5], [0.5, 1.0]]
    picture = svg(heat_map, pairs, [1, 2])
    assert picture == svg(heat_map, pairs, [1, 2])
    assert picture.startswith("<svg ")
    assert picture.rstrip().endswith("</svg>")


def test_names_are_letters():
    """A name is not a formula, and of a long one the end is shown."""
    name = "$x^2$" + "a" * 30 + ".end"
    tensors = [tensor("$x^2$.w", 1.0, 0.5), tensor(f"{name}.w", 1.0, 0.5)]
    shown = texts(svg(distances, tensors, [1]))
    assert "$x^2$" in shown
    assert f"…{name[-23:]}" in shown
