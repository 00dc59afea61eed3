"""The options of a whole config, which are read before anything is built.

options = run_config.read(config)
"""

import copy
import dataclasses
import functools
import json
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ml_collections

from moe_jax import cli
from moe_jax.compression.distill_options import NONE, DistillOptions
from moe_jax.config import (
  Leaf,
  choice_leaves,
  entries,
  leaves_of,
  lock,
  nested,
  read_options,
  section_of,
  settle,
  settle_overrides,
)
from moe_jax.evaluation import EVALUATIONS
from moe_jax.finetuning import InitFrom
from moe_jax.models import MODELS
from moe_jax.training.evaluate import DEFAULT_EVALS, EvaluationOptions
from moe_jax.training.run_options import RunOptions

_CELL, _WIDTH, _INDENT = 28, 96, ' ' * 7


@dataclasses.dataclass(frozen=True)
class RunConfig(RunOptions):
  """All options of a run, with every kind of evaluation and initialisation."""

  evals: Mapping[str, EvaluationOptions] = entries(
    EVALUATIONS,
    DEFAULT_EVALS,
    'Kind of the evaluation. Each entry of `evals` is one evaluation, with a '
    'name that the user chooses.',
  )
  init_from: InitFrom = nested(
    InitFrom(), 'Run whose parameters this run begins with.'
  )
  distill: DistillOptions = nested(
    DistillOptions(), 'Run whose model teaches this one.'
  )

  @property
  def for_hooks(self) -> tuple[str, ...]:
    """Names of the sections that need a hook, the teacher's among them."""
    distill_section = ('distill',) if self.distill.teacher else ()
    return (*super().for_hooks, *distill_section)

  def problems(self) -> Iterator[str]:
    """The problems of all runs, and of the teacher with other sections."""
    yield from super().problems()
    o = self.distill
    if o.teacher and self.model.replay:
      yield (
        f'distill.teacher={o.teacher!r} with model.moe.replay='
        f'{self.model.replay!r}: the teacher reads the same batches, and would '
        'be given the same choices'
      )
    if o.begins and self.init_from.workdir:
      yield (
        f'init_from.workdir={self.init_from.workdir!r} with distill.start='
        f'{o.start!r}: a run begins with one of them; set '
        f'distill.start={NONE!r}'
      )


def read(config: ml_collections.ConfigDict) -> RunConfig:
  """The options of a config.

  Raises:
    OptionError: The message lists all problems, by name.
  """
  return read_options(RunConfig, config)


def from_file(path: pathlib.Path) -> ml_collections.ConfigDict:
  """The config with the values of a JSON file; see `section_of`.

  Raises:
    OptionError: The message lists all problems, by name.
  """
  values = json.loads(path.read_text(encoding='utf-8'))
  return section_of(read_options(RunConfig, values))


def options_of(
  spec: str, overrides: Sequence[str] = ()
) -> tuple[RunConfig, dict[str, Any]]:
  """The options of a config file with overrides; see `settled`.

  Args:
    spec: The config's path or name; see `cli.load_config`.
    overrides: Flags such as '--config.seed=1'.

  Raises:
    ValueError: The message gives everything that is wrong, by name.
  """
  config = cli.config_of(spec, overrides)
  return settled(cli.load_config(spec), config)


def ignored_lines(ignored: Mapping[str, Any]) -> Iterator[str]:
  """A line for each value that `settled` says is ignored."""
  for name, value in ignored.items():
    yield f'{name}={value!r} has no effect with these flags; ignored'


def settled(
  before: ml_collections.ConfigDict, after: ml_collections.ConfigDict
) -> tuple[RunConfig, dict[str, Any]]:
  """The options of a config whose last layer may choose other kinds.

  Args:
    before: The config without its last layer, such as that of a file.
    after: The config with it, such as the flags of a command line.

  Returns:
    The options, and by name the values that are ignored because the last layer
    took their effect.

  Raises:
    OptionError: The message lists all problems, by name.
  """
  config, ignored = settle(RunConfig, before, after)
  old, new = before.get('model'), config.get('model')
  if all(
    isinstance(x, ml_collections.ConfigDict) and 'kind' in x for x in (old, new)
  ):
    config = copy.deepcopy(config).unlock()
    ignored |= _settle_overrides(cast(ml_collections.ConfigDict, old), config)
    config = lock(RunConfig, config)
  return read(config), ignored


def _settle_overrides(
  before: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> dict[str, Any]:
  """Removes overrides of the model that a later layer leaves no effect.

  Args:
    before: The model's section of the earlier layers.
    config: The config with the later layer, which is changed.

  Returns:
    The removed values, by name.
  """
  overrides = MODELS.get(config.model.kind).settle_overrides(
    before, config.model
  )
  ignored = {f'model.{name}': value for name, value in overrides.items()}
  evals: Any = config.get('evals', {})
  for name, entry in evals.items():
    if not isinstance(entry, ml_collections.ConfigDict):
      continue
    remaining, dropped = settle_overrides(
      functools.partial(choice_leaves, MODELS),
      before,
      config.model,
      cast(Any, entry.get('model_overrides', {})),
    )
    entry.model_overrides = remaining
    path = f'evals.{name}.model_overrides'
    ignored |= {f'{path}.{key}': value for key, value in dropped.items()}
  return ignored


def describe(config: ml_collections.ConfigDict) -> Iterator[str]:
  """Lines that describe every key of a config.

  Each key has its value, its default and its sentence. A star marks a value
  that is not the default, a dash a key that has no effect in this config.
  """
  leaves = leaves_of(RunConfig, config)
  width = max(len(leaf.path) for leaf in leaves)
  yield "'*' marks what is not the default, '-' what has no effect here."
  yield _line('', 'key'.ljust(width), 'value', 'default')
  for leaf in leaves:
    mark = '-' if leaf.idle else '*' if leaf.changed else ''
    value, default = repr(leaf.value), repr(leaf.default)
    if leaf.default is dataclasses.MISSING:
      default = 'required'
    yield _line(mark, leaf.path.ljust(width), _cell(value), _cell(default))
    if _cell(value) != value:
      yield f'{_INDENT}value: {value}'
    if _cell(default) != default and leaf.changed:
      yield f'{_INDENT}default: {default}'
    yield from textwrap.wrap(
      _sentence(leaf),
      _WIDTH,
      initial_indent=_INDENT,
      subsequent_indent=_INDENT,
      break_on_hyphens=False,
    )


def _line(mark: str, key: str, value: str, default: str) -> str:
  return f'{mark:1}  {key}  {value:{_CELL}}  {default}'.rstrip()


def _cell(text: str) -> str:
  """The text itself, or a sign that it is on a line below."""
  return text if len(text) <= _CELL else '(below)'


def _sentence(leaf: Leaf) -> str:
  sentence, kinds = leaf.spec.sentence, leaf.spec.kinds
  if kinds is None:
    return sentence
  return f'{sentence} One of: {", ".join(kinds.builtin)}, or module:name.'
