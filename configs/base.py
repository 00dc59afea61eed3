"""The config with all defaults, of which other files change some values.

    def get_config(arg=''):
      config = base.get_config()
      config.model.width = 256
      return base.finish(config, arg)

Keys, defaults and descriptions come from the dataclasses of options:

    python -m moe_jax.main --config=moe_jax:base --describe
"""

from typing import Any

import ml_collections

from moe_jax import run_config
from moe_jax.config import (
  entry_section,
  fields_of,
  lock,
  read_options,
  section_of,
)
from moe_jax.data import SOURCES, SourceOptions
from moe_jax.errors import InputError
from moe_jax.evaluation import (
  EVALUATIONS,
  ChoiceEvaluation,
  EvaluationOptions,
  GenerateEvaluation,
  LossEvaluation,
)
from moe_jax.run_config import RunConfig

ConfigDict = ml_collections.ConfigDict

RUNLOCAL = 'runlocal'


def get_config(arg: str = '') -> ConfigDict:
  """The defaults, locked against new keys except where users name the keys."""
  return finish(section_of(RunConfig), arg)


def finish(config: ConfigDict, arg: str = '') -> ConfigDict:
  """Locks a config, or shrinks it for 'runlocal'; each `get_config` calls this.

  Args:
    config: The config.
    arg: The text after the file's name and a colon. With 'runlocal' the model
      keeps its structure, gets a laptop's size, and reads the embedded corpus.

  Raises:
    ValueError: `arg` is neither '' nor 'runlocal', or the config to be shrunk
      has problems.
  """
  if arg not in ('', RUNLOCAL):
    raise InputError(f"unknown config argument {arg!r}; have ['', 'runlocal']")
  if arg == RUNLOCAL:
    return section_of(run_config.read(config).shrunk())
  return lock(RunConfig, config)


def source(options: SourceOptions) -> ConfigDict:
  """An entry of `data.mixture.sources`: a source and its options."""
  return entry_section(SOURCES, options)


def evaluation(
  every_steps: int = 500, num_batches: int = 0, **overrides: Any
) -> ConfigDict:
  """An entry of `evals` of kind 'loss': the loss of a split of the data.

  Args:
    every_steps: Number of optimizer steps between two measurements; the last is
      at the end of the run.
    num_batches: Number of batches, spread over the split; 0 takes all of it.
    **overrides: Keys of `config.model`, nested, that differ in the evaluation,
      and `split`, which is 'validation' unless it is given.
  """
  keys = dict(every_steps=every_steps, num_batches=num_batches)
  return entry(LossEvaluation, **keys, **overrides)


def generate_evaluation(every_steps: int = 0, **keys: Any) -> ConfigDict:
  """An entry of `evals` of kind 'generate': scores of generated outputs.

  Args:
    every_steps: Number of steps between two evaluations; 0: only at the end.
    **keys: Options of this kind, and keys of `config.model` to override.
  """
  return entry(GenerateEvaluation, every_steps=every_steps, **keys)


def choice_evaluation(every_steps: int = 0, **keys: Any) -> ConfigDict:
  """An entry of `evals` of kind 'choice': accuracy on multiple choice.

  Args:
    every_steps: Number of steps between two evaluations; 0: only at the end.
    **keys: Options of this kind, and keys of `config.model` to override.
  """
  return entry(ChoiceEvaluation, every_steps=every_steps, **keys)


def entry(kind: type[EvaluationOptions], **keys: Any) -> ConfigDict:
  """An entry of `evals` of any kind, including a user's own.

  Args:
    kind: The class of its options.
    **keys: Options of that kind, with sections as nested dicts; all other keys
      are those of `config.model` that differ in the evaluation.

  Raises:
    ValueError: The message lists all problems of the options, by name.
  """
  fields = {key: keys.pop(key) for key in list(keys) if key in fields_of(kind)}
  if keys:
    fields['model_overrides'] = {**fields.get('model_overrides', {}), **keys}
  options = read_options(kind, fields)
  return entry_section(EVALUATIONS, options)
