"""Counts what a model costs: parameters, FLOPs and bytes.

    python -m moe_jax.analysis.cost --config=moe_jax:mixtral_8x7b
    python -m moe_jax.analysis.cost --config=moe_jax:switch_base:e8 --batch=4

All figures are counted from options and shapes of parameters, never measured.
Bytes are counted for models that consist of blocks of attention and a
feed-forward, so not for LSTMs.
"""

import argparse
import dataclasses
import datetime
import math
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.table import Column, Table

from moe_jax import cli, partitioning, run_config
from moe_jax.analysis import memory, roofline, sharded
from moe_jax.analysis.counts import count, halves, short, sized_parameters
from moe_jax.analysis.routing_report import ValueTable, wide_console
from moe_jax.devices import in_bytes
from moe_jax.errors import InputError
from moe_jax.layers.experts import DISPATCHES
from moe_jax.layers.parameters import Role
from moe_jax.layers.shared import Numerics
from moe_jax.models import Model
from moe_jax.models.description import Path
from moe_jax.models.lora import LoraOptions
from moe_jax.models.trees import flatten
from moe_jax.training.averages import kept_by_optimizer
from moe_jax.training.programs import Programs, make_optimizer
from moe_jax.training.run_options import RunOptions


class Workload(NamedTuple):
  """The sizes of the batches whose costs are counted.

  Attributes:
    batch_size: Number of rows in a batch of training.
    seq_len: Number of tokens of a row; of an encoder-decoder, of the encoder's
      row.
    target_len: Number of tokens of a decoder's row in an encoder-decoder; 0
      stands for `seq_len`.
    num_parts: Number of devices that the experts are split over.
    num_generated: Number of rows that are generated at once.
  """

  batch_size: int
  seq_len: int
  target_len: int = 0
  num_parts: int = 1
  num_generated: int = 1


def cost_table(model: Model, work: Workload) -> Table:
  """The table of what a model's parameters, FLOPs and bytes consist of.

  Bytes are left out for models without blocks of attention, such as LSTMs.
  """
  c = count(model, work.seq_len, work.target_len, work.batch_size)
  read, written = 'prefill, per token read', 'decoding, per token generated'
  sentences = ['A multiply-add counts as two FLOPs.']
  length = f'{c.decoder_len} tokens'
  if c.encoder:
    read, written = 'encoder, per token read', 'decoder, per token generated'
    length = f'{c.encoder_len} tokens read and {c.decoder_len} written'
    length += '; FLOPs of training are their mean'
  if model.stacks.blocks:
    sentences.append(f'Attention is counted in full, over {length}.')
  if c.expert_params:
    sentences.append(
      f'Experts multiply {c.capacity_slack:.2f} rows for each choice of an '
      'expert; rows without a token are not counted.'
    )
  counts = {
    'Parameters': {
      'all experts': c.expert_params,
      'all but the experts': c.total_params - c.expert_params,
      'embedding tables among those': c.embedding_params,
      'used for one token': c.active_params,
    },
    'FLOPs': {
      'training, per token': c.training_flops,
      'computed again for the backward pass, per token': c.recomputed_flops,
      read: c.prefill_flops,
      written: c.decode_flops,
      'forward pass, per example': c.example_flops,
    },
  }
  arrays = {}
  if model.stacks.blocks:
    arrays = array_bytes(model, work)
    sentences.append(
      'Kept bytes are what the forward pass leaves for the backward pass; in '
      'training, weights, gradients, the state of the optimizer and temporary '
      'arrays come on top.'
    )
  else:
    multiply_adds, params = without_vocabulary(model, work.seq_len)
    sentences.append(
      'Without embedding and softmax a token takes '
      f'{multiply_adds / 1e6:,.1f}M multiply-adds, and there are '
      f'{params / 1e6:,.1f}M parameters. Memory is counted of models of blocks '
      'alone.'
    )
  table = Table('', Column('', justify='right'), show_header=False)
  total, active = short(c.total_params), short(c.active_params)
  table.title = f'{total} parameters in memory, {active} in compute per token'
  table.caption = ' '.join(sentences)
  for form, sections in ((short, counts), (in_bytes, arrays)):
    for heading, rows in sections.items():
      table.add_section()
      table.add_row(heading, style='bold')
      for name, n in rows.items():
        table.add_row(f'  {name}', form(n))
  return table


def without_vocabulary(model: Model, seq_len: int) -> tuple[int, int]:
  """Multiply-adds for a token, and parameters, without embedding and logits.

  Table 7 of Shazeer et al. 2017 (arXiv:1701.06538) counts both so, too.
  """
  logits = 2 * model.vocab_size * model.embedding.width
  layers = sum(p.size for p in sized_parameters(model) if not p.outside_layers)
  return (count(model, seq_len).decoder.total - logits) // 2, layers


def array_bytes(model: Model, work: Workload) -> dict[str, dict[str, int]]:
  """The bytes of arrays in a training step and in generation.

  Args:
    model: A model of blocks.
    work: Sizes of the batches.

  Returns:
    The bytes of each array by its name, a phrase for printing, under a heading
    for the training step and one for generation, which name the batch's sizes.
  """
  stacks = halves(model, work.seq_len, work.target_len)
  decoder, B = stacks[-1], work.batch_size
  kept = memory.activations(model, *work[:3])
  layers = 'kept by all layers, without attention scores'
  training = {
    f'{layers} (remat={decoder.stack.remat!r})': kept.layers,
    'kept attention scores, unless attention is fused': kept.scores,
    'output logits at once, in float32': kept.logits,
  }
  for half in stacks:
    if (moe := half.moe) is None:
      continue
    stack = ''.join(f'{name}: ' for name in half.path)
    num_rows = memory.expert_rows(moe, B, half.length)
    dispatch = f'{DISPATCHES.name_of(moe.dispatch)}, {num_rows} rows'
    name = f'{stack}rows to and from the experts of a sparse layer ({dispatch})'
    training[name] = memory.dispatch_bytes(half, B)
    if sent := memory.exchange_bytes(half, B, work.num_parts):
      n, devices = 4 * len(half.moes), f'each of {work.num_parts} devices'
      training[f'{stack}one exchange of rows, as {devices} sends it'] = sent
      training[f'{stack}the {n} exchanges of a training step'] = n * sent
  size = work.num_generated, decoder.length, decoder.memory_len
  generation = {
    f'weights in {dtype}': memory.weight_bytes(model, dtype)
    for dtype in memory.DTYPES
  }
  generation['a full cache'] = memory.cache_bytes(model, *size)
  lengths = ' and '.join(str(half.length) for half in stacks)
  dtype = decoder.stack.block.shared.dtype
  return {
    f'Bytes of a training step on a batch of {B} x {lengths} tokens, '
    f'activations in {dtype}': training,
    f'Bytes to generate {size[0]} x {size[1]} tokens': generation,
  }


def training_table(options: RunOptions, model: Model) -> ValueTable:
  """The table of the cost of training all of a model or parts of it.

  It has a row for each of `variants` and a column for each number of
  `TrainingCost`.

  Args:
    options: The options of the run, with all sizes of the model filled in.
    model: The run's model, of one stack of blocks.
  """
  forward = count(model, options.data.seq_len).forward_flops
  forms = {
    'parameters': short,
    'optimizer': in_bytes,
    'gradients': in_bytes,
    'backward FLOPs a token': short,
    'adapter FLOPs a step': short,
  }
  title = f'Training, with the forward pass at {short(forward)} FLOPs a token'
  note = (
    'Backward FLOPs are those of the backward pass of the model for a token. '
    'Adapters are added to whole kernels once in a training step; gradients of '
    'these are computed and held for a while. Adapter FLOPs are those of adding'
    ' them, forward and backward, which do not grow with the batch.'
  )
  rows = []
  for name, variant in variants(options, model):
    costs = zip(forms.items(), training_cost(variant, model))
    rows.append({'Trains': name} | {key: form(n) for (key, form), n in costs})
  return ValueTable(title, note, rows, dict.fromkeys(forms, '>'))


def with_own_vocabulary(options: RunOptions) -> RunOptions:
  """The options of a run with the size of its vocabulary; no data is read.

  Raises:
    ValueError: The size of the vocabulary depends on the data and the options
      do not give it.
  """
  tokenizer = options.init_from.with_tokenizer(options.data).tokenizer
  size = options.model.vocab_size or tokenizer.known_vocab_size()
  if not size:
    raise InputError(
      f'the vocabulary of {type(options.data.tokenizer).__name__} depends on '
      'the data; give its size with --config.model.vocab_size=...'
    )
  return options.filled(size)


class TrainingCost(NamedTuple):
  """The cost of training some parameters.

  Attributes:
    trained_params: Number of the parameters that train.
    optimizer_bytes: Bytes of the state of the optimizer.
    gradient_bytes: Bytes of the gradients that are computed; with adapters,
      these include the gradients of the adapted kernels.
    backward_flops: FLOPs of the backward pass for a token. Elementwise
      operations, the optimizer's, and what `remat` computes again are not
      counted.
    step_flops: FLOPs of a step that do not grow with its tokens: the products
      of adapters' factors, and the gradients of these products.
  """

  trained_params: int
  optimizer_bytes: int
  gradient_bytes: int
  backward_flops: int
  step_flops: int


def training_cost(options: RunOptions, model: Model) -> TrainingCost:
  """Counts the cost of training what a run's options select.

  For each token the backward pass has two kinds of products with the gradients
  of kernels' outputs: with every kernel, which gives the gradients of inputs
  (also below the lowest layer that trains, as layers are scanned), and with the
  inputs of every kernel whose own gradient is needed.

  Args:
    options: The options of the run, with all sizes of the model filled in.
    model: Its model, of one stack of blocks.

  Raises:
    ValueError: The model has two stacks or none, or the options select a part
      that it lacks.
  """
  if (num_stacks := len(model.stacks.blocks)) != 1:
    raise InputError(
      f'{type(model).__name__} has {num_stacks} stacks of blocks; the backward '
      'pass is counted of models with one'
    )
  adapters, trained, optimizer = make_optimizer(options, model)
  shapes = adapters.trees.shapes
  state = jax.eval_shape(optimizer.init, shapes)
  trained_part, flat_shapes = flatten(trained.part(shapes)), flatten(shapes)
  leaves = {path: x for path, x in trained_part.items() if x is not None}
  means = 4 * sum(x.size for x in leaves.values())  # float32
  # Gradients of whole kernels are computed, and from them those of adapters.
  leaves |= {path: flat_shapes[path] for path in adapters.kernels}
  factors = sum(math.prod(x.shape) for x in adapters.kernels.values())
  return TrainingCost(
    trained_params=trained.count(trained.part(shapes)),
    optimizer_bytes=_bytes(state) + means * bool(options.optimizer.ema),
    gradient_bytes=_bytes(leaves),
    backward_flops=_backward_flops(model, options.data.seq_len, leaves),
    # A B, and the gradients of A and of B.
    step_flops=3 * 2 * adapters.options.rank * factors,
  )


def variants(options: RunOptions, model: Model):
  """Yields a name and run options for each row of `training_table`.

  All parameters train, or a sparse model's experts or all others, or LoRA's.
  """
  sparse = bool(model.stacks.sparse_layers)
  whole: Any = dict(trainable='all', trained_experts='', lora=LoraOptions())
  plain = dataclasses.replace(options, **whole)
  for name in ('all', *(('experts', 'non_experts') if sparse else ())):
    yield name, dataclasses.replace(plain, trainable=name)
  for roles in ('attention', 'attention + ' + ('experts' if sparse else 'ffn')):
    lora_options = LoraOptions(rank=16, parts=roles)
    name = f'LoRA of rank 16, {roles}'
    yield name, dataclasses.replace(plain, lora=lora_options)


def _backward_flops(model: Model, seq_len: int, paths: Container[Path]) -> int:
  """FLOPs of the backward pass for a token, with gradients of some parameters.

  `paths` has the paths of the parameters whose gradients are computed.
  """
  flops, parameters = count(model, seq_len).decoder, sized_parameters(model)
  trained, moe = [p for p in parameters if p.path in paths], model.stacks.moe
  total = 0
  for p in trained:
    if p.role.form == 'kernel':
      share = moe.num_selected / p.num_experts if p.of_expert and moe else 1.0
      total += round(2 * p.size * share)
  has_tables = any(p.role.role == 'embedding' for p in trained)
  is_tied = not any(p.role == Role('head', 'kernel') for p in parameters)
  if has_tables and is_tied:  # the table is the kernel of the logits, too
    total += 2 * model.vocab_size * model.embedding.width
  if has_tables or not all(p.outside_layers for p in trained):
    total += flops.total + flops.attention
  return total


def run_flops(options: RunOptions, model: Model) -> int:
  """FLOPs of all steps of a run, forward and backward.

  What `remat` computes again, the optimizer, evaluations and a teacher are left
  out. Unless the model is a decoder, backward counts as twice the forward pass.

  Args:
    options: The options of the run, with all sizes of the model filled in.
    model: Its model.
  """
  steps, rows = options.total_steps, options.total_steps * options.batch_size
  T, target_len = options.data.seq_len, options.data.target_len
  forward = count(model, T, target_len, options.batch_size).example_flops
  if len(model.stacks.blocks) != 1:
    return 3 * rows * forward
  training = training_cost(options, model)
  row_flops = forward + T * training.backward_flops
  return rows * row_flops + steps * training.step_flops


def least_step_seconds(options: RunOptions, model: Model, mesh: Mesh) -> float:
  """Seconds of a step at the peak speed that the devices' vendor prints.

  They are 0 where the vendor's number is not known. The options are those of
  the run with all sizes of the model filled in.
  """
  dtype = getattr(options.model, 'numerics', Numerics()).dtype
  rate = roofline.vendor_rate(dtype, list(mesh.devices.flat))
  return run_flops(options, model) / options.total_steps / rate if rate else 0.0


def run_line(options: RunOptions, model: Model, mesh: Mesh) -> str:
  """A line on a run's size, and on its time at the speed of matrix products.

  The speed is measured on this machine.

  Args:
    options: The options of the run, with all sizes of the model filled in.
    model: Its model.
    mesh: Its devices.
  """
  steps = options.total_steps
  per_step = options.batch_size * options.data.row_tokens
  cost = count(model, options.data.seq_len, options.data.target_len)
  line = (
    f'run: {steps:,} steps of {per_step:,} tokens, {short(steps * per_step)} '
    f'in all, with {short(cost.total_params)} parameters'
  )
  if cost.active_params < cost.total_params:
    line += f', {short(cost.active_params)} active per token'
  flops = run_flops(options, model)
  dtype = getattr(options.model, 'numerics', Numerics()).dtype
  rate, _ = roofline.product_rate(dtype)
  rate *= roofline.num_processors(list(mesh.devices.flat))
  delta = datetime.timedelta(seconds=math.ceil(flops / rate))
  return (
    f'{line}; {short(flops)} FLOPs take {delta} at the speed of a large matrix '
    f'product here and now, {short(rate)} a second; a small model often takes '
    'several times that, and compiling and evaluations come on top'
  )


class RunBytes(NamedTuple):
  """Bytes that a run takes on each device, and the bytes of a checkpoint.

  Attributes:
    parameters: Bytes of the parameters on a device.
    merged: Bytes of the sums of kernels and adapters, on a device, with which
      the model computes; kernels without adapters are not copied.
    optimizer: Bytes of the optimizer's state on a device.
    gradients: Bytes of the gradients that a step computes, on a device: those
      of trained parameters and of `merged`.
    activations: Bytes that the forward pass of a microbatch leaves for the
      backward pass, by formula; 0 where they are not counted.
    evaluation: Bytes on a device in the evaluation that needs most: parameters,
      the optimizer's state, and activations of a microbatch, by formula.
    checkpoint: Bytes of a checkpoint, of all devices together.
  """

  parameters: int
  merged: int
  optimizer: int
  gradients: int
  activations: int
  evaluation: int
  checkpoint: int

  @property
  def step(self) -> int:
    """Bytes on a device in a training step: the first five fields together."""
    return sum(self[:5])

  @property
  def total(self) -> int:
    """Bytes on a device in a step or an evaluation, whichever needs more."""
    return max(self.step, self.evaluation)

  def describe(self) -> str:
    """A line of text on the bytes that each device holds."""
    names = ('parameters', 'kernels with merged adapters', 'optimizer state')
    names += ('gradients', 'activations')
    phrases = [f'{in_bytes(n)} of {name}' for name, n in zip(names, self) if n]
    line = f'{", ".join(phrases)}: about {in_bytes(self.step)} on each device'
    if self.evaluation:
      line += f', {in_bytes(self.evaluation)} in the largest evaluation'
    return line


def run_bytes(
  options: RunOptions, model: Model, programs: Programs, mesh: Mesh
) -> RunBytes:
  """Counts the bytes that a run takes on each device, and in a checkpoint.

  Args:
    options: The options of the run, with all sizes of the model filled in.
    model: Its model.
    programs: Its programs, whose shardings say what a device holds.
    mesh: The mesh of devices.
  """
  state = programs.abstract_state
  activations = evaluation = 0
  merged = sharded.merged_bytes(programs)
  if model.stacks.blocks:
    num_parts = partitioning.row_parts(mesh, options.sharding.rules)
    rows = -(-options.shape().rows // num_parts)
    lengths = options.data.seq_len, options.data.target_len
    activations = sum(memory.activations(model, rows, *lengths))
    entry_models = {
      entry.overridden(options.model).build(options.sharding.rules)
      for entry in options.evals.values()
    }
    if entry_models:
      evaluation = sharded.held_by_evaluations(programs) + max(
        memory.evaluation(changed, rows, *lengths) for changed in entry_models
      )
  return RunBytes(
    parameters=sharded.device_bytes(state.params),
    merged=merged,
    optimizer=sharded.device_bytes(kept_by_optimizer(state)),
    gradients=merged
    + sharded.device_bytes(programs.trained.part(state.params)),
    activations=activations,
    evaluation=evaluation,
    checkpoint=_bytes(state),
  )


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; errors are reported in a few lines."""
  parser = cli.parser('moe_jax.analysis.cost', __doc__)
  cli.add_config(parser)
  parser.set_defaults(run=run)
  add = parser.add_argument
  text = 'number of rows; default: a microbatch in training, one in generation'
  add('--batch', type=cli.POSITIVE, help=text)
  text = "devices that the experts are split over; 0 takes the mesh's"
  add('--expert_parallel', type=cli.NOT_NEGATIVE, default=0, help=text)
  cli.run_command(*cli.parse_command(parser, argv))


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
  """Prints the cost of the model of the command line's config."""
  options, ignored = run_config.options_of(arguments.config, overrides)
  cli.say(ignored)
  options = with_own_vocabulary(options)
  model = options.build()
  lengths = options.data.seq_len, options.data.target_len
  num_parts = arguments.expert_parallel or max(options.mesh.expert, 1)
  rows = arguments.batch or options.shape().rows
  work = Workload(rows, *lengths, num_parts, arguments.batch or 1)
  console = wide_console()
  console.print(cost_table(model, work))
  if len(model.stacks.blocks) == 1:
    training_table(options, model).show(console)


if __name__ == '__main__':
  main()
