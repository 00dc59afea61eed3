"""Hooks that describe a run at its start, profile it, and report at its end.

`moe_jax.main` and experiments choose the hooks of a run. The lines on a run's
size, model and devices are also printed by `--dry_run`.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import generation, models
from moe_jax.analysis import cost, roofline, routing_report, sharded
from moe_jax.analysis.recording import Traces
from moe_jax.analysis.replay import Replaying
from moe_jax.analysis.routing_report import ValueTable
from moe_jax.analysis.run_page import Page
from moe_jax.data import Rows
from moe_jax.devices import is_first
from moe_jax.errors import InputError
from moe_jax.generation import trained_run
from moe_jax.layers import experts
from moe_jax.layers.routers import ROUTERS
from moe_jax.models.recorded import recording
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training import trainable
from moe_jax.training.evaluate import Losses
from moe_jax.training.programs import Programs
from moe_jax.training.run_options import RunOptions
from moe_jax.training.setup import Hook, Run
from moe_jax.training.step import TrainState

_REPORT_BATCHES = 8
_SAMPLE_PAIRS = 3


class Facts(Hook):
  """Prints a run's steps, its time at matmul speed, data, model, devices."""

  def check(self, run: Run) -> None:
    if is_first():
      line = cost.run_line(run.options, run.model, run.mesh)
      run.message(f'{line}; writes to {run.workdir}')

  def start(self, run: Run) -> None:
    """Prints lines on data, model and devices; warns of a non-causal model.

    The last line says why nothing is printed for a while before the first step.
    The recorder of metrics gets the time of a step at the devices' peak speed,
    to compute `mfu`, the share of the peak speed that training reaches.
    """
    lines = facts(run.options, run.model, run.programs, run.mesh)
    for line in (run.dataset.describe(), *lines):
      run.message(line)
    if max(run.checkpoints.steps(), default=0) < run.options.total_steps:
      run.message(
        'compiling the step; the first line of progress comes after it and '
        'may take half a minute, or minutes for a large model'
      )
    seconds = cost.least_step_seconds(run.options, run.model, run.mesh)
    run.recorder.least_step_seconds = seconds


class MeshSummary(Hook):
  """Prints what each of several devices holds, and the bytes that it sends.

  The step is compiled to read these numbers, and the run uses this compiled
  step. So this hook has to come before hooks that wrap the step: after them the
  run could not use it, and would compile the step again.
  """

  def start(self, run: Run) -> Run | None:
    if run.mesh.size == 1:
      return None
    state = run.programs.abstract_state
    batch = run.options.batch_shapes(run.model)
    compiled = run.programs.train_step.lower(state, batch).compile()
    run.message(sharded.read(compiled, state).describe())
    if run.train_step is not run.programs.train_step:
      return None  # a hook has wrapped it
    return dataclasses.replace(run, train_step=compiled)


class Profile(Hook):
  """Profiles the training steps that `config.profile` names.

  Each profile is written into a subfolder of `profile`, named by its time.
  """

  _is_tracing = False

  def start(self, run: Run) -> Run | None:
    c = run.options.profile
    if not c.num_steps or (jax.process_index() and not c.all_processes):
      return None
    self._folder = run.workdir / 'profile'
    if c.all_processes:  # else processes of a host would write the same files
      self._folder /= f'process_{jax.process_index()}'
    self._message, self._step = run.message, None
    steps = range(c.start_step, c.start_step + c.num_steps)

    def traced_step(state, batch):
      # Reading `state.step` waits for the device, so it is read only once.
      self._step = (int(state.step) if self._step is None else self._step) + 1
      if self._step not in steps:
        return run.train_step(state, batch)
      if not self._is_tracing:
        options = jax.profiler.ProfileOptions()
        # Python's calls would hide the device's.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._is_tracing = True
      with jax.profiler.StepTraceAnnotation('train', step_num=self._step):
        state, metrics = run.train_step(state, batch)
      if self._step == steps[-1]:
        jax.block_until_ready(metrics)
        self.close()
      return state, metrics

    return dataclasses.replace(run, train_step=traced_step)

  def end(self, run: Run, state: TrainState) -> None:
    self.close()

  def close(self) -> None:
    """Writes the trace, if one has been started."""
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()
      self._message(f'profile: steps up to {self._step} in {self._folder}')


class Sample(Hook):
  """Ends a run with text of its model, printed and written to `sample.txt`."""

  def end(self, run: Run, state: TrainState) -> None:
    """Continues or answers the prompt `config.sample.prompt`.

    A model of (inputs, targets) pairs answers the prompt, and the answer is
    printed below it. An encoder-decoder also answers the first validation
    inputs, and their targets are printed with the answers. Where the text is
    longer than a row of training, attention looks no further back than the
    length of a row; where positions are learned, the sample ends at the last
    learned position.
    """
    c = run.options.sample
    if c.num_tokens < 1:
      return
    try:
      models.check_generates(run.model)
    except InputError as error:
      run.message(f'no sample: {error}')
      return
    data, tokenizer = run.options.data, run.dataset.tokenizer
    imported = trained_run.is_imported(run.workdir)
    window = trained_run.window(data, run.model, imported=imported)
    variables = run.programs.variables(state)
    model, variables = generation.prepare(run.model, variables, window=window)
    prompt = trained_run.encode(
      data.task, tokenizer, c.prompt, imported=imported
    )
    prompt, num_tokens = trained_run.fit(model, prompt, c.num_tokens)
    pairs, names = [], []
    if model.has_encoder:
      pairs = first_pairs(run.dataset.splits['validation'])
    if model.stacks.task_sequences:
      tasks = (data.tasks[task] for *_, task in pairs)
      names = [c.task or data.tasks[0], *tasks]
    generated = generation.generate(
      model,
      variables,
      [prompt, *(inputs for inputs, *_ in pairs)],
      num_tokens=num_tokens,
      temperature=c.temperature,
      seed=c.seed,
      task_ids=trained_run.task_ids(model, data, names, 'sample.task'),
      **trained_run.special_ids(model, tokenizer),
    )
    answers = [trained_run.decode(tokenizer, row) for row in generated.rows]
    text = c.prompt + answers[0]
    if model.has_encoder or data.task.reads == 'pairs':
      inputs = [c.prompt, *(tokenizer.decode(inputs) for inputs, *_ in pairs)]
      targets = ['', *(tokenizer.decode(targets) for _, targets, _ in pairs)]
      text = '\n\n'.join(
        f'inputs: {x}\noutputs: {answer}' + f'\ntargets: {y}' * bool(y)
        for x, answer, y in zip(inputs, answers, targets)
      )
    if forced := run.model.stacks.forced_balance:
      text = f'[{forced}]\n{text}'
    if is_first():
      workdir_lib.write_text(run.workdir / 'sample.txt', text + '\n')
    run.message(f'sample, temperature {c.temperature}:\n{text}')


def first_pairs(rows: Rows) -> list[tuple[np.ndarray, np.ndarray, int]]:
  """The first example of each of the first `_SAMPLE_PAIRS` rows.

  `rows` holds pairs of inputs and targets, several of which may share a row. An
  example is a triple: the token ids of its inputs and of its targets, and the
  index of its task, which is 0 if the data has no tasks.
  """
  batch = rows.take(np.arange(min(_SAMPLE_PAIRS, len(rows))))
  inputs = zip(batch['encoder_tokens'], batch['encoder_segment_ids'] == 1)
  targets = zip(batch['targets'], batch['segment_ids'] == 1)
  tasks = batch.get('task_ids', np.zeros_like(batch['targets']))[:, 0]
  pairs = zip(inputs, targets, tasks)
  return [(x[of_x], y[of_y], int(task)) for (x, of_x), (y, of_y), task in pairs]


class RoutingReport(Hook):
  """Ends a run of a sparse model with a table of its routers' statistics.

  The statistics are of some validation batches, with the capacity of training.
  """

  def end(self, run: Run, state: TrainState) -> None:
    """Prints the tables and writes `routing_report.md`."""
    if not run.model.stacks.sparse_layers:
      return
    tables = routing_tables(run, state)
    if is_first():
      warning = '; '.join(model_warnings(run.model))
      routing_report.write_report(run.workdir, tables, warning)
      for table in tables:
        routing_report.wide_console().print(table.terminal())


def routing_tables(run: Run, state: TrainState) -> list[ValueTable]:
  """Makes the tables of the routing report from some validation batches."""
  counts: routing_report.Counts = {}
  rows, put = run.dataset.splits['validation'], run.programs.put
  losses = Losses(run.model, _REPORT_BATCHES, rows, put)
  sums = losses.sums(
    run.programs.variables(state),
    recording,
    lambda _, *made: routing_report.count_tokens(counts, run.model, *made),
  )
  token_name = run.dataset.tokenizer.token_name
  return routing_report.tables(sums, run.model, counts, token_name)


def default_hooks() -> list[Hook]:
  """Returns the hooks of every run of `moe_jax.main`, in their order."""
  # Facts are printed before the summary, which compiles.
  hooks = Replaying(), Facts(), MeshSummary(), Profile(), Traces()
  return [*hooks, RoutingReport(), Sample(), Page()]


LEAK = (
  'moe.allow_future_leak=True: later tokens can change earlier outputs; losses '
  'are not those of a causal model'
)


def model_warnings(model: models.Model) -> list[str]:
  """Warnings on a model that every report of its results has to repeat."""
  texts = [LEAK] if model.stacks.leaks_future else []
  forced = model.stacks.forced_balance
  return texts + [forced] * bool(forced)


def facts(
  options: RunOptions, model: models.Model, programs: Programs, mesh: Mesh
) -> Iterator[str]:
  """Lines on a run's model and devices, for its start and for `--dry_run`."""
  lengths = options.data.seq_len, options.data.target_len
  yield cost.count(model, *lengths).describe()
  stacks, platform = model.stacks, mesh.devices.flat[0].platform
  if (moe := stacks.moe) is not None:
    counts = [stacks.moe_of(i).num_retained for i in stacks.sparse_layers]
    axes = dict(options.sharding.rules)['expert']
    dispatch = experts.describe(
      moe.dispatch,
      'cuda' if platform == 'gpu' else platform,
      {axis: mesh.shape[axis] for axis in axes if mesh.shape[axis] > 1},
    )
    yield (
      f'sparse layers {list(stacks.sparse_layers)}: '
      f'{counts[0] if len(set(counts)) == 1 else counts} experts, '
      f'{moe.num_selected} selected, router {ROUTERS.name_of(moe.router)!r}, '
      f'dispatch {dispatch}'
    )
  for text in model_warnings(model):
    yield f'WARNING: {text}'
  yield from _trained_lines(options, programs)
  yield f'devices: {roofline.describe_mesh(mesh)}'


def _trained_lines(options: RunOptions, programs: Programs) -> Iterator[str]:
  """A line on the parameters that are trained, unless all parameters are."""
  params, trained = programs.abstract_state.params, programs.trained
  if trained.expression == 'all' and not trained.masks:
    return
  count = trained.count(trained.part(params))
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  subset = f'trainable={options.trainable!r}'
  if (lora := options.lora).rank:
    subset = f'adapters of rank {lora.rank} on {lora.parts!r}'
  if file := options.trained_experts:
    subset += f', {trainable.read_chosen(file).describe()}'
  yield (
    f'{subset}: {count:,} of {total:,} parameters train ({count / total:.1%}); '
    'the others keep their values'
  )
