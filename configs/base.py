"""A config at its defaults; a file here changes only what differs from them.

    def get_config(arg=''):
      config = base.get_config()
      config.model.width = 256
      return base.finish(config, arg)

Keys, defaults and what each means are those of the options' dataclasses:

    python -m moe_jax.main --config=configs/base.py --describe
"""

from typing import Any

import ml_collections

from moe_jax import run_config, sections
from moe_jax.evaluation import (
  EVALUATIONS,
  ChoiceEvaluation,
  ClassifyEvaluation,
  EvaluationOptions,
  GenerateEvaluation,
  LossEvaluation,
)
from moe_jax.options import fields_of
from moe_jax.run_config import RunConfig

ConfigDict = ml_collections.ConfigDict

RUNLOCAL = 'runlocal'


def get_config(arg: str = '') -> ConfigDict:
  """The defaults, locked against new keys but for those of open sections."""
  return finish(sections.section(RunConfig), arg)


def finish(config: ConfigDict, arg: str = '') -> ConfigDict:
  """The last line of every config: locks it, and shrinks it if asked.

  Args:
    config: The config.
    arg: What stands behind the file's name and a colon: 'runlocal' tries the
      same structure out at a laptop's size, on the embedded corpus.

  Raises:
    ValueError: `arg` is neither '' nor 'runlocal', or the config that is to be
      shrunk is wrong.
  """
  if arg not in ('', RUNLOCAL):
    raise ValueError(f"unknown config argument {arg!r}; have ['', 'runlocal']")
  if arg == RUNLOCAL:
    config = sections.section(run_config.read(config).shrunk())
  return sections.lock(RunConfig, config)


def evaluation(
  every_steps: int = 500, num_batches: int = 0, **overrides: Any
) -> ConfigDict:
  """An entry of `evals` of kind 'loss': the loss of the validation split.

  Args:
    every_steps: Number of optimizer steps between two; it also runs at the
      end.
    num_batches: Number of batches, spread over the split; 0 takes all of it.
    **overrides: Keys of `config.model`, nested, that differ in it.
  """
  keys = dict(every_steps=every_steps, num_batches=num_batches)
  return entry(LossEvaluation, **keys, **overrides)


def classify_evaluation(
  every_steps: int = 500, num_batches: int = 0, **overrides: Any
) -> ConfigDict:
  """An entry of kind 'classify': how often the right class is the largest.

  Args:
    every_steps: As in `evaluation`.
    num_batches: Likewise.
    **overrides: Likewise.
  """
  keys = dict(every_steps=every_steps, num_batches=num_batches)
  return entry(ClassifyEvaluation, **keys, **overrides)


def generate_evaluation(every_steps: int = 0, **keys: Any) -> ConfigDict:
  """An entry of kind 'generate': outputs for validation inputs, scored.

  Args:
    every_steps: As in `evaluation`.
    **keys: As in `entry`.
  """
  return entry(GenerateEvaluation, every_steps=every_steps, **keys)


def choice_evaluation(every_steps: int = 0, **keys: Any) -> ConfigDict:
  """An entry of kind 'choice': how often the right answer is the likeliest.

  Args:
    every_steps: As in `evaluation`.
    **keys: As in `entry`.
  """
  return entry(ChoiceEvaluation, every_steps=every_steps, **keys)


def entry(kind: type[EvaluationOptions], **keys: Any) -> ConfigDict:
  """An entry of `evals` of any kind, a user's own among them.

  Args:
    kind: The class of its options.
    **keys: Options of that kind, sections as nested dicts; any others are keys
      of `config.model` that differ in the evaluation.

  Raises:
    ValueError: All that is wrong with the options, by name.
  """
  own = {key: keys.pop(key) for key in list(keys) if key in fields_of(kind)}
  if keys:
    own['model_overrides'] = {**own.get('model_overrides', {}), **keys}
  options = sections.read(kind, own)
  return sections.entry_section(EVALUATIONS, options)
