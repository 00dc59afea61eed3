"""Colours as the colour-blind and a grey print show them.

The deficiency is simulated by the matrix for a severity of 1.0 in Machado,
Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color
Vision Deficiency", IEEE TVCG 15(6), 2009, on linear RGB. Differences are
distances in CIELAB (CIE 1976), in which about 2.3 is just noticeable.
"""

import itertools

import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from moe_jax.analysis import plot_style
from moe_jax.analysis.plot_style import curves_figure, load_figure, save, smooth

SEEN_BY = {
  'all': np.eye(3),
  'deuteranopes': np.array([
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ]),
}  # fmt: skip
TO_XYZ = np.array([  # sRGB (IEC 61966-2-1), white D65
  [0.4124564, 0.3575761, 0.1804375],
  [0.2126729, 0.7151522, 0.0721750],
  [0.0193339, 0.1191920, 0.9503041],
])  # fmt: skip
each_viewer = pytest.mark.parametrize('viewer', SEEN_BY)


def lab(colour, viewer='all'):
  """CIELAB of a colour as somebody sees it."""
  rgb = np.array(to_rgb(colour))
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  perceived = np.clip(SEEN_BY[viewer] @ linear, 0, 1)
  x, y, z = TO_XYZ @ perceived / (TO_XYZ @ np.ones(3))
  x, y, z = (
    np.cbrt(v) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29
    for v in (x, y, z)
  )
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@each_viewer
def test_colours_of_lines_are_told_apart(viewer):
  lab_colours = [lab(colour, viewer) for colour in plot_style.COLOURS]
  for a, b in itertools.combinations(lab_colours, 2):
    assert np.linalg.norm(a - b) > 15


def test_lines_of_one_grey_differ_in_dashes_and_marker():
  styles = [plot_style.series(i) for i in range(len(plot_style.COLOURS))]
  for a, b in itertools.combinations(styles, 2):
    assert a['linestyle'] != b['linestyle']
    assert a['marker'] != b['marker']
    # If lines meet, hollow markers within each other all show.
    assert a['markerfacecolor'] == 'none'


@each_viewer
def test_ratios_are_darker_the_larger_they_are(viewer):
  colours = [plot_style.RATIO_COLOURS(x)[:3] for x in np.linspace(0, 1, 33)]
  lightness = [lab(colour, viewer)[0] for colour in colours]
  assert (np.diff(lightness) < -0.3).all()
  # Halves and doubles are as far from the even share as can be seen in print.
  quarter, half, even, double, four = (lightness[i] for i in (0, 8, 16, 24, 32))
  assert min(quarter - half, half - even, even - double, double - four) > 8
  assert 100 - quarter > 5  # white is nothing at all


ROWS = [
  {
    'step': 10, 'train/loss': 3.0, 'train/learning_rate': 0.1,
    'train/drop_rate': 0.5, 'train/layer_1/load': [0.75, 0.25],
    'train/layer_11/load': [0.0, 0.5, 0.5],
  },
  {'step': 10, 'eval/valid/loss': 2.75},
  {
    'step': 30, 'train/loss': 2.0, 'train/learning_rate': 0.05,
    'train/drop_rate': 0.25, 'train/layer_1/load': [0.5, 0.5],
    'train/layer_11/load': [0.125, 0.375, 0.5],
  },
  {'step': 30, 'eval/valid/loss': 2.5, 'eval/held/out/loss': 2.625},
]  # fmt: skip


def axes_titled(figure, title):
  return next(a for a in figure.axes if a.get_title(loc='left') == title)


def points_of(axes):
  """The points of every line."""
  return [line.get_xydata().tolist() for line in axes.lines]


def test_smooth_is_a_centred_mean_without_nans():
  values = np.array([1.0, 4.0, 7.0, np.nan, 2.0])
  np.testing.assert_allclose(smooth(values, 3), [2.5, 4.0, 5.5, 4.5, 2.0])
  np.testing.assert_array_equal(smooth(values, 1), values)


def test_curves_show_losses_drops_and_schedule():
  figure = curves_figure(ROWS)
  loss = axes_titled(figure, 'Loss')
  train = [[10, 3.0], [30, 2.0]]
  assert points_of(loss) == [
    train,  # two rows are too few to smooth
    [[10, 2.75], [30, 2.5]],
    [[30, 2.625]],
  ]
  labels = [text.get_text() for text in loss.get_legend().get_texts()]
  assert labels[2] == 'held/out (last 2.6250)'
  drops = axes_titled(figure, 'Dropped choices of experts')
  assert points_of(drops) == [[[10, 50.0], [30, 25.0]]]  # percent
  schedule = axes_titled(figure, 'Learning rate schedule')
  assert points_of(schedule) == [[[10, 0.1], [30, 0.05]]]


def test_the_view_is_not_pressed_flat_by_the_first_steps():
  losses = [10.0, 10.0, *(2 - i / 200 for i in range(2, 100))]
  rows = [{'step': i, 'train/loss': x} for i, x in enumerate(losses)]
  axes = curves_figure(rows).axes[0]
  low, high = axes.get_ylim()
  assert 1.4 < low < 1.52
  assert 1.9 < high < 2.2
  # The last loss is the one that was logged.
  labels = [text.get_text() for text in axes.get_legend().get_texts()]
  assert labels == ['train (last 1.5050)', 'train, mean of 5 rows']
  raw, smoothed = points_of(axes)
  assert raw[0] == [0, 10.0]  # drawn all the same
  # The smoothed value is drawn although it is outside the limits.
  assert smoothed[50] == [50, pytest.approx(1.75)]


def test_a_loss_that_diverged_can_be_drawn(tmp_path):
  rows = [{'step': i, 'train/loss': float('nan')} for i in range(3)]
  rows[0]['train/loss'] = float('inf')
  save(curves_figure(rows), tmp_path / 'curves.png')
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG\r\n')
  assert matplotlib.pyplot.get_fignums() == []  # no figure is kept


def test_loads_are_shares_relative_to_the_uniform_share():
  figure = load_figure(ROWS)
  first = axes_titled(figure, 'layer 1')
  (mesh,) = first.collections
  # Loads [E, time]: 3/4 of the assignments are 1.5 times the even share of 2.
  np.testing.assert_allclose(mesh.get_array(), [[1.5, 1.0], [0.5, 1.0]])
  # Cells of the picture meet halfway between logged steps.
  np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [0.0, 20.0, 30.0])
  np.testing.assert_allclose(mesh.get_coordinates()[:, 0, 1], [-0.5, 0.5, 1.5])

  (mesh,) = axes_titled(figure, 'layer 11').collections
  np.testing.assert_allclose(
    mesh.get_array()[1:], [[1.5, 1.125], [1.5, 1.5]], rtol=1e-6
  )
  colours = mesh.cmap(mesh.norm(mesh.get_array()))
  # An expert without tokens is white; one with an eighth of them, 3/8 of its
  # even share, is orange; the even share is grey.
  assert colours[0, 0].tolist() == [1, 1, 1, 1]
  assert colours[0, 1, 0] > 1.3 * colours[0, 1, 2]
  assert mesh.cmap(mesh.norm(1.0))[:3] == pytest.approx([0.63] * 3, abs=0.04)
  assert len(figure.axes) == 3  # two layers, and the bar of colours


def test_a_long_run_is_averaged_down():
  rows = [
    {'step': i, 'train/layer_0/load': [1.0, 0.0] if i % 2 else [0.5, 0.5]}
    for i in range(800)
  ]
  mesh = load_figure(rows).axes[0].collections[0]
  expected = np.broadcast_to([[1.5], [0.5]], (2, 400))
  np.testing.assert_allclose(mesh.get_array(), expected)


def test_rows_without_the_numbers_have_no_figure():
  assert curves_figure([{'step': 1, 'x': 2}]) is None
  assert load_figure([{'step': 1, 'train/loss': 2.0}]) is None
