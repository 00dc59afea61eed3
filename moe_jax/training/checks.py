"""What is wrong with a config, found before anything compiles or is written.

Not here: what a model refuses (`moe_jax.models.build`), or bad data
(`moe_jax.data`).
"""

import ml_collections
import numpy as np
from jax.sharding import Mesh

from moe_jax import partitioning
from moe_jax.config import to_dataclass
from moe_jax.data import DataConfig
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.distributed import Timeouts
from moe_jax.models import OF_FEATURES
from moe_jax.training.optimizer import by_name


def check_numbers(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Sizes and periods, and whether the batch splits as the config asks.

  Raises:
    ValueError: A number is out of range, or one does not divide another.
  """
  B, n, T = config.batch_size, config.microbatches, config.data.seq_len
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'seed={config.seed} not in [0, 2**32)')
  for name in ('total_steps', 'batch_size', 'microbatches', 'log_every_steps'):
    if config[name] < 1:
      raise ValueError(f'{name}={config[name]} must be at least 1')
  if config.profile.start_step < 1 or config.profile.num_steps < 0:
    raise ValueError(
      f'profile.start_step={config.profile.start_step} must be at least 1, '
      f'profile.num_steps={config.profile.num_steps} at least 0'
    )
  if T < 1:
    raise ValueError(f'data.seq_len={T} must be at least 1')
  _check_faults(config)
  check_best(config)
  to_dataclass(Timeouts, config.distributed)
  rules = partitioning.make_rules(config.sharding.to_dict())
  parts = int(np.prod([mesh.shape[axis] for axis in rules['batch']]))
  if B % n:
    raise ValueError(f'batch_size={B} does not divide by microbatches={n}')
  if B // n % parts:
    raise ValueError(
      f'batch_size={B} in microbatches={n} leaves {B // n} sequences, which do '
      f'not divide by {parts} devices of mesh axes {rules["batch"]}'
    )
  early, steps = config.model.deep_moe.balance_steps, config.total_steps
  if config.model.kind == 'deep_moe' and early > steps:
    raise ValueError(
      f'deep_moe.balance_steps={early} > total_steps={steps}: the constraint '
      'would never be lifted; lower it, or say so with -1'
    )
  if config.model.moe.num_experts:
    for name in _lengths(config):
      _check_groups(config, name, B // n, parts, rules['batch'])


def _check_faults(config: ml_collections.ConfigDict) -> None:
  """How often what fails is left out or tried again."""
  for name, least in (('tries', 1), ('retry_seconds', 0)):
    if config.checkpoint[name] < least:
      value = config.checkpoint[name]
      raise ValueError(f'checkpoint.{name}={value} must be at least {least}')
  most = config.max_nonfinite_steps
  if most < 0:
    raise ValueError(f'max_nonfinite_steps={most} is negative')


def _lengths(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The keys of `config.data` that say how long a model's rows are."""
  if config.model.kind == 'encoder_decoder':
    return ('seq_len', 'target_len')
  return ('seq_len',)


def _check_groups(config, name, rows, parts, axes) -> None:
  S, T = config.model.moe.group_size, config.data[name]
  if S > 0 and rows * T % S:
    raise ValueError(
      f'moe.group_size={S} does not divide the {rows * T} tokens of a '
      f'microbatch ({rows} rows of {name}={T}): a group never spans two'
    )
  groups = 1 if S == -1 else rows * T // (S or T)
  if groups % parts:
    raise ValueError(
      f'{groups} groups of moe.group_size={S or T} tokens in a microbatch do '
      f'not divide by {parts} devices of mesh axes {axes}: a group never spans '
      'two'
    )


def check_task(config: ml_collections.ConfigDict, data: DataConfig) -> None:
  """Raises ValueError where the task's rows are not the model's inputs."""
  kind = config.model.kind
  if (data.task == 'classes') != (kind in OF_FEATURES):
    raise ValueError(
      f'data.task={data.task!r} and model.kind={kind!r}: models of '
      f"{list(OF_FEATURES)} learn the task 'classes', others learn the others"
    )
  if (kind == 'encoder_decoder') != data.encoder_decoder:
    raise ValueError(
      f'data.task={data.task!r} with target_len={data.target_len} is for '
      f'{"an encoder-decoder" if data.encoder_decoder else "a decoder"}, and '
      f"model.kind={kind!r}; an encoder-decoder needs a task other than 'lm' "
      'and target_len > 0'
    )


def check_best(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError where no evaluation can choose the best checkpoint."""
  best = config.checkpoint.best_eval
  if not config.checkpoint.keep_best:
    return
  losses = sorted(n for n, e in config.evals.items() if e.get('kind') == 'loss')
  if best not in losses:
    raise ValueError(
      f"checkpoint.best_eval={best!r} is no evaluation of kind 'loss'; have "
      f'{losses}; or set checkpoint.keep_best=False'
    )


def check_sample(
  config: ml_collections.ConfigDict, tokenizer: Tokenizer
) -> None:
  """Raises ValueError where the sample could not be drawn at the end."""
  sample = config.sample
  if sample.num_tokens < 1:
    return
  if config.data.task == 'classes':
    raise ValueError(
      f"sample.num_tokens={sample.num_tokens} of the task 'classes', which has "
      'no text; set it to 0'
    )
  if sample.temperature < 0:
    raise ValueError(f'sample.temperature={sample.temperature} is negative')
  if not len(tokenizer.encode(sample.prompt)):
    raise ValueError(
      'sample.prompt is empty; give it a character, or set sample.num_tokens=0'
    )


def check_rules(config: ml_collections.ConfigDict, params) -> None:
  """Raises ValueError where a parameter has no rule, or a rule is none."""
  for name in ('weight_decay_rules', 'learning_rate_rules'):
    by_name(config[name], f'optimizer.{name}')(params)
