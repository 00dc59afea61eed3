"""Parts of a report on choices that changed: between steps, between traces.

Not here: how choices are compared (`route_churn.py`).
"""

from collections.abc import Container, Mapping, Sequence

from moe_jax.analysis import (
  route_churn,
  route_lines,
  route_sections,
  route_tables,
)
from moe_jax.analysis.route_churn import Agreement, Change, Churn
from moe_jax.analysis.route_page import Part
from moe_jax.analysis.route_sections import Section
from moe_jax.analysis.traces import Trace
from moe_jax.errors import InputError

TRAIN = 'train'


def churn_section(kind: str, churn: Churn) -> Section:
  """The section on how choices in an evaluation change over steps."""
  last = churn.from_before[-1]
  name = f'churn_{"".join(c if c.isalnum() else "_" for c in kind)}'
  return Section(
    name,
    f'Churn of {kind} between steps',
    [
      'The same tokens are routed at several steps. If routing settles early, '
      'few tokens change their expert later on.',
      f'From step {last.other} to step {last.step}, {_changed(last.layers)} of '
      f'tokens changed their first choice; since step '
      f'{churn.to_last[0].step}, {_changed(churn.to_last[0].layers)} did.',
    ],
    {name: route_lines.churn_figure(churn)},
    [
      route_tables.churn_table(
        name,
        f'Choices of {kind} that changed since the step before',
        churn.from_before,
      ),
      route_tables.churn_table(
        f'{name}_to_last',
        f'Choices of {kind} that changed until the last step',
        churn.to_last,
      ),
    ],
  )


def _changed(layers: Mapping[int, Agreement]) -> str:
  share = {n: 100 * one.churn for n, one in layers.items()}
  return f'{route_sections.span(share, ".1f")} %'


def churn_sections(
  trace: Trace, steps: Container[int] | None = None
) -> tuple[list[Section], list[str]]:
  """Sections on changes of evaluations, and why there are none of others.

  Args:
    trace: The trace.
    steps: The numbers of steps; None takes all.
  """
  sections, notes = [], []
  for kind in trace.kinds:
    present = [s for s in trace.steps_of(kind) if steps is None or s in steps]
    if kind == TRAIN or len(present) < 2:
      continue
    try:
      churn = route_churn.churn(trace, kind, present)
    except InputError as error:
      notes.append(f'The churn of {kind!r} is not known: {error}.')
    else:
      sections.append(churn_section(kind, churn))
  if not sections and not notes:
    notes.append(
      'Churn is not known: it needs an evaluation of the same tokens at two '
      'steps at least, or a second trace of it.'
    )
  return sections, notes


def compare(
  one: Trace, other: Trace, kind: str, steps: Container[int] | None = None
) -> Change:
  """The changes of choices from one trace to another, for the same tokens.

  Args:
    one: A trace.
    other: A trace with the same batches, at the same steps or at others.
    kind: The kind of records in both.
    steps: The numbers of steps; None takes all.

  Raises:
    ValueError: The traces are not of the same tokens and layers.
  """
  sizes, last_steps = [], []
  for trace in (one, other):
    layers = trace.header.layers
    sizes.append({n: info.num_experts for n, info in layers.items()})
    present = [s for s in trace.steps_of(kind) if steps is None or s in steps]
    last_steps.append(present[-1] if present else 0)
  if sizes[0] != sizes[1]:
    raise InputError(
      f'their experts by layer differ: {sizes[0]} and {sizes[1]}'
    )
  first, second = (trace.records(kind, steps) for trace in (one, other))
  changes = route_churn.agreement(one.header, first, second)
  return Change(last_steps[0], last_steps[1], changes)


def comparison_section(
  number: int, names: tuple[str, str], change: Change
) -> Section:
  """The section on how the choices in two traces differ.

  Args:
    number: The number of the second trace, which names the table's file.
    names: The names of both.
    change: The change that `compare` returned.
  """
  one, other = names
  name = f'comparison_{number}'
  return Section(
    name,
    f'{one} against {other}',
    [
      'Both traces hold the same tokens, so that single choices can be '
      f'compared. {_changed(change.layers)} of tokens have another first '
      'choice. If the two models were trained apart, their experts have '
      'different numbers, and this says nothing.',
    ],
    {},
    [
      route_tables.churn_table(
        name, f'Choices of {one} against {other}', [change]
      )
    ],
  )


def comparison_part(
  traces: Sequence[Trace],
  names: Sequence[str],
  kind: str,
  steps: Container[int] | None = None,
) -> Part:
  """The part that compares each trace with the first one.

  Args:
    traces: The traces.
    names: Their names.
    kind: The kind of records.
    steps: The numbers of steps; None takes all.
  """
  sections, notes = [], []
  for number, trace in enumerate(traces[1:], 2):
    pair = names[0], names[number - 1]
    try:
      change = compare(traces[0], trace, kind, steps)
    except InputError as error:
      notes.append(f'{pair[0]} and {pair[1]} are not compared: {error}.')
    else:
      sections.append(comparison_section(number, pair, change))
  return Part('', f'Traces against {names[0]}, {kind}', notes, sections)
