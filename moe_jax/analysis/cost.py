"""The cost of a model: parameters, FLOPs, bytes, devices with room for it.

    python -m moe_jax.analysis.cost --config=moe_jax:mixtral_8x7b
    python -m moe_jax.analysis.cost --config=moe_jax:switch_base:e8 --batch=4

All figures are counted from options and shapes of parameters, never measured.
Bytes are counted for models that consist of blocks of attention and a
feed-forward, so not for LSTMs.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from moe_jax import command_line, config_flag
from moe_jax.analysis.cost_tables import (
  Workload,
  compute_table,
  fit_table,
  memory_table,
  training_table,
  without_vocabulary,
)
from moe_jax.analysis.counts import Cost, TokenFlops, count, short
from moe_jax.errors import InputError
from moe_jax.memory_room import in_bytes
from moe_jax.training.run_options import RunOptions

__all__ = [
  'Cost',
  'TokenFlops',
  'Workload',
  'compute_table',
  'count',
  'fit_table',
  'in_bytes',
  'memory_table',
  'short',
  'training_table',
  'with_own_vocabulary',
  'without_vocabulary',
  'workload',
]


_PIPE_WIDTH = 120  # characters


def with_own_vocabulary(options: RunOptions) -> RunOptions:
  """The options of a run with the size of its vocabulary, without its data.

  Raises:
    ValueError: The size of the vocabulary depends on the data and the options
      do not give it.
  """
  model = options.model
  tokenizer = options.init_from.with_tokenizer(options.data).tokenizer
  size = model.vocab_size or tokenizer.known_vocab_size()
  if not size:
    raise InputError(
      f'data.tokenizer={type(options.data.tokenizer).__name__} has a '
      'vocabulary that depends on the data; give its size with '
      '--config.model.vocab_size=...'
    )
  return options.filled(size)


def workload(
  options: RunOptions, batch_size: int = 1, num_parts: int = 0
) -> Workload:
  """The sizes of a batch with the lengths of rows that a run trains on.

  Args:
    options: The options of the run.
    batch_size: Number of rows in the batch.
    num_parts: Number of devices that the experts are split over; 0 takes the
      size of the mesh axis `expert`.
  """
  num_devices = num_parts or max(options.mesh.expert, 1)
  lengths = options.data.seq_len, options.data.target_len
  return Workload(batch_size, *lengths, num_devices)


def parse(
  argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns overrides of the config separately."""
  parser = command_line.Parser(
    prog=command_line.program('moe_jax.analysis.cost'),
    **command_line.about(__doc__),
  )
  command_line.add_config(parser)
  parser.set_defaults(run=run)
  add = parser.add_argument
  add(
    '--batch',
    type=command_line.POSITIVE,
    help="number of rows in the batch; by default the config's batch_size in "
    'training (a microbatch of it), and one row in generation',
  )
  add(
    '--expert_parallel',
    type=command_line.NOT_NEGATIVE,
    default=0,
    help="devices that the experts are split over; 0 takes the mesh's",
  )
  return command_line.parse_command(parser, argv, lambda _: True)


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
  """Prints the cost of the model of the command line's config."""
  options, ignored = config_flag.options_of(arguments.config, overrides)
  command_line.say(config_flag.ignored_lines(ignored))
  options = with_own_vocabulary(options)
  model = options.build()
  one_row, training_batch = (
    workload(options, arguments.batch or rows, arguments.expert_parallel)
    for rows in (1, options.shape().rows)
  )
  # No terminal limits the width of the tables in a pipe or a file.
  console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
  console.print(compute_table(model, training_batch))
  if model.stacks:
    console.print(memory_table(model, training_batch))
    console.print(fit_table(model, one_row))
  if len(model.stacks) == 1:
    console.print(training_table(options, model))


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; errors are reported in a few lines."""
  command_line.run_command(*parse(argv))


if __name__ == '__main__':
  main()
