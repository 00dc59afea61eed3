"""Text whose tokens have the colour and the number of the expert they chose.

Eight colours repeat where there are more experts; numbers tell those of one
colour apart, and all of them in print. Not here: the choices
(`recording.py`, `traces.py`), and the text of tokens
(`moe_jax.data.tokenizers.TextStream`).
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moe_jax.errors import InputError

# Lighter tints of Okabe and Ito's colours, on which black text is read.
COLOURS = (
  '#8CC8EC', '#F2B48C', '#8FD6BE', '#E8BBD3',
  '#F7EC8C', '#7FA8D9', '#F0C25E', '#C4C4C4',
)  # fmt: skip
_NO_CHOICE = '#FFFFFF'  # the colour of a token without a choice
_NEW_LINE, _INVISIBLE = '\u21b5', '\u00b7'
_LINE_HEIGHT = 0.26  # inches, with the numbers of experts
_CHARACTER_WIDTH = 0.085  # inches
_GAP = 2  # characters between panels
_DPI = 130  # fine enough for the numbers to be read


class Piece(NamedTuple):
  """The part of a token that stands in one line.

  Attributes:
    line: The number of the line.
    column: The number of the first character in it.
    text: The characters; a sign stands for a new line and for no text.
    token: The number of the token.
  """

  line: int
  column: int
  text: str
  token: int


def pieces(texts: Sequence[str], columns: int) -> Iterator[Piece]:
  """The parts of tokens, in lines that end at new lines or when they are full.

  Args:
    texts: The text of each token; a token with none still has a place.
    columns: The most characters in a line.

  Raises:
    ValueError: `columns` is less than 1.
  """
  if columns < 1:
    raise InputError(f'columns={columns} must be at least 1')
  line = column = 0
  for token, text in enumerate(texts):
    segments = (text or _INVISIBLE).split('\n')
    for index, segment in enumerate(segments):
      rest = segment + _NEW_LINE * (index < len(segments) - 1)
      while rest:
        if column == columns:
          line, column = line + 1, 0
        piece, rest = rest[: columns - column], rest[columns - column :]
        yield Piece(line, column, piece, token)
        column += len(piece)
      if index < len(segments) - 1:
        line, column = line + 1, 0


def figure(
  texts: Sequence[str],
  experts: Mapping[str, Int[np.ndarray, ' N']],
  *,
  columns: int = 110,
) -> Figure:
  """A panel of text for each layer, tokens coloured by expert.

  A panel is as wide as its longest line. As many stand beside each other as
  `columns` characters have room for, at least one.

  Args:
    texts: The text of each of N tokens.
    experts: The expert of each token, -1 for none, by the title of a panel,
      such as 'layer 1'.
    columns: The most characters in a line of a panel, and of the figure.

  Raises:
    ValueError: A panel has not one expert for each text.
  """
  for name, expert_index in experts.items():
    _check(texts, expert_index, name)
  all_pieces = list(pieces(texts, columns))
  lines = 1 + max((piece.line for piece in all_pieces), default=0)
  ends = [piece.column + len(piece.text) for piece in all_pieces]
  width = max([*ends, *map(len, experts)], default=1)
  across = max(1, min(len(experts), columns // (width + _GAP)))
  down = math.ceil(len(experts) / across)
  size = (
    across * _CHARACTER_WIDTH * (width + _GAP),
    down * (_LINE_HEIGHT * lines + 0.35),
  )
  canvas = Figure(figsize=size, dpi=_DPI, layout='constrained')
  panels = canvas.subplots(down, across, squeeze=False).ravel()
  for axes in panels[len(experts) :]:
    axes.remove()
  for axes, (name, expert_index) in zip(panels, experts.items(), strict=False):
    axes.set_title(name, loc='left', fontsize=9)
    axes.set(xlim=(0, width), ylim=(lines, 0))
    axes.axis('off')
    for piece in all_pieces:
      _draw(axes, piece, int(expert_index[piece.token]))
  return canvas


def _draw(axes: Axes, piece: Piece, expert: int) -> None:
  x, y, width = piece.column, piece.line, len(piece.text)
  box = Rectangle((x, y + 0.04), width, 0.92, fc=_colour(expert), ec='white')
  axes.add_patch(box)
  number = '' if expert < 0 else str(expert)
  axes.text(x + 0.15, y + 0.09, number, va='top', fontsize=4.8, color='0.2')
  style = {'family': 'monospace', 'fontsize': 7, 'parse_math': False}
  for offset, character in enumerate(piece.text):
    # Characters are drawn one by one, as no font is as wide as a cell.
    ink = '0.45' if character in (_NEW_LINE, _INVISIBLE) else 'black'
    point = x + offset + 0.5, y + 0.66
    axes.text(*point, character, ha='center', va='center', color=ink, **style)


def page(texts: Sequence[str], experts: Int[np.ndarray, ' N']) -> str:
  """The text as HTML, each token with its expert's colour and number.

  Args:
    texts: The text of each of N tokens.
    experts: The expert of each token; -1 for none.

  Raises:
    ValueError: There is not one expert for each text.
  """
  _check(texts, experts, 'experts')
  spans = []
  for text, expert in zip(texts, experts, strict=True):
    text = html.escape(text or _INVISIBLE).replace('\n', f'{_NEW_LINE}\n')
    number = '' if expert < 0 else f'<sub>{int(expert)}</sub>'
    style = f'background:{_colour(int(expert))};color:black'
    spans.append(f'<span style="{style}">{text}{number}</span>')
  return f'<pre style="line-height:1.7">{"".join(spans)}</pre>'


def _colour(expert: int) -> str:
  return _NO_CHOICE if expert < 0 else COLOURS[expert % len(COLOURS)]


def _check(
  texts: Sequence[str], experts: Int[np.ndarray, '...'], name: str
) -> None:
  if np.shape(experts) != (len(texts),):
    raise InputError(
      f'{name} has shape {np.shape(experts)}, and one expert is needed for '
      f'each of {len(texts)} texts'
    )
