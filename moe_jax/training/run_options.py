"""The options of a run, and the rules between sections of its config."""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Self

import jax
import jax.numpy as jnp

from moe_jax.config import (
  SEEDS,
  OptionError,
  Options,
  choice,
  no_effect,
  option,
  unknown_text,
)
from moe_jax.data import DataOptions
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.devices import Timeouts
from moe_jax.errors import InputError
from moe_jax.models import MODELS, Model, ModelOptions
from moe_jax.models.base import RunShape
from moe_jax.models.lora import LoraOptions
from moe_jax.models.recorded import Apply, recording
from moe_jax.models.selection import expression_problems
from moe_jax.partitioning import MeshOptions, ShardingOptions
from moe_jax.runs.retention import CheckpointOptions
from moe_jax.runs.trackers import TRACKERS
from moe_jax.training.early_stopping import EarlyStoppingOptions
from moe_jax.training.evaluate import (
  DEFAULT_EVALS,
  EvaluationOptions,
  LossEvaluation,
)
from moe_jax.training.losses import AUX_SCHEDULES, AuxSchedule
from moe_jax.training.optimizer import OPTIMIZERS, Optimizer

# The name of the option `MoeOptions.replay` in a config.
REPLAY = 'model.moe.replay'
_ITEM_BYTES = 4  # bytes of each number in a batch, a loss or logits


@dataclasses.dataclass(frozen=True)
class ProfileOptions(Options):
  """Options of the profiler's trace: the section 'profile' of a config."""

  start_step: int = option(
    10, 'First optimizer step that is traced, counted from 1.', minimum=1
  )
  num_steps: int = option(
    0,
    'Number of optimizer steps that are traced for TensorBoard or Perfetto, '
    'into the folder `profile` of the workdir; 0 traces none.',
    minimum=0,
  )
  all_processes: bool = option(
    False,
    'Whether every process writes a trace of its steps, or only process 0.',
  )

  def problems(self) -> Iterator[str]:
    if not self.num_steps:
      yield from self.in_vain('unless num_steps is at least 1')


@dataclasses.dataclass(frozen=True)
class SampleOptions(Options):
  """Options of the text sample at the end of a run: the section `sample`."""

  prompt: str = option(
    '\n',
    'Text that the sample at the end of the run continues or answers.',
    required=True,
  )
  num_tokens: int = option(
    300,
    'Number of tokens of the text sample at the end of the run; 0 draws no '
    'sample.',
    minimum=0,
  )
  temperature: float = option(
    0.8,
    'Temperature by which logits are divided before a token of the sample is '
    'drawn; 0 takes the likeliest token.',
    minimum=0,
  )
  task: str = option(
    '',
    'Name of the task of the prompt, a source of data.mixture, for a model '
    'that routes by task; an empty string is the first task.',
  )
  seed: int = option(
    0, 'Seed for drawing the tokens of the sample.', minimum=0, below=SEEDS
  )

  def check_prompt(self, tokenizer: Tokenizer) -> None:
    """Raises ValueError if a sample is wanted and the prompt has no tokens."""
    if self.num_tokens and not len(tokenizer.encode(self.prompt)):
      raise InputError(
        f'sample.prompt={self.prompt!r} has no tokens; give it some text, or '
        'set sample.num_tokens=0'
      )

  def shrunk(self) -> Self:
    return dataclasses.replace(self, num_tokens=min(self.num_tokens, 16))


@dataclasses.dataclass(frozen=True)
class InitFromOptions(Options):
  """Options of another run, whose parameters this run begins with."""

  workdir: str = option(
    '',
    'Folder of another run whose parameters this run begins with; an empty '
    'string draws parameters from the seed.',
  )
  step: int = option(
    -1,
    'Optimizer step of the checkpoint in init_from.workdir that is read; -1 is '
    'the newest good one, 0 that of an imported model.',
    minimum=-1,
  )
  best: bool = option(
    False,
    'Whether the best checkpoint in init_from.workdir is read, by the '
    "evaluation of that run's checkpoint.best_eval, not the newest.",
  )

  keep_tokenizer: bool = option(
    True,
    'Whether the tokenizer of the run in init_from.workdir is taken in place '
    'of data.tokenizer, so that other text can be learned from; with False '
    'data.tokenizer has to give the same ids.',
  )

  def with_tokenizer(
    self, data: DataOptions, *run_folder: pathlib.Path
  ) -> DataOptions:
    """The options of the data, with the tokenizer of the run in `workdir`.

    They are returned unchanged without a `workdir` or `keep_tokenizer`. A run
    that has begun has the tokenizer in its own folder, from which it is then
    read, so that the run in `workdir` is not needed any more.

    Args:
      data: The options of the data.
      *run_folder: Folder of the run that begins with the parameters of the run
        in `workdir`, if it is known; it need not exist.

    Raises:
      ValueError: The tokenizer cannot be read.
    """
    if not (self.workdir and self.keep_tokenizer):
      return data
    # A run without a tokenizer is refused when it is read.
    return data.with_tokenizer_of(*run_folder, self.workdir)

  def problems(self) -> Iterator[str]:
    if not self.workdir:
      yield from self.in_vain('unless workdir is given')
    if self.best and self.step >= 0:
      yield f'best=True with step={self.step}: give one of them'


# Names of the records of experts' choices that no evaluation makes.
_OTHER_RECORDS = ('train', 'generate')


@dataclasses.dataclass(frozen=True)
class TraceOptions(Options):
  """Options of the record of experts' choices: a config's section `trace`."""

  every_steps: int = option(
    0,
    'Number of optimizer steps between two whose choices of experts are '
    'recorded into the folder `trace` of the workdir; 0 records no step.',
    minimum=0,
  )
  evaluations: str = option(
    '',
    "Evaluations of the kind 'loss' whose choices are recorded, too: 'all', or "
    'names of entries of `evals` with commas between them; an empty string '
    'records none.',
  )
  logits: bool = option(
    False,
    "Whether the routers' logits are recorded, too, which take most of the "
    'bytes.',
  )
  dtype: str = option(
    'float16',
    'Type in which gates and logits are recorded; float32 loses nothing.',
    choices=('float16', 'float32'),
  )

  @property
  def is_on(self) -> bool:
    """Whether the choices of any steps or evaluations are recorded."""
    return bool(self.every_steps or self.evaluations)

  @property
  def recording(self) -> Apply:
    """The function (model, variables, **inputs) -> (outputs, choices).

    It returns what `model.apply` returns, and the choices of experts.
    """
    return functools.partial(recording, logits=self.logits, dtype=self.dtype)

  def has_step(self, step: int) -> bool:
    """Whether the choices of a step, counted from 1, are recorded."""
    return self.every_steps > 0 and (step - 1) % self.every_steps == 0

  def names(self, evals: Collection[str]) -> tuple[str, ...]:
    """The names of the evaluations whose choices of experts are recorded.

    Args:
      evals: The names of all evaluations that can be recorded.
    """
    if self.evaluations == 'all':
      return tuple(evals)
    return tuple(filter(None, map(str.strip, self.evaluations.split(','))))

  def problems(self) -> Iterator[str]:
    if not self.is_on:
      yield from self.in_vain('where nothing is recorded', 'logits', 'dtype')

  def problems_in(self, evals: Collection[str]) -> Iterator[str]:
    """The problems of the names in the option `evaluations`, a text for each.

    Args:
      evals: The names of all evaluations that can be recorded.
    """
    for name in self.names(evals):
      if name not in evals:
        yield unknown_text('evaluation trace.evaluations', name, evals)
      elif name in _OTHER_RECORDS:
        yield (
          f'trace.evaluations={self.evaluations!r}: evaluation {name!r} has a '
          f'name that other records have; {list(_OTHER_RECORDS)} are taken'
        )


@dataclasses.dataclass(frozen=True)
class RunOptions(Options):
  """All options of a run, as far as training knows them.

  The options of a config are those of the subclass `run_config.RunConfig`.
  """

  seed: int = option(
    0,
    'Seed of the initial parameters, the order of the data and all noise in '
    'training.',
    minimum=0,
    below=SEEDS,
  )
  total_steps: int = option(
    1000, 'Number of optimizer steps of the whole run.', minimum=1
  )
  batch_size: int = option(
    32,
    'Number of rows in the batch of an optimizer step, on all devices '
    'together.',
    minimum=1,
  )
  microbatches: int = option(
    1,
    'Number of equal parts of a batch that are computed one after another and '
    'whose gradients are added; it must divide batch_size.',
    minimum=1,
  )
  exchange_once: bool = option(
    False,
    'Whether each device adds the gradients of its rows of all microbatches '
    'before they are exchanged over the mesh axes data and fsdp, once a step '
    'instead of once a microbatch. It then holds the parameters and gradients '
    'that fsdp would split, and draws noise and dropout of its own.',
  )
  log_every_steps: int = option(
    20,
    'Number of optimizer steps that each row of metrics averages.',
    minimum=1,
  )
  trackers: str = option(
    '',
    'Services that get the numbers of each row of metrics, too: wandb (Weights '
    '& Biases), mlflow, or both with a comma between them. Their environment '
    'variables, such as WANDB_PROJECT and MLFLOW_TRACKING_URI, say where; an '
    'empty string names none.',
  )
  logits_z_weight: float = option(
    0.0,
    'Weight in the loss of the mean squared logsumexp of the output logits; T5 '
    'has 1e-4, 0 leaves it out.',
    minimum=0,
  )
  aux_losses: AuxSchedule = choice(
    AUX_SCHEDULES,
    'constant',
    'Schedule of the factor by which the weights of auxiliary losses are '
    'multiplied.',
    same_function=True,
  )
  max_nonfinite_steps: int = option(
    0,
    'Number of steps that may be skipped because their loss or gradient is not '
    'finite, with their batches kept in the workdir; one more stops the run, '
    'and with 0 the first does.',
    minimum=0,
  )
  trainable: str = option(
    'all',
    'Parameters that train, by the parts of the model that they belong to: '
    "'all', 'experts', 'non_experts', 'router', 'attention', 'ffn', "
    "'embeddings', 'norms' and others, sums of them such as 'experts + router' "
    "or 'all - embeddings', or 're:' and a regular expression of names. All "
    'other parameters keep their values and take no memory in the optimizer.',
    same_function=True,
  )
  trained_experts: str = option(
    '',
    'File of chosen experts that alone train among the experts, as `python -m '
    'moe_jax.finetuning choose` writes it (expert-specialised fine-tuning); an '
    'empty string trains all experts that `trainable` selects.',
    same_function=True,
  )
  lora: LoraOptions = option(
    LoraOptions(), 'Low-rank adapters, which then train alone.'
  )
  data: DataOptions = option(DataOptions(), 'Data that the model learns from.')
  model: ModelOptions = choice(MODELS, 'decoder', 'Model that is trained.')
  optimizer: Optimizer = choice(
    OPTIMIZERS, 'adamw', "Optimizer of the model's parameters."
  )
  checkpoint: CheckpointOptions = option(
    CheckpointOptions(), 'Folder, period and number of checkpoints.'
  )
  early_stopping: EarlyStoppingOptions = option(
    EarlyStoppingOptions(), 'Early end of the run by checkpoint.best_eval.'
  )
  # The subclass `RunConfig` replaces the next two fields by options with all
  # kinds of initialisation and evaluation, which training may not import.
  init_from: InitFromOptions = InitFromOptions()
  evals: Mapping[str, EvaluationOptions] = dataclasses.field(
    default_factory=lambda: dict(DEFAULT_EVALS)
  )
  mesh: MeshOptions = option(
    MeshOptions(), 'Sizes of the axes of the mesh of devices.'
  )
  sharding: ShardingOptions = option(
    ShardingOptions(), 'Mesh axes over which dimensions of arrays are split.'
  )
  distributed: Timeouts = option(
    Timeouts(), 'Timeouts of a run of several processes.'
  )
  profile: ProfileOptions = option(
    ProfileOptions(), 'Optimizer steps that are traced.'
  )
  trace: TraceOptions = option(
    TraceOptions(), 'Choices of experts that the run records.'
  )
  sample: SampleOptions = option(SampleOptions(), 'Text at the end of the run.')

  @property
  def tracker_names(self) -> tuple[str, ...]:
    """The names of the services in the option `trackers`."""
    return tuple(filter(None, map(str.strip, self.trackers.split(','))))

  @property
  def local_axes(self) -> tuple[str, ...]:
    """The mesh axes, if any, over which gradients are exchanged once a step."""
    if not self.exchange_once:
      return ()
    axes = dict(self.sharding.rules)['batch']
    return tuple(axis for axis in axes if axis in ('data', 'fsdp'))

  @property
  def for_hooks(self) -> tuple[str, ...]:
    """Names of the config's sections in use that need a hook to serve them."""
    switches = {'trace': self.trace.is_on, REPLAY: bool(self.model.moe.replay)}
    return tuple(name for name, is_on in switches.items() if is_on)

  def problems(self) -> Iterator[str]:
    """The contradictions between sections of the config, a text for each."""
    if self.batch_size % self.microbatches:
      yield (
        f'batch_size={self.batch_size} does not divide by microbatches='
        f'{self.microbatches}'
      )
    else:
      yield from self.model.problems_in(self.shape())
    if self.lora.rank and self.trainable != 'all':
      yield (
        f'trainable={self.trainable!r} has no effect with lora.rank='
        f'{self.lora.rank}: adapters train alone, and lora.parts says where; '
        "set trainable='all'"
      )
    yield from expression_problems('trainable', self.trainable)
    start = self.profile.start_step
    if self.profile.num_steps and start > self.total_steps:
      yield (
        f'profile.start_step={start} is beyond the last step, total_steps='
        f'{self.total_steps}'
      )
    for name in self.tracker_names:
      if name not in TRACKERS:
        yield f'trackers={self.trackers!r}: ' + unknown_text(
          'tracker', name, TRACKERS
        )
    yield from self._task_problems()
    yield from self._best_problems()
    for name, entry in self.evals.items():
      try:
        entry.overridden(self.model)
      except OptionError as error:
        for text in error.problems:
          yield f'evals.{name}.model_overrides: {text}'
    yield from self.trace.problems_in(self.loss_evals)

  def _task_problems(self) -> Iterator[str]:
    """The contradictions between model, data and `sample.task` about tasks."""
    model, data = self.model, self.data
    tasks, by_task = data.tasks, model.routes_by_task
    if model.has_encoder != data.shape.encoder_decoder:
      needs = 'data.target_len=0'
      if model.has_encoder:
        needs = 'a task with inputs and targets, and data.target_len above 0'
      yield (
        f'model.kind={MODELS.name_of(model)!r} needs {needs}; data.task is '
        f'{type(data.task).__name__} with data.target_len={data.target_len}'
      )
    if by_task and not tasks:
      yield (
        'model.moe.router goes by task, and the data has no tasks: give it '
        'sources in data.mixture'
      )
    task = self.sample.task
    if task and not by_task:
      yield no_effect('sample.task', task, 'without a router by task')
    elif task and task not in tasks:
      yield unknown_text('task sample.task', task, tasks)

  @property
  def loss_evals(self) -> list[str]:
    """The names of the evaluations of the kind 'loss'."""
    return [n for n, e in self.evals.items() if type(e) is LossEvaluation]

  def _best_problems(self) -> Iterator[str]:
    """The problems of the options on best checkpoints and early stopping."""
    checkpoint, patience = self.checkpoint, self.early_stopping.patience
    best = checkpoint.best_eval
    if checkpoint.keep_best and best not in self.evals:
      text = unknown_text('evaluation checkpoint.best_eval', best, self.evals)
      yield f'{text}; or set checkpoint.keep_best=False'
    if patience and not checkpoint.keep_best:
      yield (
        f'early_stopping.patience={patience} needs checkpoint.keep_best=True, '
        'whose best_eval decides'
      )
    elif patience and best in self.evals and not self.evals[best].every_steps:
      yield (
        f'early_stopping.patience={patience} with evals.{best}.every_steps=0: '
        'the evaluation runs only at the end'
      )

  def shape(self, row_parts: int = 1) -> RunShape:
    """The sizes of the run that a model has to fit.

    Args:
      row_parts: Number of devices that a microbatch's sequences are split over.
    """
    return RunShape(
      total_steps=self.total_steps,
      rows=self.batch_size // self.microbatches,
      microbatches=self.microbatches,
      seq_len=self.data.seq_len,
      target_len=self.data.target_len,
      parts=row_parts,
      packed=self.data.pack,
    )

  def check_rows(self, row_parts: int) -> None:
    """Checks that the run's sizes divide by the devices.

    Args:
      row_parts: Number of devices that the rows of a microbatch are split over.

    Raises:
      ValueError: The rows (sequences) of a microbatch, or the groups of tokens
        that are routed, do not divide by the devices.
    """
    rows = self.shape().rows
    if rows % row_parts:
      raise InputError(
        f'batch_size={self.batch_size} in microbatches={self.microbatches} '
        f'leaves {rows} sequences, which do not divide by {row_parts} '
        f'devices of mesh axes {dict(self.sharding.rules)["batch"]}'
      )
    if problems := list(self.model.problems_in(self.shape(row_parts))):
      raise OptionError(problems)

  def filled(self, vocab_size: int) -> Self:
    """The options, completed by the sizes of the model that the data decides.

    Args:
      vocab_size: The size V of the tokenizer's vocabulary.

    Raises:
      ValueError: The model's own vocabulary is smaller.
    """
    data = self.data
    model = self.model.filled(vocab_size, data.seq_len, len(data.tasks))
    return dataclasses.replace(self, model=model)

  def least_bytes(self) -> Iterator[tuple[str, int]]:
    """Yields the name of each array that may be large, with its least bytes.

    The set-up refuses a run whose devices have less memory. It does so before
    a model is built, since to build one with ten million layers takes minutes.
    The options have to be those that `filled` returns.
    """
    model, data, rows = self.model, self.data, self.batch_size
    count, V = model.least_parameters(), model.vocab_size
    name = f'the parameters of {type(model).__name__}, {count:,}'
    yield name, jnp.dtype(model.numerics.param_dtype).itemsize * count
    # Each token has an id, a segment and a position. Targets and loss weights
    # are not counted, since an encoder's tokens have none.
    name = f'batch_size={rows} of {data.row_tokens} tokens'
    yield name, 3 * _ITEM_BYTES * rows * data.row_tokens
    tokens = self.shape().rows * (data.target_len or data.seq_len)
    name = f'the logits of {tokens} tokens of a microbatch, with vocab_size={V}'
    yield name, _ITEM_BYTES * tokens * V

  def build(self) -> Model:
    """The model; the options have to be those that `filled` returns."""
    return self.model.build(self.sharding.rules)

  def batch_shapes(self, model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of a training batch, by name."""
    shapes = model.batch_shapes(
      self.batch_size, self.data.seq_len, self.data.target_len
    )
    if self.data.tasks:
      for prefix in model.stacks.sequences:
        shapes[f'{prefix}task_ids'] = shapes[f'{prefix}segment_ids']
    return shapes

  def shrunk(self) -> Self:
    return super().shrunk(
      total_steps=2,
      batch_size=4,
      microbatches=min(self.microbatches, 2),
      log_every_steps=1,
    )
