"""Says what the routers of a run did, from the traces of their choices.

    python -m moe_jax.analysis.routes runs/tiny/trace --output=runs/tiny/routes
    python -m moe_jax.analysis.routes runs/a/trace runs/b/trace --kind=valid \
      --output=comparison --label=language=wiki_de:German,books_en:English

Tables are printed; the folder gets them as CSV and Markdown, the pictures, and
`routes.html`, one page with everything. Not here: how traces are written
(`traces.py`, `recording.py`).
"""

import argparse
import pathlib
from collections.abc import Sequence

from absl import logging

from moe_jax import command_line
from moe_jax.analysis import (
  route_comparisons,
  route_findings,
  route_page,
  route_sections,
  route_sums,
  route_texts,
  text_tables,
  traces,
)
from moe_jax.analysis.route_comparisons import TRAIN
from moe_jax.analysis.route_labels import read_labels
from moe_jax.analysis.route_page import Part
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError

Labels = dict[str, dict[str, str]]
# Kinds of records in which a choice is dropped where training drops it.
_PREFERRED_KINDS = (TRAIN, 'train_capacity')


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = command_line.Parser(
    prog=command_line.program('moe_jax.analysis.routes'),
    **command_line.about(__doc__),
  )
  add = parser.add_argument
  add('traces', nargs='+', metavar='TRACE', help='folder of a trace')
  add('--output', required=True, help='folder for tables, pictures, the page')
  text = "records of this kind: 'train', 'generate' or an evaluation's name"
  add(
    '--kind',
    default='',
    help=f'{text}; default: {" or ".join(_PREFERRED_KINDS)}, if there are any',
  )
  text = 'steps from FIRST on and before LAST; either may be left out'
  add('--steps', type=_steps, metavar='FIRST:LAST', default=None, help=text)
  text = 'labels of sources by name, such as language; may be given again'
  kinds = {'type': _labels, 'metavar': 'NAME=SOURCE:LABEL,...'}
  add('--label', action='append', default=[], help=text, **kinds)
  text = 'folder of the run, whose tokenizer gives tokens their text; default: '
  add('--workdir', default='', help=f'{text}where the trace is')
  text = 'seed of the shuffles'
  add('--seed', type=command_line.NOT_NEGATIVE, default=0, help=text)
  add('--traceback', action='store_true', help='shows where an error is raised')
  return parser.parse_args(argv)


def part_of(
  trace: traces.Trace,
  title: str,
  *,
  kind: str = '',
  steps: range | None = None,
  labels: Labels | None = None,
  name: str = '',
  seed: int = 0,
  tokenizer: Tokenizer | None = None,
  note: str = '',
) -> Part:
  """The report on one trace.

  Args:
    trace: The trace.
    title: Its name.
    kind: The kind of records; '' takes those of training, of the evaluation at
      its capacity, or the first that there is.
    steps: The numbers of steps; None takes all.
    labels: Labels of sources; see `route_findings.specialisation`.
    name: Beginning of the names of files.
    seed: Seed of the shuffles.
    tokenizer: The tokenizer of the run; None shows ids of tokens.
    note: A sentence on it; may be empty.

  Raises:
    ValueError: The trace has no such records, or labels do not fit its sources.
  """
  if not trace.header.layers:
    raise InputError(f'{title} is of a model without sparse layers')
  kind = kind or _default_kind(trace, title)
  records = trace.records(kind, steps)
  present = [s for s in trace.steps_of(kind) if steps is None or s in steps]
  sums = route_sums.collect(trace.header, records, present, seed)
  findings = route_findings.find(sums, labels, seed)
  facts = _facts(trace, kind, sums, present)
  load, *sections = route_sections.sections(findings)
  text = route_texts.section(trace, kind, present, tokenizer, note)
  churn, notes = route_comparisons.churn_sections(trace, steps)
  return Part(
    name,
    f'{title}, {kind}',
    facts + notes,
    [load, *filter(None, [text]), *sections, *churn],
  )


def _default_kind(trace: traces.Trace, title: str) -> str:
  if not trace.kinds:
    raise InputError(f'{title} has no records')
  preferred = [kind for kind in _PREFERRED_KINDS if kind in trace.kinds]
  return (preferred or trace.kinds)[0]


def _facts(
  trace: traces.Trace,
  kind: str,
  sums: route_sums.RouteSums,
  steps: Sequence[int],
) -> list[str]:
  """Sentences on what is analysed, and what is not."""
  other_kinds = [other for other in trace.kinds if other != kind]
  step_text = f'{len(steps):,} steps from {steps[0]:,} to {steps[-1]:,}'
  if len(steps) == 1:
    step_text = f'step {steps[0]:,}'
  facts = [
    f'{sums.records:,} records of {kind!r} at {step_text} hold {sums.tokens:,} '
    'tokens. Where a token has several choices, transitions, specialisation '
    'and positions are about its first one.'
  ]
  if other_kinds:
    facts.append(
      'The trace has other records, too; --kind takes one of '
      f'{", ".join(other_kinds)}.'
    )
  if trace.incomplete:
    facts.append(
      f'{trace.incomplete:,} records of the trace are left out, because a '
      'process was killed before it wrote its rows.'
    )
  if trace.header.note:
    facts.append(f'Note of the trace: {trace.header.note}')
  if len(trace.header.sources) < 2:
    facts.append(
      'The trace has one source at most, so nothing is said about domains.'
    )
  return facts


def run(options: argparse.Namespace) -> None:
  """Analyses the traces of the command line, prints and writes the report.

  Raises:
    ValueError: A trace is bad, or does not fit the other options.
  """
  labels = dict(options.label)
  open_traces = [traces.read(folder) for folder in options.traces]
  has_several = len(open_traces) > 1
  tokenizers = [
    route_texts.find_tokenizer(folder, trace.header, options.workdir)
    for trace, folder in zip(open_traces, options.traces)
  ]
  parts = [
    part_of(
      trace,
      folder,
      kind=options.kind,
      steps=options.steps,
      labels=labels,
      name=f'{i}_' if has_several else '',
      seed=options.seed,
      tokenizer=tokenizer,
      note=note,
    )
    for i, (trace, folder, (tokenizer, note)) in enumerate(
      zip(open_traces, options.traces, tokenizers, strict=True), 1
    )
  ]
  if has_several:
    kind = options.kind or _default_kind(open_traces[0], options.traces[0])
    parts.append(
      route_comparisons.comparison_part(
        open_traces, options.traces, kind, options.steps
      )
    )
  output = pathlib.Path(options.output).expanduser()
  route_page.write(output, 'What the routers did', parts)
  route_page.show(text_tables.wide_console(), parts)
  print(f'\nThe page is {output / route_page.PAGE}')


def _steps(text: str) -> range:
  first, colon, last = text.partition(':')
  try:
    steps = range(int(first or 0), int(last or 2**62))
  except ValueError:
    steps = range(0)
  if not colon or not steps or steps.start < 0:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not FIRST:LAST with 0 <= FIRST < LAST'
    )
  return steps


def _labels(text: str) -> tuple[str, dict[str, str]]:
  try:
    return read_labels(text)
  except InputError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  options = parse(argv)
  logging.set_verbosity(logging.WARNING)
  with command_line.reported(options.traceback):
    run(options)


if __name__ == '__main__':
  main()
