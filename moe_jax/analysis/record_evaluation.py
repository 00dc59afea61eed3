"""Records the choices of experts in an evaluation of a finished run.

    python -m moe_jax.analysis.record_evaluation --workdir=runs/tiny \
      --trace=traces/tiny --num_batches=16

Experts have the capacity of training; with --room_for_all they drop no token.
The records are of the kind 'loss'.
"""

import argparse
import contextlib
import functools
from collections.abc import Sequence

import jax

from moe_jax import cli, generation
from moe_jax.analysis import traces
from moe_jax.analysis.recording import Recorder, make_header
from moe_jax.data import SPLITS
from moe_jax.data import load as load_data
from moe_jax.devices import Placing, keep_freed_memory, keep_programs
from moe_jax.errors import InputError
from moe_jax.models.recorded import recording
from moe_jax.training.evaluate import ROOM_FOR_ALL, Losses, LossEvaluation

KIND = 'loss'


def record(options: argparse.Namespace, _: list[str]) -> None:
  """Evaluates a run's loss, and writes a trace of the choices of experts.

  Raises:
    ValueError: There is a trace already, or no sparse layer, or no such run.
    CheckpointError: No checkpoint can be read.
  """
  workdir, dtype = options.workdir, 'float32' if options.float32 else 'float16'
  traces.check_new(options.trace)
  overrides = ROOM_FOR_ALL if options.room_for_all else {}
  sizes = {'num_batches': options.num_batches, 'split': options.split}
  entry = LossEvaluation(**sizes, model_overrides=overrides)
  run = generation.load(workdir, options.step, allow=options.allow_module)
  described = run.options
  model_options = entry.overridden(described.model)
  model = model_options.build(described.sharding.rules)
  if not model.stacks.sparse_layers:
    raise InputError(f'{workdir} has a model without sparse layers')
  dataset = load_data(described.data)
  header = make_header(
    model,
    model_options,
    described.data,
    dataset.tokenizer,
    batch_size=described.batch_size,
    microbatches=described.microbatches,
    data_digest=dataset.digest,
    has_logits=options.logits,
    dtype=dtype,
    note=f'{entry}, step {run.step} of {workdir}',
  )
  apply = functools.partial(recording, logits=options.logits, dtype=dtype)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  put = Placing(device, described.batch_size, described.microbatches)
  rows = dataset.splits[options.split]
  losses = Losses(model, options.num_batches, rows, put)
  with contextlib.closing(Recorder(options.trace, header, model)) as recorder:
    measure = recorder.measure(KIND, losses, apply)
    row = measure(run.variables, run.step)
  summary = f'loss {row["loss"]:.4f}; trace in {options.trace}'
  cli.say([summary, header.note])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = cli.parser('moe_jax.analysis.record_evaluation', __doc__)
  add = parser.add_argument
  add('--workdir', required=True, help='folder of the run')
  add('--trace', required=True, help='new folder of the trace')
  add('--step', type=cli.NOT_NEGATIVE, help='else the newest good')
  add('--split', choices=SPLITS, default='validation')
  text = 'batches, spread over the split; 0: all of it'
  add('--num_batches', type=cli.NOT_NEGATIVE, default=0, help=text)
  add('--room_for_all', action='store_true', help='drop no token')
  add('--logits', action='store_true', help="record the routers' logits, too")
  text = 'record gates and logits unrounded (default: float16)'
  add('--float32', action='store_true', help=text)
  cli.add_allow_module(parser)
  cli.add_traceback(parser)
  parser.set_defaults(run=record)
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; errors are reported in a few lines."""
  options = parse(argv)
  keep_freed_memory()
  if problem := keep_programs():
    cli.complain(problem)
  cli.run_command(options, [])


if __name__ == '__main__':
  main()
