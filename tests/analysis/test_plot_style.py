"""Colours as the colour-blind and a grey print show them.

Deficiencies are simulated by the matrices for a severity of 1.0 in Machado,
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
from moe_jax.analysis.plot_style import (
  curves_figure,
  load_figure,
  save,
  smooth,
)

SEEN_BY = {
  'all': np.eye(3),
  'protanopes': np.array(
    [
      [0.152286, 1.052583, -0.204868],
      [0.114503, 0.786281, 0.099216],
      [-0.003882, -0.048116, 1.051998],
    ]
  ),
  'deuteranopes': np.array(
    [
      [0.367322, 0.860646, -0.227968],
      [0.280085, 0.672501, 0.047413],
      [-0.011820, 0.042940, 0.968881],
    ]
  ),
  'tritanopes': np.array(
    [
      [1.255528, -0.076749, -0.178779],
      [-0.078411, 0.930809, 0.147602],
      [0.004733, 0.691367, 0.303900],
    ]
  ),
}
TO_XYZ = np.array(  # sRGB (IEC 61966-2-1), white D65
  [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
  ]
)
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


def test_lab_of_known_colours():
  np.testing.assert_allclose(lab('white'), [100, 0, 0], atol=0.01)
  np.testing.assert_allclose(lab('#ff0000'), [53.24, 80.09, 67.20], atol=0.02)
  # Greys have no hue for anybody.
  np.testing.assert_allclose(lab('0.5', 'protanopes')[1:], 0, atol=0.1)


@each_viewer
def test_colours_of_lines_are_told_apart(viewer):
  lab_colours = [lab(colour, viewer) for colour in plot_style.COLOURS]
  for a, b in itertools.combinations(lab_colours, 2):
    assert np.linalg.norm(a - b) > 15


def test_another_palette_would_fail():
  red, green = 'tab:red', 'tab:green'
  far = np.linalg.norm(lab(red) - lab(green))
  near = np.linalg.norm(lab(red, 'deuteranopes') - lab(green, 'deuteranopes'))
  assert near < 15 < far


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


PNG = b'\x89PNG\r\n\x1a\n'

ROWS = [
  {
    'step': 10,
    'train/loss': 3.0,
    'train/learning_rate': 0.1,
    'train/drop_rate': 0.5,
    'train/layer_1/load': [0.75, 0.25],
    'train/layer_11/load': [0.0, 0.5, 0.5],
  },
  {'step': 10, 'eval/valid/loss': 2.75},
  {
    'step': 30,
    'train/loss': 2.0,
    'train/learning_rate': 0.05,
    'train/drop_rate': 0.25,
    'train/layer_1/load': [0.5, 0.5],
    'train/layer_11/load': [0.125, 0.375, 0.5],
  },
  {'step': 30, 'eval/valid/loss': 2.5, 'eval/held/out/loss': 2.625},
]


def axes_titled(figure, title):
  return next(
    axes for axes in figure.axes if axes.get_title(loc='left') == title
  )


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
  assert labels == [
    'train (last 2.0000)',
    'valid (last 2.5000)',
    'held/out (last 2.6250)',
  ]
  assert loss.get_ylabel() == 'nats/token'
  drops = axes_titled(figure, 'Dropped choices of experts')
  assert points_of(drops) == [[[10, 50.0], [30, 25.0]]]
  assert drops.get_ylabel() == 'percent'
  schedule = axes_titled(figure, 'Learning rate schedule')
  assert points_of(schedule) == [[[10, 0.1], [30, 0.05]]]
  assert schedule.get_ylabel() == 'learning rate'
  assert {axes.get_xlabel() for axes in figure.axes} == {'step'}


def test_the_view_is_not_pressed_flat_by_the_first_steps():
  rows = [
    {'step': i, 'train/loss': 10.0 if i < 2 else 2 - i / 200}
    for i in range(100)
  ]
  axes = curves_figure(rows).axes[0]
  low, high = axes.get_ylim()
  assert 1.4 < low < 1.52
  assert 1.9 < high < 2.2
  raw, smoothed = points_of(axes)
  assert raw[0] == [0, 10.0]  # drawn all the same
  # The smoothed value is drawn although it is outside the limits.
  assert smoothed[50] == [50, pytest.approx(1.75)]


def test_the_last_loss_is_the_logged_one_beside_the_smoothed_line():
  rows = [{'step': i, 'train/loss': 2.0 + (i == 59)} for i in range(60)]
  axes = curves_figure(rows).axes[0]
  labels = [text.get_text() for text in axes.get_legend().get_texts()]
  assert labels == ['train (last 3.0000)', 'train, mean of 3 rows']


def test_a_loss_that_rises_is_not_hidden_by_its_legend():
  rows = [{'step': i, 'train/loss': 2 + abs(i - 3)} for i in range(9)]
  axes = curves_figure(rows).axes[0]
  figure = axes.figure
  figure.draw_without_rendering()
  legend = axes.get_legend().get_window_extent()
  points = axes.transData.transform(axes.lines[0].get_xydata())
  assert not any(legend.contains(*point) for point in points)


def test_one_row_has_whole_axes():
  rows = [{'step': 20, 'train/loss': 4.0, 'train/layer_1/load': [0.5, 0.5]}]
  axes = curves_figure(rows).axes[0]
  assert axes.get_xlim() == (0, pytest.approx(20.6))
  low, high = axes.get_ylim()
  assert (low + high) / 2 == pytest.approx(4.0)
  assert high - low > 0.1
  axes.figure.draw_without_rendering()
  ticks = [text.get_text() for text in axes.get_xticklabels()]
  assert len(set(ticks)) == len(ticks)
  (mesh,) = axes_titled(load_figure(rows), 'layer 1').collections
  # The row is about all steps until then.
  assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 20]


def test_a_loss_that_diverged_can_be_drawn(tmp_path):
  rows = [{'step': i, 'train/loss': float('nan')} for i in range(3)]
  rows[0]['train/loss'] = float('inf')
  save(curves_figure(rows), tmp_path / 'curves.png')
  assert (tmp_path / 'curves.png').read_bytes().startswith(PNG)


def test_loads_are_shares_relative_to_the_uniform_share():
  figure = load_figure(ROWS)
  first = axes_titled(figure, 'layer 1')
  (mesh,) = first.collections
  # Loads [E, time]: 3/4 of the assignments are 1.5 times the even share of 2.
  np.testing.assert_allclose(mesh.get_array(), [[1.5, 1.0], [0.5, 1.0]])
  # Cells of the picture meet halfway between logged steps.
  np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [0.0, 20.0, 40.0])
  np.testing.assert_allclose(mesh.get_coordinates()[:, 0, 1], [-0.5, 0.5, 1.5])
  assert first.get_ylim() == (1.5, -0.5)

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
  assert figure.get_supxlabel() == 'step'


def test_a_long_run_is_averaged_down():
  rows = [
    {'step': i, 'train/layer_0/load': [1.0, 0.0] if i % 2 else [0.5, 0.5]}
    for i in range(800)
  ]
  mesh = load_figure(rows).axes[0].collections[0]
  expected = np.broadcast_to([[1.5], [0.5]], (2, 400))
  np.testing.assert_allclose(mesh.get_array(), expected)


@pytest.mark.parametrize('num_layers, num_experts', [(1, 4), (2, 64), (5, 3)])
def test_every_sparse_layer_has_a_panel(num_layers, num_experts, tmp_path):
  load = np.full(num_experts, 1 / num_experts).tolist()
  row = {f'train/layer_{i}/load': load for i in range(num_layers)}
  save(load_figure([{'step': 1} | row]), tmp_path / 'load.png')
  assert (tmp_path / 'load.png').read_bytes().startswith(PNG)
  *grid, bar = load_figure([{'step': 1} | row]).axes
  assert len(grid) == num_layers
  assert bar.get_ylabel() == 'share / uniform share'


def test_pyplot_knows_of_no_figure(tmp_path):
  save(curves_figure(ROWS), tmp_path / 'curves.png')
  save(load_figure(ROWS), tmp_path / 'load.png')
  assert matplotlib.pyplot.get_fignums() == []


def test_rows_without_the_numbers_have_no_figure():
  assert curves_figure([{'step': 1, 'x': 2}]) is None
  assert load_figure([{'step': 1, 'train/loss': 2.0}]) is None
