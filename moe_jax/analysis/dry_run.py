"""The cost, needs and actions of a run, without training or writing anything.

    python -m moe_jax.main --config=configs/tiny_switch.py \
      --workdir=runs/tiny --dry_run

Data that is not in the cache is not prepared for this, and no parameters are
read: if the run begins with another run, that run's folder, tokens and model
are checked, and not its checkpoint.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from moe_jax import data, partitioning
from moe_jax.analysis import cost, hooks
from moe_jax.config import section_of
from moe_jax.data.cache_folders import NotPreparedError, reading_only
from moe_jax.devices import in_bytes, memory_of
from moe_jax.errors import InputError
from moe_jax.evaluation import EVALUATIONS, LossEvaluation
from moe_jax.run_config import RunConfig
from moe_jax.runs import ownership
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.storage_errors import storage_path
from moe_jax.training import setup, trained
from moe_jax.training.programs import make_programs
from moe_jax.training.setup import Hook, Run

# Stands for the folder of a run that names none; this folder is never made.
_NOWHERE = 'a-folder-that-is-not-there'


@dataclasses.dataclass
class DryRun:
  """Describes a run without beginning it, and says why it would be refused.

  Attributes:
    options: The options of the run.
    workdir: The folder of the run, which need not exist; '' for none.
    resume: Whether the config in the folder may differ from the options.
    hooks: The hooks of the run, whose checks are made as at its start.
    problems: Reasons for which the run would be refused; `lines` appends the
      reasons that it finds.
  """

  options: RunConfig
  workdir: str
  _: dataclasses.KW_ONLY
  resume: bool = False
  hooks: Sequence[Hook] = ()
  problems: list[str] = dataclasses.field(default_factory=list)

  def lines(self) -> Iterator[str]:
    """Yields the lines that describe the run, in the order of printing."""
    yield 'dry run: nothing is trained, and nothing is written'
    run, mesh = self._set_up(), self._mesh()
    options, notes, dataset = (
      (run.options, run.notes, run.dataset) if run else self._filled()
    )
    data_line = (
      dataset.describe()
      if dataset
      else 'data: not prepared yet; a run first reads all texts once and keeps '
      f'their tokens in {self.options.data.selection.cache}'
    )
    if options is None:
      yield data_line
      yield (
        'model: its size depends on the vocabulary, which is known once the '
        'data is prepared; --config.model.vocab_size=... gives it'
      )
    else:
      model = options.build()
      programs = run.programs if run else make_programs(options, model, mesh)
      yield from notes
      yield cost.run_line(options, model, mesh)
      yield data_line
      yield from hooks.facts(options, model, programs, mesh)
      if dataset:
        rows = options.total_steps * options.batch_size
        stored = len(dataset.splits['train'])
        yield (
          f'passes: {rows:,} rows are learned from, and the data has '
          f'{stored:,}: {rows / stored:.3g} passes over it'
        )
      needs = cost.run_bytes(options, model, programs, mesh)
      yield from self._memory_lines(needs, mesh)
    yield from self._evaluation_lines()
    yield from self._workdir_lines(run)

  @contextlib.contextmanager
  def _noting_problems(self) -> Iterator[None]:
    """A context that notes a refusal or an OSError of its body in `problems`.

    Data is not prepared in the body: what needs it ends the body silently.
    """
    try:
      with reading_only():
        yield
    except NotPreparedError:
      pass
    except (InputError, OSError) as error:
      self._refuse(str(error))

  def _refuse(self, problem: str) -> None:
    if problem not in self.problems:
      self.problems.append(problem)

  def _set_up(self) -> Run | None:
    """The run; None if it cannot be set up or its data is not prepared.

    The hooks check the run and print nothing; their errors become problems.
    """
    with self._noting_problems():
      folder = self.workdir or _NOWHERE
      run = setup.set_up(self.options, folder, resume=self.resume)
      silent_run = dataclasses.replace(run, message=lambda text: None)
      for hook in self.hooks:
        with self._noting_problems():
          hook.check(silent_run)
      run.checkpoints.close()
      return run
    return None

  def _filled(
    self,
  ) -> tuple[RunConfig | None, Sequence[str], data.Dataset | None]:
    """The options, the notes and the data of a run that could not be set up.

    The notes are the lines that the run would print when it is set up. The
    options get the vocabulary's size from the data, or from a tokenizer whose
    size is known; they are None if neither tells the size. The data is None
    unless it is prepared.
    """
    options, notes, dataset, filled = self.options, [], None, None
    folder = workdir_lib.folder_of(self.workdir or _NOWHERE)
    with self._noting_problems():
      config = section_of(options)
      options, notes = setup.with_tokenizer(options, config, folder)
    with self._noting_problems():
      dataset = data.load(options.data)
    with self._noting_problems():
      tokenizer = options.data.tokenizer
      size = dataset.vocab_size if dataset else tokenizer.known_vocab_size()
      if size := options.model.vocab_size or size:
        filled = options.filled(size)
        notes = [*notes, *setup.schedule_notes(filled, folder)]
    return filled, notes, dataset

  def _mesh(self) -> Mesh:
    """The run's mesh; one device if this machine's devices do not fit it."""
    with self._noting_problems():
      return self.options.mesh.make()
    return partitioning.make_mesh(dict(data=1), jax.local_devices()[:1])

  def _memory_lines(self, needs: cost.RunBytes, mesh: Mesh) -> Iterator[str]:
    """Lines on the memory and disk that the run needs, `needs` in bytes."""
    room = memory_of(list(mesh.devices.flat))
    line = f'memory: {needs.describe()}'
    if room:
      who = f'{mesh.size} devices have' if mesh.size > 1 else 'it has'
      line += f', and {who} {in_bytes(room)}'
    yield line
    if room and needs.total * mesh.size > room:
      keeps_more = getattr(self.options.model, 'remat', 'full') != 'full'
      remat = "model.remat='full', " if keeps_more else ''
      yield (
        'WARNING: that does not fit; a smaller batch_size / microbatches, '
        f'{remat}or more devices (mesh.fsdp) need less on each'
      )
    c, size = self.options.checkpoint, needs.checkpoint
    last = self.options.total_steps - 1
    num_written = 1 + last // c.every_steps if c.every_steps else 1
    # One more is being written while the older checkpoints are still there.
    num_kept = min(num_written, c.keep_newest + c.keep_best) + 1
    folder = storage_path(c.directory or self.workdir or _NOWHERE)
    line = (
      f'checkpoints: {num_written} of {in_bytes(size)} each; they need room '
      f'for {num_kept}, as one is written while {num_kept - 1} '
      f'{"is" if num_kept == 2 else "are"} there: {in_bytes(num_kept * size)}'
    )
    if '://' in os.fspath(folder):
      yield line
      return
    free = shutil.disk_usage(_existing(pathlib.Path(folder))).free
    yield f'{line}; {in_bytes(free)} are free'
    if num_kept * size > free:
      yield (
        'WARNING: the disk is too small for the checkpoints; give another '
        'folder or bucket as checkpoint.directory, or keep fewer '
        '(checkpoint.keep_newest)'
      )

  def _evaluation_lines(self) -> Iterator[str]:
    for name, entry in self.options.evals.items():
      last = self.options.total_steps - 1
      times = 1 + last // entry.every_steps if entry.every_steps else 1
      line = f'evaluation {name}: {EVALUATIONS.name_of(entry)!r}'
      if entry.every_steps:
        line += f' every {entry.every_steps:,} steps and'
      line += f' at the end, {times} in all'
      if isinstance(entry, LossEvaluation):
        line += f', of {entry.num_batches or "all"} batches of the split'
      yield line

  def _workdir_lines(self, run: Run | None) -> Iterator[str]:
    """Lines on what the run's folder already holds; notes its problems.

    `run` is None if it cannot be set up.
    """
    if not self.workdir:
      yield from self._start_lines()
      yield 'workdir: none is given; a run needs --workdir'
      return
    folder = workdir_lib.folder_of(self.workdir)
    if not _writable(folder):
      self._refuse(f'{folder} cannot be made or written; choose another folder')
    if holder := ownership.holder(storage_path(folder)):
      self._refuse(f'{folder} is in use by {holder}; wait for its end')
    steps = run.checkpoints.steps() if run else []
    if not steps:
      yield from self._start_lines()
    if run is None or not (folder / workdir_lib.CONFIG).exists():
      yield f'workdir: {folder} {"exists" if folder.exists() else "is new"}'
    elif not steps:
      yield f'workdir: {folder} has a run without checkpoints: it begins anew'
    elif problem := setup.end_problem(run, steps[-1]):
      self._refuse(problem)
    elif steps[-1] == run.options.total_steps:
      yield f'workdir: {folder} has a run that is at its end, step {steps[-1]}'
    else:
      yield f'workdir: {folder} has a run, which goes on from step {steps[-1]}'

  def _start_lines(self) -> Iterator[str]:
    """A line on the checkpoint of another run that this run begins with.

    There is none if no run is named; one without checkpoints is a problem.
    """
    init_from = self.options.init_from
    if not init_from.workdir:
      return
    folder = workdir_lib.folder_of(init_from.workdir)
    step = None
    with self._noting_problems():
      step = trained.best_step(folder) if init_from.best else init_from.step
      if step < 0:
        with Checkpointer(workdir_lib.checkpoints_of(folder)) as checkpoints:
          step = max(checkpoints.steps(), default=None)
    if step is not None:
      yield f'begins with: the parameters of step {step} of {folder}'
    elif not self.problems:  # else the problems say that there is no run
      self._refuse(f'init_from.workdir={folder} has no finished checkpoint')


def _writable(folder: pathlib.Path) -> bool:
  """Whether a folder can be made and written, judged without writing."""
  parent = _existing(folder)
  allowed = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
  # The kernel's own file systems let root write, and have no room for files.
  return allowed and shutil.disk_usage(parent).total > 0


def _existing(path: pathlib.Path) -> pathlib.Path:
  """The path, or the nearest folder above it that exists."""
  while not path.exists():
    path = path.parent
  return path
