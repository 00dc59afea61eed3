"""Colours as the colour-blind and a grey print show them.

Deficiencies are simulated by the matrices for a severity of 1.0 in Machado,
Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color
Vision Deficiency", IEEE TVCG 15(6), 2009, on linear RGB. Differences are
distances in CIELAB (CIE 1976), in which about 2.3 is just noticeable.
"""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from moe_jax.analysis import plot_style

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


def test_shades_of_layers_are_in_order():
  lightness = [lab(colour[:3])[0] for colour in plot_style.shades(6)]
  assert (np.diff(lightness) > 5).all()
  assert lightness[-1] < 85  # seen on white
