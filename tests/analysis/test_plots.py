"""The figures' axes and the data drawn on them."""

import matplotlib.pyplot
import numpy as np
import pytest

from moe_jax.analysis.plot_style import (
  curves_figure,
  load_figure,
  picture,
  smooth,
)

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


def test_a_loss_that_diverged_can_be_drawn():
  rows = [{'step': i, 'train/loss': float('nan')} for i in range(3)]
  rows[0]['train/loss'] = float('inf')
  assert picture(curves_figure(rows)).startswith(PNG)


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
def test_every_sparse_layer_has_a_panel(num_layers, num_experts):
  load = np.full(num_experts, 1 / num_experts).tolist()
  row = {f'train/layer_{i}/load': load for i in range(num_layers)}
  assert picture(load_figure([{'step': 1} | row])).startswith(PNG)
  *grid, bar = load_figure([{'step': 1} | row]).axes
  assert len(grid) == num_layers
  assert bar.get_ylabel() == 'share / uniform share'


def test_pyplot_knows_of_no_figure():
  picture(curves_figure(ROWS))
  picture(load_figure(ROWS))
  assert matplotlib.pyplot.get_fignums() == []


def test_rows_without_the_numbers_have_no_figure():
  assert curves_figure([{'step': 1, 'x': 2}]) is None
  assert load_figure([{'step': 1, 'train/loss': 2.0}]) is None
