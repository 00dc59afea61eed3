"""Figures as SVG within a page, in the page's own colours.

Text stays text, black becomes the page's ink, and the colours of lines become
those of the page's light or dark scheme. Not here: the page (`html_pages.py`).
"""

import html
import io
import re
from typing import Any

import matplotlib

from moe_jax.analysis import plot_style

# Colours of lines on white paper and on dark, in the order of
# `plot_style.COLOURS`; all have a contrast of 3 or more, as WCAG 1.4.11 asks.
_SCHEMES = (
  ('#0072b2', '#4aa3df'),
  ('#d55e00', '#ff7f32'),
  ('#008a65', '#2cc295'),
  ('#b8608f', '#dd98bd'),
  ('#a87000', '#e69f00'),
  ('#2e8bc0', '#8fd3ff'),
  ('#222222', '#e4e4e4'),
)
_LINES = ' '.join(
  f'--series-{i}: light-dark({light}, {dark});'
  for i, (light, dark) in enumerate(_SCHEMES)
)
_REMOVED = r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->'
# Patterns in tags and their replacements: shorter tags, colours of the page.
_IN_TAGS = [
  (r'^<g id="[^"]*"', '<g'),
  (r" font-family: 'DejaVu Sans'[^;\"]*;?", ''),
  (r' transform="rotate\(-0 [^"]*"', ''),
  (r'(\.\d\d)\d+', r'\1'),
  ('#808080|#b0b0b0', 'var(--faint)'),
  ('#cccccc', 'var(--edge)'),
  ('#ffffff', 'var(--paper)'),
  *((c, f'var(--series-{i})') for i, c in enumerate(plot_style.COLOURS)),
]
STYLE = f"""\
:root {{ {_LINES} }}
svg {{ max-width: 100%; height: auto; }}
svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
svg text {{ fill: var(--ink);
  font-family: 'DejaVu Sans', Verdana, sans-serif; }}
"""


def inline_svg(figure: Any, name: str, label: str) -> str:
  """The SVG element of a figure, the same for the same figure.

  Args:
    figure: A figure of matplotlib; its background is left out.
    name: A name that no other figure of the page has, of letters that an
      element's id may have.
    label: The text that is read to those who do not see the figure.
  """
  settings: dict[Any, Any] = {'svg.fonttype': 'none', 'svg.hashsalt': name}
  buffer = io.StringIO()
  with matplotlib.rc_context(settings):
    figure.savefig(
      buffer, format='svg', transparent=True, metadata={'Date': None}
    )
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(_REMOVED, '', text, flags=re.DOTALL)
  text = re.sub(r'\s*\n\s*', ' ', text)
  text = re.sub('<[^>]*>', _shorten, text)
  text = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{name}-', text)
  title = f'<title>{html.escape(label)}</title>'
  return text.replace('<svg', '<svg role="img"', 1).replace('>', f'>{title}', 1)


def _shorten(tag: re.Match[str]) -> str:
  """A tag in the page's colours, with fewer digits and attributes."""
  text = tag[0]
  for pattern, replacement in _IN_TAGS:
    text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
  return text
