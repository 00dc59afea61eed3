"""The page of all studies: their claims as a grid, then study by study.

Each number is read from the studies' summaries, and figures are drawn from
them. Not here: which summaries (`experiments/report.py`), and what a page
shares with others (`pages.py`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.study import claims, figures, pages, result_tables, verdicts
from experiments.study import results as study_results
from experiments.study.parts import Figure
from experiments.study.tables import Interval

Summary = Mapping[str, Any]
# The sign and the CSS class of each verdict; only decided published claims are
# filled.
MARKS = {
  verdicts.REPRODUCED: ('✓', 'yes'),
  verdicts.OPPOSITE: ('✗', 'no'),
  verdicts.SHOWN: ('✓', 'ours yes'),
  verdicts.REFUTED: ('✗', 'ours no'),
  verdicts.UNRESOLVED: ('?', 'open'),
  verdicts.WITHHELD: ('-', 'open'),
}
_HELD = (verdicts.REPRODUCED, verdicts.SHOWN)
_LISTED = 2  # number of claims of a kind that an answer quotes

_STYLE = """\
.papers { display: grid; grid-template-columns: minmax(9em, 15em) 1fr;
  gap: .5em 1.5em; align-items: baseline; }
.papers h3 { margin: 0; font-size: 1em; }
.papers p { margin: 0 0 .3em; }
.mark { display: inline-block; width: 1.6em; line-height: 1.6; margin: 1px;
  text-align: center; text-decoration: none; border-radius: 3px;
  font-weight: bold; border: 2px solid var(--of); color: var(--of); }
.yes { --of: light-dark(#0b6b4b, #58d6a8); }
.no { --of: light-dark(#a33b00, #ff9a5c); }
.open { --of: var(--faint); }
.yes:not(.ours), .no:not(.ours) { background: var(--of); color: var(--paper); }
.answer { font-size: 1.1em; max-width: 46em; }
.caveat { max-width: 50em; }
@media (max-width: 600px) { .papers { grid-template-columns: 1fr; }
  .papers h3 { margin-top: .5em; } }
"""
_BODY = """\
<h1>{{ title }}</h1>
<p class="answer">{{ totals }}</p>
<p>{% for word, (sign, kind) in marks.items() %}
<span class="mark {{ kind }}" aria-hidden="true">{{ sign }}</span>
{{ word }}{{ '.' if loop.last else ',' }}
{% endfor %}A filled square is a claim that a paper has printed and that is
decided here; an empty one is a question of our own, or not resolved, or
withheld.</p>

<div class="papers">{% for paper, of_paper in papers %}
<h3>{{ paper }}</h3><div>{% for one in of_paper %}
<p><a href="#{{ one.name }}">{{ one.title }}</a><br>
{% for claim in one.marks %}<a class="mark {{ claim.kind }}"
 href="#{{ one.name }}-claims" title="{{ claim.label }}"
 aria-label="{{ claim.label }}">{{ claim.sign }}</a>{% endfor %}</p>{% endfor %}
</div>{% endfor %}</div>
<h3>How to read this page</h3>
<p class="caveat">{{ about }}</p>

{% for one in studies %}
<h2 id="{{ one.name }}">{{ one.title }}</h2>
<p class="note">{{ one.source }}</p>
<p class="answer">{{ one.answer }}</p>
{% if one.panels %}<figure><div class="panels">
{% for panel in one.panels %}{{ panel }}{% endfor %}</div>
<figcaption>Means over seeds with their 95 % intervals.
{% if one.has_paper %}A grey triangle stands at the value with which a checked
claim compares a row, and points to the side where the paper has that row; a
diamond says that the paper has no difference.{% endif %}
</figcaption></figure>{% endif %}

<h3>Numbers</h3>
{{ show(one.rows) }}
{% if one.claims %}<h3 id="{{ one.name }}-claims">Claims</h3>
<div class="prose">{{ show(one.claims) }}</div>{% endif %}

<h3>Caveats and command</h3>
{% for text in one.caveats %}<p class="caveat">{{ text }}</p>{% endfor %}
<p class="caveat">{{ one.conditions }}</p>
<pre>{{ one.command }}</pre>
{% endfor %}
"""


def html(
  summaries: Sequence[Summary],
  about: str,
  figure_of: Callable[[str], Figure | None],
) -> str:
  """The page.

  Args:
    summaries: The summaries of the studies.
    about: Explanation of how verdicts are reached, in Markdown.
    figure_of: Gives the description of a study's figure by the study's name;
      None for no figure.
  """
  papers: dict[str, list[dict[str, Any]]] = {}
  for summary in summaries:
    papers.setdefault(paper_of(summary['source']), []).append(_grid(summary))
  return pages.render(
    _BODY,
    title='Published tables, run again',
    style=_STYLE,
    totals=_totals(summaries),
    marks=MARKS,
    papers=sorted(papers.items()),
    about=pages.code(about),
    studies=[_section(one, figure_of(one['name'])) for one in summaries],
  )


def paper_of(source: str) -> str:
  """The paper in a study's source, without tables, sections and remarks."""
  pattern = r'[;(]|, (?=Tables? |Figures? |Appendix |[a-z])'
  return re.split(pattern, source, maxsplit=1)[0].strip()


def answer(summary: Summary) -> str:
  """Two sentences: how many claims hold, and which do not or are left open."""
  all_claims = summary['claims']
  if not all_claims:
    return 'The study claims nothing. Its numbers are in the table.'
  judged = [c for c in all_claims if c['verdict'] != verdicts.WITHHELD]
  if not judged:
    texts = _quoted([c['text'] for c in all_claims])
    return f'No claim is judged. Withheld is the verdict on {texts}.'
  held = [claim for claim in judged if claim['verdict'] in _HELD]
  counts = []
  for words, published in (('published', True), ('of our own', False)):
    of_kind = [claim for claim in judged if _is_published(claim) == published]
    count = sum(claim in held for claim in of_kind)
    if len(of_kind) == len(judged):
      counts = [f'all are {words}']
    elif of_kind:
      counts.append(f'{count} of {len(of_kind)} {words}')
  verb = 'holds' if len(held) == 1 else 'hold'
  noun = 'judged claims' if len(judged) < len(all_claims) else 'claims'
  first = (
    f'{len(held)} of {len(judged)} {noun} {verb} here ({", ".join(counts)})'
  )
  first += f', such as {_measured(held[0], summary)}.' if held else '.'
  clauses = []
  for words, kinds in (
    ('The opposite is true of', (verdicts.OPPOSITE, verdicts.REFUTED)),
    ('not resolved is', (verdicts.UNRESOLVED,)),
    ('withheld is the verdict on', (verdicts.WITHHELD,)),
  ):
    texts = [c['text'] for c in all_claims if c['verdict'] in kinds]
    if texts:
      clauses.append(f'{words} {_quoted(texts)}')
  second = '; '.join(clauses) or 'None is refuted, and none is left open'
  return f'{first} {second[0].upper()}{second[1:]}.'


def _is_published(claim: Mapping[str, Any]) -> bool:
  published = claim['published']
  return bool(published) and claims.HIDDEN not in published


def _measured(claim: Mapping[str, Any], summary: Summary) -> str:
  """A claim in quotes with its measured difference."""
  column = {c['name']: c for c in summary['columns']}[claim['column']]
  interval = result_tables.interval_of(claim)
  side = 'higher' if interval.mean > 0 else 'lower'
  size = Interval(abs(interval.mean), interval.half_width)
  number = f'{size:.{column["digits"]}f} {column["unit"]}'.rstrip()
  return f'“{claim["text"]}” ({column["name"]}: {number} {side})'


def _quoted(texts: Sequence[str]) -> str:
  more = len(texts) - _LISTED
  listed = ', '.join(f'“{text}”' for text in texts[:_LISTED])
  return listed + (f' and {more} more' if more > 0 else '')


def _totals(summaries: Sequence[Summary]) -> str:
  """A sentence that counts verdicts of all studies."""
  words = [claim['verdict'] for one in summaries for claim in one['claims']]
  counts = [f'{w} {words.count(w)}' for w in verdicts.WORDS if w in words]
  total = f'{len(words)} claims of {len(summaries)} studies. '
  return total + f'Verdicts: {", ".join(counts)}.' * bool(counts)


def _grid(summary: Summary) -> dict[str, Any]:
  """A study's line of the grid."""
  marks = []
  for claim in summary['claims']:
    sign, kind = MARKS[claim['verdict']]
    label = f'{claim["text"]}: {claim["verdict"]}'
    marks.append({'sign': sign, 'kind': kind, 'label': label})
  return {'name': summary['name'], 'title': summary['title'], 'marks': marks}


def _section(summary: Summary, spec: Figure | None) -> dict[str, Any]:
  """The parts of a study's section."""
  name = summary['name']
  claim_lines = result_tables.claim_lines(summary)
  panels = _panels(summary, spec) if spec else []
  prose = ['claim', 'published', 'here', 'verdict']
  return {
    'name': name,
    'title': summary['title'],
    'source': summary['source'],
    'answer': answer(summary),
    'panels': panels,
    'has_paper': any(figures.PAPER in panel for panel in panels),
    'rows': pages.table(name, result_tables.result_lines(summary), ['']),
    'claims': pages.table(name, claim_lines, prose) if claim_lines else None,
    'caveats': [
      pages.code(text)
      for text in study_results.aged(summary) + study_results.caveats(summary)
      if text
    ],
    'conditions': pages.code(study_results.conditions(summary)),
    'command': study_results.command(summary),
  }


def _panels(summary: Summary, spec: Figure) -> list[str]:
  """A figure for each column, which a phone can show."""
  return [
    pages.svg(
      figures.canvas(spec, summary, [column]),
      f'{summary["name"]}-{i}',
      f'{column["name"]} of each row; the table below has the numbers',
    )
    for i, column in enumerate(figures.columns(spec, summary))
  ]
