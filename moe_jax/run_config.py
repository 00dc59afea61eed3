"""The options of a whole config; `read` reads them before anything is built."""

import dataclasses
import json
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import ml_collections

from moe_jax import cli
from moe_jax.compression.distill_options import NONE, DistillOptions
from moe_jax.config import (
  MISSING,
  OptionError,
  entries,
  keys_of,
  option,
  read_options,
  section_of,
  unknown_key_text,
)
from moe_jax.evaluation import EVALUATIONS
from moe_jax.finetuning import InitFrom
from moe_jax.training.evaluate import DEFAULT_EVALS, EvaluationOptions
from moe_jax.training.run_options import RunOptions


@dataclasses.dataclass(frozen=True)
class RunConfig(RunOptions):
  """All options of a run, with every kind of evaluation and initialisation."""

  evals: Mapping[str, EvaluationOptions] = entries(
    EVALUATIONS,
    DEFAULT_EVALS,
    'Kind of the evaluation. Each entry of `evals` is one evaluation, with a '
    'name that the user chooses.',
  )
  init_from: InitFrom = option(
    InitFrom(), 'Run whose parameters this run begins with.'
  )
  distill: DistillOptions = option(
    DistillOptions(), 'Run whose model teaches this one.'
  )

  @property
  def for_hooks(self) -> tuple[str, ...]:
    distill_section = ('distill',) if self.distill.teacher else ()
    return (*super().for_hooks, *distill_section)

  def problems(self) -> Iterator[str]:
    yield from super().problems()
    o = self.distill
    if o.teacher and self.model.moe.replay:
      yield (
        f'distill.teacher={o.teacher!r} with model.moe.replay='
        f'{self.model.moe.replay!r}: the teacher reads the same batches, and '
        'would be given the same choices'
      )
    if o.begins and self.init_from.workdir:
      yield (
        f'init_from.workdir={self.init_from.workdir!r} with distill.start='
        f'{o.start!r}: a run begins with one of them; set '
        f'distill.start={NONE!r}'
      )


def read(config: ml_collections.ConfigDict) -> RunConfig:
  """The options of a config, checked.

  Raises:
    OptionError: The message lists all problems, by name.
  """
  return read_options(RunConfig, config)


def from_file(path: pathlib.Path) -> ml_collections.ConfigDict:
  """The config with a JSON file's values; other keys have their defaults.

  Raises:
    OptionError: The message lists all problems, by name.
  """
  values = json.loads(path.read_text(encoding='utf-8'))
  return section_of(read_options(RunConfig, values))


def options_of(
  base: str | ml_collections.ConfigDict, overrides: Sequence[str] = ()
) -> tuple[RunConfig, list[str]]:
  """The options of a config with overrides such as '--config.seed=1'.

  `base` is a config, or its path or name. The second result has a line for each
  value of the file that is ignored since it has no effect. A ValueError gives
  everything that is wrong, by name.
  """
  return cli.options_of(RunConfig, base, overrides)


def describe(
  config: ml_collections.ConfigDict, part: str = ''
) -> Iterator[str]:
  """Lines that describe the keys of a config.

  The lines of a key give its value, its default and a sentence on what it does.
  A star marks a value that is not the default. A dash marks a key without an
  effect, since its section belongs to a kind that the config does not choose.

  Args:
    config: The config.
    part: Dotted name of a section or key, which alone is described; ''
      describes the whole config.

  Raises:
    ValueError: There is no such part.
  """
  keys = keys_of(RunConfig, config)
  chosen = [
    key for key in keys if f'{key.path}.'.startswith(f'{part}.'.lstrip('.'))
  ]
  if not chosen:
    names = {p for key in keys for p in [key.path, key.path.rpartition('.')[0]]}
    last = part.rpartition('.')[2]
    near = {name for name in names if name.rpartition('.')[2] == last}
    top = {name.partition('.')[0] for name in names - {''}}
    raise OptionError([unknown_key_text(part, near or top)])
  yield "'*' marks what is not the default, '-' what is not chosen here."
  for key in chosen:
    mark = '-' if key.unchosen else '*' if key.changed else ' '
    line = f'{mark}  {key.path} = {key.value!r}'
    if key.default is MISSING:
      line += '  (required)'
    elif key.changed:
      line += f'  (default: {key.default!r})'
    yield line
    sentence, kinds = key.option.sentence, key.option.kinds
    if kinds is not None:
      sentence += f' One of: {", ".join(kinds.builtin)}, or module:name.'
    lines = textwrap.wrap(sentence, 89, break_on_hyphens=False)
    yield from (f'       {line}' for line in lines)
