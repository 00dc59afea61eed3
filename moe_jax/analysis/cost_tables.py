"""Tables of a model's cost: parameters and FLOPs, bytes, devices with room."""

import dataclasses
from collections.abc import Iterator, Sequence

from rich.table import Table

from moe_jax.analysis import devices, memory
from moe_jax.analysis.counts import Cost, count, short
from moe_jax.analysis.model_parts import Half, halves, sized_parameters
from moe_jax.analysis.training_cost import training_cost, variants
from moe_jax.errors import InputError
from moe_jax.layers.experts import DISPATCHES
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.memory_room import in_bytes
from moe_jax.models import Model
from moe_jax.training.run_options import RunOptions


@dataclasses.dataclass(frozen=True)
class Workload:
  """The sizes of the batch that costs are counted for.

  Attributes:
    batch_size: Number of rows in the batch.
    seq_len: Number of tokens of a row; of an encoder-decoder, of the encoder's
      row.
    target_len: Number of tokens of a decoder's row in an encoder-decoder; 0
      stands for `seq_len`.
    num_parts: Number of devices that the experts are split over.
  """

  batch_size: int
  seq_len: int
  target_len: int = 0
  num_parts: int = 1

  def __post_init__(self):
    """Raises ValueError where a number is below 1."""
    for name in ('batch_size', 'seq_len', 'num_parts'):
      if getattr(self, name) < 1:
        raise InputError(f'{name}={getattr(self, name)} must be at least 1')


def compute_table(model: Model, work: Workload) -> Table:
  """The table of the parameters and the FLOPs of a model."""
  c = count(model, work.seq_len, work.target_len, work.batch_size)
  rows = (
    f' Experts multiply {c.capacity_slack:.2f} rows for each choice of an '
    'expert; rows without a token are not counted.'
  )
  table = Table(
    title=f'{short(c.total_params)} parameters in memory, '
    f'{short(c.active_params)} in compute per token',
    caption=f'A multiply-add counts as two FLOPs.{_attention(model, c)}'
    + rows * (c.expert_params > 0)
    + _as_in_2017(model, work.seq_len),
  )
  for heading in ('Parameters', 'FLOPs'):
    table.add_column(heading)
    table.add_column('', justify='right')
  read, written = 'prefill, per token read', 'decoding, per token generated'
  if c.encoder:
    read, written = 'encoder, per token read', 'decoder, per token generated'
  params = (
    ('all experts', c.expert_params),
    ('all but the experts', c.total_params - c.expert_params),
    ('embedding tables among those', c.embedding_params),
    ('used for one token', c.active_params),
  )
  flops = (
    ('training, per token', c.training_flops),
    (read, c.prefill_flops),
    (written, c.decode_flops),
    ('forward pass, per example', c.example_flops),
  )
  for (part, n), (phase, m) in zip(params, flops, strict=True):
    table.add_row(part, short(n), phase, short(m))
  return table


def without_vocabulary(model: Model, seq_len: int) -> tuple[int, int]:
  """Multiply-adds for a token, and parameters, without embedding and softmax.

  Table 7 of Shazeer et al. 2017 (arXiv:1701.06538) counts them so.
  """
  logits = 2 * model.vocab_size * model.embedding.width
  layers = sum(p.size for p in sized_parameters(model) if not p.outside_layers)
  return (count(model, seq_len).decoder.total - logits) // 2, layers


def _attention(model: Model, c: Cost) -> str:
  """The sentence on the number of tokens over which attention is counted."""
  if not model.stacks:
    return ''
  if not c.encoder:
    return f' Attention is counted in full, over {c.decoder_len} tokens.'
  return (
    f' Attention is counted in full, over {c.encoder_len} tokens read and '
    f'{c.decoder_len} written; FLOPs of training are their mean.'
  )


def _as_in_2017(model: Model, seq_len: int) -> str:
  """The sentences on a model of LSTMs (2017), which has no attention."""
  if model.stacks:
    return ''
  multiply_adds, params = without_vocabulary(model, seq_len)
  return (
    f' Without embedding and softmax a token takes {multiply_adds / 1e6:,.1f}M '
    f'multiply-adds, and there are {params / 1e6:,.1f}M parameters. Memory is '
    'counted of models of blocks alone.'
  )


def memory_table(model: Model, work: Workload) -> Table:
  """The table of bytes of activations, expert rows and exchanges of a batch."""
  lengths = f'{work.seq_len}'
  stacks = halves(model, work.seq_len, work.target_len)
  if len(stacks) == 2:
    lengths += f' and {stacks[-1].length}'
  table = Table(
    title=f'Bytes of a training step on a batch of {work.batch_size} x '
    f'{lengths} tokens, activations in {stacks[-1].stack.block.shared.dtype}',
    caption='Kept bytes are what the forward pass leaves for the backward '
    'pass. Weights, gradients, the state of the optimizer and temporary arrays '
    'of the compiled program come on top.',
  )
  table.add_column('Arrays')
  table.add_column('Bytes', justify='right')
  sizes = memory.activations(
    model, work.batch_size, work.seq_len, work.target_len
  )
  remat = stacks[-1].stack.remat
  table.add_row(
    f'kept by all layers, without attention scores (remat={remat!r})',
    in_bytes(sizes.layers),
  )
  table.add_row(
    'kept attention scores, unless attention is fused', in_bytes(sizes.scores)
  )
  table.add_row('kept output logits, in float32', in_bytes(sizes.logits))
  for half in stacks:
    if half.moe is not None:
      for name, value in _expert_cells(half, half.moe, model, work):
        table.add_row(name, value)
  return table


def _expert_cells(
  half: Half, moe: MoeOptions, model: Model, work: Workload
) -> Iterator[tuple[str, str]]:
  """The arrays that the sparse layers of a stack need, and their bytes."""
  B, width = work.batch_size, model.embedding.width
  rows = memory.expert_rows(moe, B, half.length)
  stack = '/'.join(half.path)
  stack = f'{stack}: ' if stack else ''
  dispatch = DISPATCHES.name_of(moe.dispatch)
  yield (
    f'{stack}rows to and from the experts of a sparse layer '
    f'({dispatch}, {rows} rows)',
    in_bytes(memory.dispatch_bytes(half, width, B)),
  )
  sent_bytes = memory.all_to_all_bytes(half, width, B, work.num_parts)
  if sent_bytes:
    num_exchanges = 4 * half.num_sparse
    yield (
      f'{stack}one all-to-all, as each of {work.num_parts} devices sends it',
      in_bytes(sent_bytes),
    )
    yield (
      f'{stack}the {num_exchanges} all-to-alls of a training step',
      in_bytes(num_exchanges * sent_bytes),
    )


def training_table(options: RunOptions, model: Model) -> Table:
  """The table of the cost of training all of a model or parts of it.

  Args:
    options: The options of the run, after `filled`.
    model: Its model, of one stack of blocks.
  """
  forward = count(model, options.data.seq_len).forward_flops
  table = Table(
    title=f'Training of parts, with the forward pass at {short(forward)} FLOPs '
    'per token',
    caption='Bytes are those of the state of the optimizer and of the '
    'gradients; FLOPs a token are those of the backward pass. Adapters are '
    'added to whole kernels before a step computes, so the gradients of these '
    'kernels are computed and held for a while; FLOPs of their factors, in the '
    'last column, do not grow with the batch.',
  )
  table.add_column('Trains')
  for heading in (
    'parameters',
    'optimizer',
    'gradients',
    'FLOPs\na token',
    'FLOPs\na step',
  ):
    table.add_column(heading, justify='right', no_wrap=True)
  for name, variant in variants(options, model):
    c = training_cost(variant, model)
    table.add_row(
      name,
      short(c.trained_params),
      in_bytes(c.optimizer_bytes),
      in_bytes(c.gradient_bytes),
      short(c.backward_flops),
      short(c.step_flops),
    )
  return table


def fit_table(
  model: Model, work: Workload, names: Sequence[str] = devices.NAMES
) -> Table:
  """The table of bytes of weights and cache, and of devices with room for them.

  Args:
    model: A model of blocks.
    work: Sizes of the batch that is generated.
    names: Names of devices, of `devices.NAMES`.
  """
  table = Table(
    title=f'Memory to generate {work.batch_size} x '
    f'{work.target_len or work.seq_len} tokens, by type of the weights',
    caption='Weights and a full cache are compared with all of the memory that '
    'the vendor of a device names. Where they do not fit, the number of '
    'devices that they take is given. int8 takes one byte for each weight.',
  )
  table.add_column('')
  for dtype in memory.DTYPES:
    table.add_column(dtype, justify='right')
  lengths = work.seq_len, work.target_len
  weights = {
    dtype: memory.weight_bytes(model, dtype) for dtype in memory.DTYPES
  }
  totals = {
    dtype: memory.serving_bytes(model, dtype, work.batch_size, *lengths)
    for dtype in memory.DTYPES
  }
  table.add_row('weights', *map(in_bytes, weights.values()))
  table.add_row(
    'cache', *(in_bytes(totals[dtype] - weights[dtype]) for dtype in totals)
  )
  expanded = {
    dtype: memory.serving_bytes(model, dtype, work.batch_size, *lengths, True)
    for dtype in memory.DTYPES
  }
  if expanded != totals:
    table.add_row(
      'cache of keys and values of all heads, uncompressed',
      *(in_bytes(expanded[dtype] - weights[dtype]) for dtype in expanded),
    )
  for name in names:
    device = devices.get(name)
    table.add_row(
      f'{device.name}, {in_bytes(device.num_bytes)}',
      *(_fits(total, device) for total in totals.values()),
    )
  return table


def _fits(num_bytes: int, device: devices.Device) -> str:
  """The cell that says whether so many bytes fit into a device."""
  if not device.num_bytes:
    return 'unknown'
  if num_bytes <= device.num_bytes:
    share = num_bytes / device.num_bytes
    return f'fits ({share:.0%})' if share >= 0.005 else 'fits (<1%)'
  return f'needs {-(-num_bytes // device.num_bytes)}'
