"""The options of a whole config, read once before anything is built.

    options = run_config.read(config)

Not here: the rules that concern several sections (`training.run_options`), and
the files of `configs/`.
"""

import copy
import dataclasses
import functools
import json
import pathlib
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from moe_jax import sections
from moe_jax.evaluation import EVALUATIONS
from moe_jax.finetuning import InitFrom
from moe_jax.models import MODELS
from moe_jax.options import entries, nested
from moe_jax.section_reader import Leaf
from moe_jax.training.evaluate import DEFAULT_EVALS, EvaluationOptions
from moe_jax.training.run_options import RunOptions

_HEAD = ('', 'key', 'value', 'default')
_CELL, _WIDTH, _INDENT = 28, 96, ' ' * 7


@dataclasses.dataclass(frozen=True)
class RunConfig(RunOptions):
  """All that a run is, with every kind of evaluation and of beginning."""

  evals: Mapping[str, EvaluationOptions] = entries(
    EVALUATIONS,
    DEFAULT_EVALS,
    'Evaluations, each by a name that the user chooses.',
  )
  init_from: InitFrom = nested(
    InitFrom(), 'Another run that this one begins with.'
  )


def read(config: ml_collections.ConfigDict) -> RunConfig:
  """The options of a config.

  Raises:
    OptionError: All that is wrong with it, by name.
  """
  return sections.read(RunConfig, config)


def from_file(path: pathlib.Path) -> ml_collections.ConfigDict:
  """The config whose values stand in a JSON file; see `sections.section`.

  Raises:
    OptionError: All that is wrong with them, by name.
  """
  values = json.loads(path.read_text(encoding='utf-8'))
  return sections.section(sections.read(RunConfig, values))


def settled(
  before: ml_collections.ConfigDict, after: ml_collections.ConfigDict
) -> tuple[RunConfig, dict[str, Any]]:
  """The options of a config whose last layer may choose other kinds.

  Args:
    before: The config without its last layer, such as a file's.
    after: With it, such as the flags of a command line.

  Returns:
    The options, and by name the values that the last layer made meaningless:
    they are ignored.

  Raises:
    OptionError: All that is wrong, by name.
  """
  config, ignored = sections.settle(RunConfig, before, after)
  config = copy.deepcopy(config).unlock()
  model = MODELS.get(config.model.kind)
  overrides = model.settle_overrides(before.model, config.model)
  ignored |= {f'model.{name}': value for name, value in overrides.items()}
  for name, entry in config.evals.items():
    left, given_up = sections.settle_overrides(
      functools.partial(sections.choice_leaves, MODELS),
      before.model,
      config.model,
      entry.get('model_overrides', {}),
    )
    entry.model_overrides = left
    where = f'evals.{name}.model_overrides'
    ignored |= {f'{where}.{key}': value for key, value in given_up.items()}
  return read(sections.lock(RunConfig, config)), ignored


def describe(config: ml_collections.ConfigDict) -> Iterator[str]:
  """Lines that say of every key of a config what it is.

  Each key has its value, its default and its sentence. A star marks a value
  that is not the default, a dash a key that has no effect beside the others.
  """
  leaves = sections.leaves(RunConfig, config)
  rows = [_row(leaf) for leaf in leaves]
  yield "'*' marks what is not the default, '-' what has no effect here."
  widths = [max(map(len, column)) for column in zip(*rows, _HEAD)]
  for row, sentence in zip(
    [_HEAD, *rows], ['', *(leaf.spec.sentence for leaf in leaves)]
  ):
    cells = (cell.ljust(width) for cell, width in zip(row, widths))
    yield '  '.join(cells).rstrip()
    yield from textwrap.wrap(
      sentence, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT
    )


def _row(leaf: Leaf) -> tuple[str, str, str, str]:
  mark = '-' if leaf.idle else '*' if leaf.changed else ''
  default = leaf.default
  if default is dataclasses.MISSING:
    default = 'required'
  else:
    default = textwrap.shorten(repr(default), _CELL, placeholder='...')
  value = textwrap.shorten(repr(leaf.value), _CELL, placeholder='...')
  return mark, leaf.path, value, default
