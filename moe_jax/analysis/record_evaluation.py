"""Records the choices of experts in an evaluation of a finished run.

    python -m moe_jax.analysis.record_evaluation --workdir=runs/tiny \
      --trace=traces/tiny --num_batches=16

The capacity is that of training; with --room_for_all there is no bound. The
record's kind is 'loss'.
"""

import argparse
import os
import pathlib
from collections.abc import Iterable, Sequence

import jax
from absl import logging

from moe_jax import command_line, compile_cache, host
from moe_jax.analysis import traces
from moe_jax.analysis.recording import RecordedLosses, Recorder, make_header
from moe_jax.data import SPLITS
from moe_jax.data import load as load_data
from moe_jax.distributed import Placing
from moe_jax.errors import InputError
from moe_jax.runs import trained
from moe_jax.runs.metrics import Row
from moe_jax.training.evaluate import ROOM_FOR_ALL, LossEvaluation, Setting
from moe_jax.training.evaluation_entries import overridden
from moe_jax.training.trace_options import TraceOptions

KIND = 'loss'


def record(
  workdir: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  entry: LossEvaluation,
  *,
  step: int | None = None,
  options: TraceOptions | None = None,
  allow: Iterable[str] = (),
) -> Row:
  """Evaluates a run's loss, and writes a trace of the choices.

  Args:
    workdir: The run's folder.
    folder: A folder without a trace.
    entry: The options of the evaluation; its period is ignored.
    step: The step of the checkpoint; None is the newest good one.
    options: Whether logits are recorded, and the type of numbers.
    allow: Modules of the user's own classes.

  Returns:
    The row that the evaluation measures.

  Raises:
    ValueError: The folder has a trace; the run has no sparse layers, or cannot
      be read.
    CheckpointError: No checkpoint is good.
  """
  traces.check_new(folder)
  o, run = options or TraceOptions(), trained.read(workdir, allow)
  model_options, _ = overridden(run.model, entry)
  model = model_options.build(run.sharding.rules)
  if not model.sparse_layers:
    raise InputError(f'{workdir} has a model without sparse layers')
  checkpoint = trained.restore_variables(
    workdir, model, run.sharding.rules, step=step
  )
  dataset = load_data(run.data)
  placing = Placing(
    jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
    run.batch_size,
    run.microbatches,
  )
  header = make_header(
    model,
    model_options,
    run.data,
    dataset.tokenizer,
    batch_size=run.batch_size,
    microbatches=run.microbatches,
    data_digest=dataset.digest,
    has_logits=o.logits,
    dtype=o.dtype,
    note=f'{entry}, step {checkpoint.step} of {workdir}',
  )
  setting = Setting(
    KIND,
    model,
    dataset,
    run.data,
    run.batch_size,
    pathlib.Path(workdir).expanduser(),
    placing,
  )
  recorder = Recorder(folder, header, model)
  try:
    measure = RecordedLosses(
      KIND, entry.measure(setting), o.recording, recorder
    )
    return measure(checkpoint.state, checkpoint.step)
  finally:
    recorder.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = command_line.Parser(
    prog=command_line.program('moe_jax.analysis.record_evaluation'),
    **command_line.about(__doc__),
  )
  add = parser.add_argument
  add('--workdir', required=True, help='folder of the run')
  add('--trace', required=True, help='new folder of the trace')
  add('--step', type=command_line.NOT_NEGATIVE, help='else the newest good')
  add('--split', choices=SPLITS, default='validation')
  add(
    '--num_batches',
    type=command_line.NOT_NEGATIVE,
    default=0,
    help='batches, spread over the split; 0: all of it',
  )
  add('--room_for_all', action='store_true', help='drop no token')
  add('--logits', action='store_true', help="record the routers' logits, too")
  add(
    '--float32', action='store_true', help='record gates and logits unrounded'
  )
  add('--allow_module', action='append', default=[])
  add('--traceback', action='store_true')
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; errors are reported in a few lines."""
  options = parse(argv)
  logging.set_verbosity(logging.WARNING)
  host.keep_freed_memory()
  if problem := compile_cache.use():
    command_line.complain(problem)
  with command_line.reported(options.traceback):
    row = record(
      options.workdir,
      options.trace,
      LossEvaluation(
        num_batches=options.num_batches,
        split=options.split,
        model_overrides=ROOM_FOR_ALL if options.room_for_all else {},
      ),
      step=options.step,
      options=TraceOptions(
        logits=options.logits, dtype='float32' if options.float32 else 'float16'
      ),
      allow=options.allow_module,
    )
    note = traces.read(options.trace).header.note
    summary = f'loss {row["loss"]:.4f}; trace in {options.trace}'
    command_line.say([summary, *filter(None, [note])])


if __name__ == '__main__':
  main()
