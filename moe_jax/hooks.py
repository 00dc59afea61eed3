"""Hooks of the training loop: facts, profile, routing report, sample.

`moe_jax.main` and experiments choose which of them a run has.
"""

from typing import NamedTuple

import jax
import numpy as np

from moe_jax import data, generation, models, start_facts
from moe_jax.analysis import routing_report, sharded
from moe_jax.analysis.recording import Traces
from moe_jax.analysis.replay import Replaying
from moe_jax.analysis.run_page import Page
from moe_jax.distributed import is_first
from moe_jax.errors import InputError
from moe_jax.generation import trained_run
from moe_jax.models.recorded import recording
from moe_jax.runs import profile
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.evaluate import Losses
from moe_jax.training.setup import Hook, Run
from moe_jax.training.step import TrainState

_REPORT_BATCHES = 8
_SAMPLE_PAIRS = 3


class Facts(Hook):
  """Prints what a run will take, its data, its model's cost and its devices."""

  def check(self, run: Run) -> None:
    """Prints the first line of a run: what it takes, and where it writes."""
    if is_first():
      cost_line = start_facts.cost_line(run.options, run.model, run.mesh)
      run.message(f'{cost_line}; writes to {run.workdir}')

  def start(self, run: Run) -> None:
    """Prints lines on data, model and devices; warns if it is not causal."""
    for line in start_facts.facts(run):
      run.message(line)


class Compiling(Hook):
  """Says why nothing is printed for a while before the first step."""

  def start(self, run: Run) -> None:
    """Prints a line, unless no step is left."""
    if max(run.checkpoints.steps(), default=0) >= run.options.total_steps:
      return
    run.message(
      'compiling the step; the first line of progress comes after it and '
      'may take half a minute, or minutes for a large model'
    )


class MeshSummary(Hook):
  """Prints what each of several devices holds and what they communicate.

  The step is compiled for this, and the run then uses the compiled step, so
  nothing is compiled twice. This hook has to come before hooks that wrap the
  step.
  """

  def start(self, run: Run) -> None:
    """Prints a few lines; none for a single device."""
    if run.mesh.size == 1:
      return
    state = run.programs.abstract_state
    batch = run.options.batch_shapes(run.model)
    compiled = run.programs.train_step.lower(state, batch).compile()
    if run.train_step is run.programs.train_step:
      run.train_step = compiled
    run.message(sharded.read(compiled, state, run.mesh).describe())


class Profile(Hook):
  """Traces the steps that the section `profile` of the config names."""

  def __init__(self):
    self._profiler: profile.Profiler | None = None

  def start(self, run: Run) -> None:
    """Wraps the step in a profiler, unless no step is to be traced."""
    c = run.options.profile
    if not c.num_steps or (jax.process_index() and not c.all_processes):
      return
    folder = run.workdir / profile.FOLDER
    if c.all_processes:  # processes of one host would overwrite each other's
      folder /= f'process_{jax.process_index()}'
    self._profiler = run.train_step = profile.Profiler(
      run.train_step,
      folder,
      range(c.start_step, c.start_step + c.num_steps),
      run.message,
    )

  def end(self, run: Run, state: TrainState) -> None:
    """Writes the trace, if the run ends before its last traced step."""
    self.close()

  def close(self) -> None:
    """Writes the trace, if a signal or an error ends the run."""
    if self._profiler is not None:
      self._profiler.stop()


class Sample(Hook):
  """Ends a run with a text sample, printed and in `sample.txt`."""

  def end(self, run: Run, state: TrainState) -> None:
    """Continues or answers the prompt of the config's section `sample`.

    An answer to the inputs of a pair stands below them. An encoder-decoder also
    answers the first validation inputs, whose targets are printed beside. Where
    the text is longer than a row of training, attention looks no further back
    than the length of a row; where positions are learned, the sample ends at
    the last of them.
    """
    c = run.options.sample
    if c.num_tokens < 1:
      return
    try:
      models.check_generates(run.model)
    except InputError as error:
      run.message(f'no sample: {error}')
      return
    imported = trained_run.is_imported(run.workdir)
    model, variables = generation.prepare(
      run.model,
      run.programs.variables(state),
      window=trained_run.window(run.options.data, run.model, imported=imported),
    )
    tokenizer = run.dataset.tokenizer
    prompt = trained_run.encode(
      run.options.data.task, tokenizer, c.prompt, imported=imported
    )
    prompt, num_tokens = trained_run.fit(model, prompt, c.num_tokens)
    pairs, tasks = [], run.options.data.tasks
    if model.has_encoder:
      pairs = first_pairs(run.dataset.splits['validation'])
    names = [c.task or tasks[0]] if model.task_sequences else []
    names += [tasks[pair.task] for pair in pairs] if names else []
    generated = generation.generate(
      model,
      variables,
      [prompt, *(pair.inputs for pair in pairs)],
      num_tokens=num_tokens,
      temperature=c.temperature,
      seed=c.seed,
      task_ids=trained_run.task_ids(
        model, run.options.data, names, 'sample.task'
      ),
      **trained_run.special_ids(model, tokenizer),
    )
    answers = [trained_run.decode(tokenizer, row) for row in generated.rows]
    text = c.prompt + answers[0]
    if model.has_encoder or run.options.data.task.reads == 'pairs':
      inputs = [c.prompt, *(tokenizer.decode(pair.inputs) for pair in pairs)]
      targets = ['', *(tokenizer.decode(pair.targets) for pair in pairs)]
      text = '\n\n'.join(map(_answer_text, inputs, answers, targets))
    if forced := run.model.forced_balance:
      text = f'[{forced}]\n{text}'
    if is_first():
      workdir_lib.write_text(run.workdir / 'sample.txt', text + '\n')
    run.message(f'sample, temperature {c.temperature}:\n{text}')


class SamplePair(NamedTuple):
  """An example in token ids, and the number of its task; 0 without tasks."""

  inputs: np.ndarray
  targets: np.ndarray
  task: int


def first_pairs(
  rows: data.Rows, count: int = _SAMPLE_PAIRS
) -> list[SamplePair]:
  """The first example of each of the first `count` rows."""
  batch = rows.take(np.arange(min(count, len(rows))))
  encoder, decoder = (
    batch[f'{side}segment_ids'] == 1 for side in ('encoder_', '')
  )
  tasks = batch.get('task_ids', np.zeros_like(batch['targets']))[:, 0]
  pairs = zip(
    batch['encoder_tokens'], encoder, batch['targets'], decoder, tasks
  )
  return [
    SamplePair(inputs[is_input], targets[is_target], int(task))
    for inputs, is_input, targets, is_target, task in pairs
  ]


def _answer_text(inputs: str, answer: str, target: str) -> str:
  text = f'inputs: {inputs}\noutputs: {answer}'
  return f'{text}\ntargets: {target}' if target else text


class RoutingReport(Hook):
  """Ends a run of a sparse model with a table of its routers' statistics.

  They are of some validation batches, with the capacity of training.
  """

  def end(self, run: Run, state: TrainState) -> None:
    """Prints the tables and writes `routing_report.md`."""
    if not run.model.sparse_layers:
      return
    tables = routing_tables(run, state)
    if not is_first():
      return
    warning = '; '.join(start_facts.warnings(run.model))
    routing_report.write_report(run.workdir, tables, warning)
    console = routing_report.wide_console()
    for table in tables:
      console.print(table.terminal())


def routing_tables(
  run: Run, state: TrainState
) -> list[routing_report.ValueTable]:
  """The tables of the routing report, of some validation batches."""
  counts = routing_report.no_counts(run.model)
  losses = Losses(
    model=run.model,
    num_batches=_REPORT_BATCHES,
    batch_size=run.options.batch_size,
    rows=run.dataset.splits['validation'],
    put=run.programs.put,
  )
  sums = losses.sums(
    run.programs.variables(state),
    recording,
    lambda _, batch, choices: routing_report.count_tokens(
      counts, run.model, batch, choices or {}
    ),
  )
  return routing_report.tables(
    sums, run.model, counts, run.dataset.tokenizer.token_name
  )


def default_hooks() -> list[Hook]:
  """The hooks of `moe_jax.main`."""
  return [
    Facts(),
    Replaying(),
    Compiling(),  # before the summary, which compiles
    MeshSummary(),
    Profile(),
    Traces(),
    RoutingReport(),
    Sample(),
    Page(),
  ]
