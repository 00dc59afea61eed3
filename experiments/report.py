"""Writes what the studies found: a page for each, an overview, the findings.

    python -m experiments.report

Copies `results/<study>/full/summary.json` of every study that has one, with its
figure, to `experiments/results`, and writes there a page for each summary, from
which `RESULTS.md` and `FINDINGS.md` are made; a study that was not run again
keeps its earlier summary. Claims are judged as the study has them today, and
figures drawn. The pages refuse to mix corpora: studies of one task must have
seen the same bytes.
"""

import collections
import importlib
import importlib.util
import json
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study import figures, stored, verdicts
from experiments.study import results as study_results
from experiments.study.study import Study
from experiments.study.tables import markdown_table
from moe_jax import cli
from moe_jax.errors import InputError

HERE = pathlib.Path(__file__).parent
KEPT = 'results'
PAGE = 'RESULTS.md'
MISSES = 'misses.md'
BENCHMARKS = 'benchmarks'
PRESET = 'full'
FINDINGS = 'FINDINGS.md'
# The finding of each study by which its paper is known: the claim, a sentence
# that holds its number, and the verdict with which the sentence agrees.
SENTENCES = HERE / 'study' / 'findings.json'
_ABOUT = """\
These are published tables that were run again at a size that two cores can
train, in models thousands of times smaller than the papers', so that directions
are compared, never values. [FINDINGS.md](FINDINGS.md) says in a sentence each
what was found, [CHOOSE.md](CHOOSE.md) which settings follow, and the page of a
study has its table, its claims and its figure. `python -m experiments.report`
makes them from the results of full presets.

A direction counts as reproduced only where the paired 95 % interval of the
difference excludes zero on the paper's side; else it is "opposite" or "not
resolved". A claim that two rows are alike counts where the whole interval lies
within its bound. Claims that no paper has a verified number for are questions
of our own, "shown" or "refuted". Checks, which could not have failed, are
counted nowhere. A verdict is withheld where fewer than three seeds were run,
where a run was a trial or is older than what it is about (such cells have a †),
where a baseline is not served as its paper has it, and where the study's gate
is closed: what the question presupposes was not seen. Where seeds were added
after a look at the others, they alone judge. A claim with a ‡ is
resolved by itself, but falls if one in twenty of all resolved findings may be
by chance (Benjamini and Hochberg).
"""
_FINDINGS_ABOUT = """\
# Findings

One sentence for each paper and study, with one difference and its 95 %
interval, all of models thousands of times smaller than the papers', trained for
minutes on two cores. **Reproduced**: the direction is the paper's.
**Contradicted**: it is the other one. **Shown** and **refuted**: as before, but
of what we expected where no paper has a verified number. **Not at this size**:
the seeds resolve no difference. **Set-up too weak**: the study cannot decide.
`python -m experiments.report` writes this page.
"""
GRADES = {
  verdicts.REPRODUCED: 'reproduced',
  verdicts.OPPOSITE: 'contradicted',
  verdicts.SHOWN: 'shown',
  verdicts.REFUTED: 'refuted',
  verdicts.UNRESOLVED: 'not at this size',
  verdicts.WITHHELD: 'set-up too weak',
}


def summaries_of(results: pathlib.Path) -> dict[str, pathlib.Path]:
  """Paths of the summaries of full presets, by study."""
  paths = sorted(results.glob(f'*/{PRESET}/{study_results.SUMMARY}'))
  return {path.parts[-3]: path for path in paths}


def collect(results: pathlib.Path, archive: pathlib.Path) -> None:
  """Copies reported summaries, figures and benchmarks to the archive."""
  archive.mkdir(parents=True, exist_ok=True)
  for name, path in summaries_of(results).items():
    picture = path.with_name(study_results.PICTURE)
    shutil.copyfile(path, archive / f'{name}.json')
    shutil.copyfile(picture, archive / f'{name}.png')
  for path in sorted(results.glob('bench_*/*/results.json')):
    (archive / BENCHMARKS).mkdir(exist_ok=True)
    name = '-'.join(path.parts[-3:-1])  # the benchmark and the device
    shutil.copyfile(path, archive / BENCHMARKS / f'{name}.json')


def read(
  archive: pathlib.Path, results: pathlib.Path | None = None
) -> list[dict[str, Any]]:
  """Reads the summaries of all studies, in the order of their names.

  Args:
    archive: Folder of the summaries that were copied before.
    results: Folder of new results, which replace those copied before.

  Raises:
    ValueError: There is no summary, or two studies of one task saw different
      data.
  """
  paths = {path.stem: path for path in archive.glob('*.json')}
  paths |= summaries_of(results) if results else {}
  texts = misses(archive)
  summaries = [
    today(json.loads(path.read_text(encoding='utf-8')))
    | {'misses': texts.get(name, '')}
    for name, path in sorted(paths.items())
  ]
  if not summaries:
    where = ' or '.join(str(f) for f in (results, archive) if f)
    raise InputError(f'no results of a study with --preset={PRESET} in {where}')
  names: dict[str, dict[str, list[str]]] = {}
  for summary in summaries:
    same = names.setdefault(summary['task'], {})
    same.setdefault(', '.join(summary['digests']), []).append(summary['name'])
  for task, by_digests in names.items():
    if len(by_digests) > 1:
      raise InputError(f'studies of {task!r} saw different data: {by_digests}')
  verdicts.mark_false_discoveries(summaries)
  return summaries


def misses(archive: pathlib.Path) -> dict[str, str]:
  """Texts on opposite, refuted and open claims of stored results, by study.

  They are the sections of the archive's file `misses.md`, if it has one.
  """
  if not (path := archive / MISSES).exists():
    return {}
  _, *sections = re.split(r'^## (\w+)$', path.read_text('utf-8'), flags=re.M)
  texts = (' '.join(text.split()) for text in sections[1::2])
  return dict(zip(sections[::2], texts, strict=True))


def find_study(name: str) -> Study | None:
  """The study of a stored summary; None where it no longer exists."""
  module = f'experiments.{name}'
  if importlib.util.find_spec(module) is None:
    return None
  return importlib.import_module(module).STUDY


def pending(summaries: Sequence[dict[str, Any]]) -> str:
  """A sentence that names the studies without a summary; '' if all have one."""
  stored_names = {summary['name'] for summary in summaries}
  names = [
    path.stem
    for path in sorted(HERE.glob('*.py'))
    if '\nSTUDY = ' in path.read_text(encoding='utf-8')
    and path.stem not in stored_names
  ]
  if not names:
    return ''
  listed = ', '.join(f'`{name}`' for name in names)
  return f'No result of a full preset is stored yet of {listed}.\n'


def today(summary: dict[str, Any]) -> dict[str, Any]:
  """A summary as its study judges it today; see `stored.judged_again`."""
  study = find_study(summary['name'])
  return summary if study is None else stored.judged_again(summary, study)


def redraw(summaries: Sequence[dict[str, Any]], archive: pathlib.Path) -> None:
  """Draws the figures anew."""
  for summary in summaries:
    if study := find_study(summary['name']):
      figures.draw(study.figure, summary, archive / f'{summary["name"]}.png')


def pages(summaries: Sequence[dict[str, Any]]) -> dict[str, str]:
  """All pages in Markdown, by path in the folder of this file."""
  texts = {PAGE: overview(summaries), FINDINGS: findings(summaries)}
  for summary in summaries:
    name = summary['name']
    text = study_results.text_of(summary, f'{name}.png')
    texts[f'{KEPT}/{name}.md'] = text
  return texts


def sentences() -> list[dict[str, str]]:
  """The sentences of the findings, by year and paper."""
  entries = json.loads(SENTENCES.read_text(encoding='utf-8'))
  return sorted(entries, key=lambda entry: (entry['year'], entry['paper']))


def findings(summaries: Sequence[dict[str, Any]]) -> str:
  """The page of findings, in Markdown.

  Raises:
    ValueError: A sentence is about a claim that its study does not have, or
      agrees with another verdict than that of today.
  """
  by_study = {summary['name']: summary for summary in summaries}
  lines = []
  for entry in sentences():
    if (summary := by_study.get(entry['study'])) is None:
      continue
    claims = {claim['text']: claim for claim in summary['claims']}
    claim = claims.get(entry['claim'])
    if claim is None or claim['verdict'] != entry['verdict']:
      found = claim and claim['verdict']
      raise InputError(
        f'{SENTENCES.name}, {entry["study"]}: the sentence is for '
        f'{entry["verdict"]!r} of {entry["claim"]!r}, which is {found!r}; '
        'write it anew'
      )
    digits = {c['name']: c['digits'] for c in summary['columns']}
    spec = f'.{digits.get(claim["column"], 2)}f'
    mean, width = claim['difference'], claim['half_width']
    width = 'unknown' if width is None else f'{width:{spec}}'
    number = 'unknown' if mean is None else f'{abs(mean):{spec}} ± {width}'
    values = dict(difference=number, half_width=width)
    sentence = entry['sentence'].format(**values)
    grade = GRADES[claim['verdict']]
    link = f'[{entry["study"]}]({KEPT}/{entry["study"]}.md)'
    lines.append(f'- {entry["paper"]}: {sentence} **{grade}** ({link})')
  return '\n'.join([_FINDINGS_ABOUT, *lines, ''])


def overview(summaries: Sequence[dict[str, Any]]) -> str:
  """The page that lists all studies, by the year of their paper."""
  papers: dict[str, str] = {}  # of the first sentence of each study
  for entry in sentences():
    papers.setdefault(entry['study'], entry['paper'])
  places = {name: i for i, name in enumerate(papers)}
  last, rows = len(places), []
  total: collections.Counter = collections.Counter()
  for summary in sorted(summaries, key=lambda s: places.get(s['name'], last)):
    counts = collections.Counter(
      (claim['kind'], claim['verdict']) for claim in summary['claims']
    )
    total += counts
    rows.append(
      {
        'paper': papers.get(summary['name'], summary['source']),
        'study': f'[{summary["name"]}]({KEPT}/{summary["name"]}.md)',
        'gate': ', '.join(
          'open' if gate['verdict'] == verdicts.SHOWN else 'closed'
          for gate in summary['gates']
        ),
        'rate': 'searched' * summary['searched']
        + 'exempt' * bool(summary['exempt']),
        **_counted(counts),
        'core minutes': f'{summary["minutes"]:g}',
      }
    )
  names = ('paper', 'study', 'gate', 'rate')
  sums = dict.fromkeys(names, '') | _counted(total) | {'core minutes': ''}
  rows.append(sums | {'paper': 'all'})
  doubtful = sum(c['doubtful'] for s in summaries for c in s['claims'])
  dropped = sum(summary.get('dropped', 0) for summary in summaries)
  published = dropped + sum(
    number for (kind, _), number in total.items() if kind == verdicts.PAPERS
  )
  resolved = sum(
    total[verdicts.PAPERS, w] for w in (verdicts.REPRODUCED, verdicts.OPPOSITE)
  )
  note = (
    f'Verdicts on the papers\' claims: "{verdicts.REPRODUCED}" / '
    f'"{verdicts.OPPOSITE}" / "{verdicts.UNRESOLVED}" / "{verdicts.WITHHELD}"; '
    'on our questions: "shown" / "refuted" / the same two. Of all resolved '
    f'claims {doubtful} have a ‡. Of {published} published claims that could '
    f'have failed, {dropped} that were taken out among them, {resolved} are '
    f'resolved, {resolved / max(published, 1):.0%}.\n'
  )
  parts = [f'# Results\n\n{_ABOUT}', note, markdown_table(rows)]
  return '\n'.join(filter(None, [*parts, pending(summaries)]))


def _counted(counts: Mapping[tuple[str, str], int]) -> dict[str, str]:
  """The numbers of verdicts by kind of claim, as cells of the overview."""
  no_difference = verdicts.UNRESOLVED, verdicts.WITHHELD
  words = {
    verdicts.PAPERS: (verdicts.REPRODUCED, verdicts.OPPOSITE, *no_difference),
    verdicts.OURS: (verdicts.SHOWN, verdicts.REFUTED, *no_difference),
  }
  headings = {verdicts.PAPERS: "paper's claims", verdicts.OURS: 'our questions'}
  return {
    headings[kind]: ' / '.join(str(counts[kind, word]) for word in of_kind)
    for kind, of_kind in words.items()
  }


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Collects the summaries and writes the page."""
  parser = cli.parser('experiments.report', __doc__)
  add = parser.add_argument
  add('--results', default='results', help='folder to which studies wrote')
  add('--output', default=str(HERE), help='folder of the page')
  options = parser.parse_args(argv)
  output, results = pathlib.Path(options.output), pathlib.Path(options.results)
  summaries = read(output / KEPT, results)
  texts = pages(summaries)
  collect(results, output / KEPT)
  redraw(summaries, output / KEPT)
  for name, text in texts.items():
    (output / name).write_text(text, encoding='utf-8')
  print(f'written: {output / PAGE}, {FINDINGS} and the pages of {KEPT}/')


if __name__ == '__main__':
  main()
