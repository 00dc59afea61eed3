"""Recomputes what the pages of studies print from the values of single seeds.

    python -m experiments.recompute

It reads the rows of `results/<study>.json` and the text of
`results/<study>.md`, and shares nothing with what makes the pages: neither code
nor stored verdicts. Every cell, every difference of a claim, a check or a gate,
every verdict and every ‡ is computed anew, and so are the counts of
`RESULTS.md`. It prints a line for each study and each disagreement, and exits
with 1 where there is any. Another folder than this one can be named.

The direction and the bound of a claim, and whether it is a paper's, are read
from the page, as pages are judged by the claims of today; and so are the seeds
that judge claims, where not all do. A verdict that is withheld needs a reason,
which must be true where it is a closed gate or a number of seeds. The end of a
cell's interval may be cut at 0 or at 100.
"""

import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

HERE = pathlib.Path(__file__).parent
NUMBER = r'[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?'
OPEN, WITHHELD, LEAST_SEEDS = 'not resolved', 'withheld', 3
# Verdicts where the interval is on neither side, on the claim's and, as the
# last, on the other; of papers' claims, of ours, and of gates.
VERDICTS = (
  (OPEN, OPEN, OPEN),
  ('direction reproduced', 'shown', 'seen'),
  ('opposite', 'refuted', 'refuted'),
)
# The text of a page about a claim, a gate or a check, in parts.
Claim = re.Match[str]
# Values by seed, by the names of row and column.
Rows = Mapping[str, Mapping[str, Sequence[float | None]]]


def interval(values: np.ndarray) -> tuple[float, float]:
  """The mean and the half width of its 95 % confidence interval (Student)."""
  student = stats.t.ppf(0.975, len(values) - 1)
  return float(np.mean(values)), float(student * stats.sem(values))


def agrees(text: str, values: Sequence[float]) -> bool:
  """Whether a printed number is one of the values, rounded to its digits."""
  half_a_digit = 0.500001 * 10.0 ** -len(text.partition('.')[2])
  return any(abs(float(text) - value) <= half_a_digit for value in values)


def values_of(rows: Rows, name: str, column: str) -> np.ndarray:
  """Values of a row by seed, NaN where there are none; or a number."""
  values = rows[name].get(column, [None]) if name in rows else [name]
  return np.array(values, float)


def cell_agrees(text: str, values: np.ndarray) -> bool:
  """Whether a cell of the results table shows these values of seeds."""
  if np.isnan(values).any():
    return not text
  mean, half = interval(values)
  low, high = mean - half, mean + half
  allowed = [(mean,), (half,)]
  if ' to ' in text:
    allowed = [(mean,), (low, max(low, 0.0)), (high, min(high, 100.0))]
  elif np.ptp(values) == 0:  # measured once for all seeds
    allowed = [(mean,)]
  numbers = re.findall(NUMBER, text)
  return len(numbers) == len(allowed) and all(map(agrees, numbers, allowed))


def table(page: str, heading: str) -> list[list[str]]:
  """The cells of the table with that first heading."""
  pattern = rf'^\| {heading} \|.*\n.*\n((?:\|.*\n)+)'
  (lines,) = re.findall(pattern, page, flags=re.M)
  return [line[2:-2].split(' | ') for line in lines.splitlines()]


def claims_of(page: str, summary: Mapping[str, Any]) -> list[Claim]:
  """The claims, gates and checks of a page."""
  column, row = (
    '|'.join(re.escape(entry['name']) for entry in summary[key])
    for key in ('columns', 'rows')
  )
  pattern = (
    r'(?:\| (?P<paper>[^|\n]*) \| )?'
    rf'(?P<column>{column}), (?P<row>{row}) minus (?P<than>{row}|{NUMBER}): '
    rf'(?:not measured|(?P<mean>{NUMBER}) ± (?P<half>{NUMBER})); (?:claimed '
    rf'(?P<side>above|below) 0|equal if within (?P<within>{NUMBER}))(?:'
    r' \| \*\*(?P<word>[a-z ]+)\*\*(?P<rest>[^|\n]*) \||'
    r': \*\*(?P<gate>[a-z ]+)|; (?P<check>[a-z ]+)(?P<why>[^)]*)\))'
  )
  return [*re.finditer(pattern, page)]


def side_of(claim: Claim, mean: float, half: float) -> int:
  """1 where the interval is on the claim's side, -1 on the other, else 0."""
  if within := float(claim['within'] or 0):
    return (abs(mean) + half < within) - (abs(mean) - half > within)
  side = (mean > half) - (mean < -half)
  return side if claim['side'] == 'above' else -side


def problem_of(claim: Claim, differences: np.ndarray, page: str) -> str:
  """What the page has wrong about a claim, in words; '' where nothing is."""
  mean, half = interval(differences)
  printed, seeds = claim.group('mean', 'half'), len(differences)
  is_measured = None not in printed
  if is_measured == np.isnan(mean) or (
    is_measured and not all(map(agrees, printed, [(mean,), (half,)]))
  ):
    return f'the difference is {mean} ± {half}'
  word = claim['word'] or claim['gate'] or claim['check']
  reason = claim['rest'] or claim['why'] or ''
  if word != WITHHELD:
    expected = VERDICTS[side_of(claim, mean, half)]
    is_right = word in expected and is_measured and seeds >= LEAST_SEEDS
    return f'{seeds} seeds say: {expected[1]}' * (not is_right)
  if gate := re.search('the gate "(.*?)" is ([a-z ]+)', reason):
    closed = rf'Gate: {re.escape(gate[1])}\. .*\*\*{gate[2]}, so claims'
    return 'the gate is open' * (re.search(closed, page) is None)
  few = re.search(r'(\d+) of at least \d+ seeds', reason)
  is_right = int(few[1]) == seeds < LEAST_SEEDS if few else reason
  return '' if is_right else f'it has {seeds} seeds and the reason {reason!r}'


def probability(claim: Claim, differences: np.ndarray) -> float:
  """The probability of Student's test, against zero or the nearer bound."""
  tested = np.copysign(float(claim['within'] or 0), differences.sum())
  if np.ptp(differences) == 0:  # counted, not measured
    return float(differences[0] == tested)
  return float(stats.ttest_1samp(differences, tested).pvalue)


def counts_of(claims: Sequence[Claim]) -> list[str]:
  """Numbers of verdicts as RESULTS.md has them: papers' claims, then ours."""
  found = [
    (not claim['paper'] or 'unverified' in claim['paper'], claim['word'])
    for claim in claims
  ]
  order = [VERDICTS[1], VERDICTS[-1], VERDICTS[0], (WITHHELD, WITHHELD)]
  return [
    ' / '.join(str(found.count((is_ours, words[is_ours]))) for words in order)
    for is_ours in (False, True)
  ]


def main(folder: pathlib.Path = HERE) -> int:
  """Compares all pages of a folder; returns 1 where anything disagrees."""
  overview = (folder / 'RESULTS.md').read_text('utf-8')
  by_line, findings, wrong, all_cells = {'': []}, [], [], 0
  for path in sorted((folder / 'results').glob('*.json')):
    summary, cells, before = json.loads(path.read_text('utf-8')), 0, len(wrong)
    page = path.with_suffix('.md').read_text('utf-8')
    rows = {row['name']: row['values'] for row in summary['rows']}
    for name, line in zip(rows, table(page, ''), strict=True):
      for column, text in zip(summary['columns'], line[1:], strict=True):
        values = values_of(rows, name, column['name'])
        cells += 1
        if line[0] != name or not cell_agrees(text.removesuffix(' †'), values):
          wrong.append(f'{path.stem}: {name}: {text!r} is not of {values}')
    claims = claims_of(page, summary)
    judges = re.search(r'seeds from (\d+) on alone judge', page)
    for claim in claims:
      column, row, than = claim.group('column', 'row', 'than')
      differences = values_of(rows, row, column)
      differences = differences - values_of(rows, than, column)
      if judges and not claim['gate']:
        differences = differences[int(judges[1]) :]
      if problem := problem_of(claim, differences, page):
        wrong.append(f'{path.stem}: {claim[0]}: {problem}')
      elif claim['word'] not in (None, WITHHELD):
        findings.append((probability(claim, differences), claim))
    if len(claims) != len(re.findall('; claimed |; equal if within', page)):
      wrong.append(f'{path.stem}: not all claims can be read')
    by_line[f'[{path.stem}](results/{path.stem}.md)'] = claims
    by_line[''] += claims
    all_cells += cells
    found = (
      f'{cells} cells, {len(claims)} claims, {len(wrong) - before} disagree'
    )
    print(f'{path.stem}: {found}')
  adjusted = stats.false_discovery_control([p for p, _ in findings])
  for p, (_, claim) in zip(adjusted, findings, strict=True):
    if (claim['word'] != OPEN and p > 0.05) != ('‡' in claim['rest']):
      wrong.append(f'{claim[0]}: its adjusted probability is {p}')
  for line in table(overview, 'paper'):
    if line[4:6] != (counts := counts_of(by_line[line[1]])):
      wrong.append(f'{line}: {counts}')
  marks = sum('‡' in (claim['rest'] or '') for claim in by_line[''])
  if f'Of all resolved claims {marks} have a ‡' not in overview:
    wrong.append(f'{marks} claims have a ‡')
  found = f'{all_cells} cells, {len(by_line[""])} claims, {len(wrong)} disagree'
  print(f'all: {found}', *wrong, sep='\n  ')
  return int(bool(wrong))


if __name__ == '__main__':
  sys.exit(main(*map(pathlib.Path, sys.argv[1:])))
