"""The figures' axes and the data drawn on them."""

import matplotlib.pyplot
import numpy as np
import pytest

from moe_jax.analysis.plots import (
  curves_figure,
  load_figure,
  plot_curves,
  plot_load,
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


def drawn(axes):
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
  assert drawn(loss) == [
    train,
    train,  # two rows are too few to smooth
    [[10, 2.75], [30, 2.5]],
    [[30, 2.625]],
  ]
  labels = [text.get_text() for text in loss.get_legend().get_texts()]
  assert labels == [
    'train (last 2.000)',
    'valid (last 2.500)',
    'held/out (last 2.625)',
  ]
  assert loss.get_ylabel() == 'nats/token'
  drops = axes_titled(figure, 'Dropped choices of experts')
  assert drawn(drops) == [[[10, 50.0], [30, 25.0]]]
  assert drops.get_ylabel() == 'percent'
  schedule = axes_titled(figure, 'Learning rate schedule')
  assert drawn(schedule) == [[[10, 0.1], [30, 0.05]]]
  assert schedule.get_ylabel() == 'learning rate'
  assert {axes.get_xlabel() for axes in figure.axes} == {'step'}


def test_the_view_is_not_pressed_flat_by_the_first_steps():
  rows = [
    {'step': i, 'train/loss': 10.0 if i < 2 else 2 - i / 200}
    for i in range(100)
  ]
  (axes,) = curves_figure(rows).axes
  low, high = axes.get_ylim()
  assert 1.4 < low < 1.52
  assert 1.9 < high < 2.2
  raw, smoothed = drawn(axes)
  assert raw[0] == [0, 10.0]  # drawn all the same
  # The smoothed value is drawn although it is outside the limits.
  assert smoothed[50] == [50, pytest.approx(1.75)]


def test_a_loss_that_diverged_can_be_drawn(tmp_path):
  rows = [{'step': i, 'train/loss': float('nan')} for i in range(3)]
  rows[0]['train/loss'] = float('inf')
  plot_curves(rows, tmp_path / 'curves.png')
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
  # An expert without tokens is black; one with an eighth of them, 3/8 of its
  # even share, is blue.
  assert colours[0, 0].tolist() == [0, 0, 0, 1]
  assert colours[0, 1, 2] > 2 * colours[0, 1, 0]
  assert mesh.cmap(mesh.norm(1.0))[:3] == pytest.approx([0.97] * 3, abs=0.01)
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
def test_every_sparse_layer_has_a_panel(tmp_path, num_layers, num_experts):
  load = np.full(num_experts, 1 / num_experts).tolist()
  row = {f'train/layer_{i}/load': load for i in range(num_layers)}
  plot_load([{'step': 1} | row], tmp_path / 'load.png')
  assert (tmp_path / 'load.png').read_bytes().startswith(PNG)
  *panels, bar = load_figure([{'step': 1} | row]).axes
  assert len(panels) == num_layers
  assert bar.get_ylabel() == 'share / uniform share'


def test_pyplot_knows_of_no_figure(tmp_path):
  plot_curves(ROWS, tmp_path / 'curves.png')
  plot_load(ROWS, tmp_path / 'load.png')
  assert matplotlib.pyplot.get_fignums() == []


def test_rows_without_the_numbers_are_refused():
  with pytest.raises(ValueError, match=r"no 'train/loss'.*\['step', 'x'\]"):
    curves_figure([{'step': 1, 'x': 2}])
  with pytest.raises(ValueError, match='a dense model has none'):
    load_figure([{'step': 1, 'train/loss': 2.0}])
