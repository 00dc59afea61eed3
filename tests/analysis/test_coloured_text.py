"""Coloured text: where tokens stand, their numbers, and what is escaped."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from moe_jax.analysis.coloured_text import COLOURS, Piece, figure, page, pieces

# 'if' and a condition, a new line with its indentation, a part of a character
# that has no text yet, and a call.
TEXTS = ['if', ' x', ':\n  ', '', 'f($_)']


def test_tokens_are_broken_at_new_lines_and_at_the_last_column():
  assert list(pieces(TEXTS, 6)) == [
    Piece(0, 0, 'if', 0),
    Piece(0, 2, ' x', 1),
    Piece(0, 4, ':\u21b5', 2),
    Piece(1, 0, '  ', 2),
    Piece(1, 2, '\u00b7', 3),
    Piece(1, 3, 'f($', 4),
    Piece(2, 0, '_)', 4),
  ]
  with pytest.raises(ValueError, match='columns=0 must be at least 1'):
    next(pieces(TEXTS, 0))


def test_a_panel_has_the_colours_and_numbers_of_its_layer():
  experts = {'layer 1': np.array([0, 9, 2, -1, 0]), 'layer 3': np.arange(5)}
  canvas = figure(TEXTS, experts, columns=6)
  first, second = canvas.axes
  assert [axes.get_title(loc='left') for axes in canvas.axes] == [*experts]
  boxes = [to_hex(box.get_facecolor()).upper() for box in first.patches]
  token_of = [piece.token for piece in pieces(TEXTS, 6)]
  expected = [COLOURS[0], COLOURS[1], COLOURS[2], '#FFFFFF', COLOURS[0]]
  assert boxes == [expected[token] for token in token_of]
  numbers = [t.get_text() for t in second.texts if t.get_fontsize() < 5]
  assert numbers == [str(token) for token in token_of]
  text = ''.join(t.get_text() for t in first.texts if t.get_fontsize() > 5)
  assert text == 'if x:\u21b5  \u00b7f($_)'
  canvas.savefig('/dev/null', format='png')  # '$' is no formula


def test_panels_are_as_wide_as_their_text_and_stand_side_by_side():
  experts = {f'layer {n}': np.zeros(5, int) for n in range(3)}
  wide, narrow = (figure(TEXTS, experts, columns=n) for n in (20, 12))
  # The longest line has 8 characters with those that are shown for nothing.
  assert [axes.get_xlim() for axes in wide.axes] == [(0, 8)] * 3
  for canvas, rows in ((wide, [0, 0, 1]), (narrow, [0, 1, 2])):
    grid_cells = [axes.get_subplotspec() for axes in canvas.axes]
    assert [cell.rowspan.start for cell in grid_cells] == rows
  assert wide.get_figwidth() == pytest.approx(2 * narrow.get_figwidth())


def test_html_escapes_text_and_numbers_tokens():
  text = page(['<b>', '&\n', ''], np.array([3, 0, -1]))
  assert '&lt;b&gt;<sub>3</sub>' in text
  assert '&amp;\u21b5\n<sub>0</sub>' in text
  assert '\u00b7</span>' in text


def test_a_text_without_an_expert_is_refused():
  with pytest.raises(ValueError, match=r'layer 1 has shape \(4,\)'):
    figure(TEXTS, {'layer 1': np.zeros(4, int)})
  with pytest.raises(ValueError, match='each of 1 texts'):
    page(['a'], np.zeros(2, int))
