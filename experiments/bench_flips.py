"""Which choices of experts does bfloat16 flip, and does each flip have a cause?

    python -m experiments.bench_flips

Random models of two families choose experts in bfloat16 and in float32, for the
same random tokens and parameters. `moe_jax.analysis.flips` compares the choices
of each layer, first where both passes take their own, then where the choices of
bfloat16 are imposed on float32. Writes counts of tokens of layers, by outcome,
to `results/bench_flips/<device>`.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from experiments.benchmarks import timing
from moe_jax import cli, interop, models
from moe_jax.analysis import flips, recording, replay
from moe_jax.analysis.traces import Record
from moe_jax.interop import config_keys
from moe_jax.models import recorded

NAME, FAMILIES, SHAPE = 'bench_flips', ('olmoe', 'qwen3_moe'), (2, 256)
# Keys of config.json. A family does not read those that others have.
SIZES = dict(
  vocab_size=503, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
  num_key_value_heads=2, head_dim=24, intermediate_size=40,
  moe_intermediate_size=40, num_experts=16, num_experts_per_tok=4,
)  # fmt: skip


def model_of(family: str, dtype: str) -> models.Model:
  """A model that computes in a type; routers compute in float32."""
  family_of = interop.ARCHITECTURES[family]
  values, *_ = config_keys.read(family_of.keys, SIZES)
  options: Any = family_of.options(values)
  numerics = dataclasses.replace(options.numerics, dtype=dtype)
  return dataclasses.replace(options, numerics=numerics).build()


def record_of(model: models.Model, params: Any, batch: Any) -> Record:
  """The choices and logits of a batch."""

  @jax.jit
  def choices(params, inputs):
    inputs = dict(inputs, logits=True, dtype='float32')
    return recorded.recording(model, {'params': params}, **inputs)[1]

  layers = jax.device_get(choices(params, model.inputs(batch)))
  return next(recording.records_of(model, 'test', 0, 0, batch, layers))


def measure(family: str) -> Iterator[dict[str, Any]]:
  """Yields counts by outcome, for own choices and for imposed ones."""
  coarse, fine = (model_of(family, dtype) for dtype in ('bfloat16', 'float32'))
  params = nn.meta.unbox(models.init_params(fine, jax.random.key(0)))
  tokens = np.random.default_rng(0).integers(0, 503, SHAPE, np.int32)
  positions = np.tile(np.arange(SHAPE[1], dtype=np.int32), (SHAPE[0], 1))
  batch = dict(tokens=tokens, positions=positions, segment_ids=tokens * 0 + 1)
  theirs = record_of(coarse, params, batch)
  for imposed in (False, True):
    ours = replay.imposed(fine, batch, *[theirs] * imposed)
    record = record_of(fine, params, ours)
    layers = flips.compare(theirs, record, 'bfloat16', imposed)
    counts = sum((Counter(x.counts) for x in layers.values()), Counter())
    totals = {name: counts[name] for name in flips.COUNTS}
    yield {'family': family, 'imposed': imposed, **totals}


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Compares both families; writes the table."""
  options = timing.parser(NAME, __doc__, peaks=False).parse_args(argv)
  rows = [row for family in FAMILIES for row in measure(family)]
  table = timing.table(rows, {name: f'{{{name}}}' for name in rows[0]})
  text = f'# Flips of bfloat16 against float32\n\n{timing.machine()}\n\n{table}'
  timing.write(options.output, NAME, text, rows, {'sizes': SIZES})


if __name__ == '__main__':
  main()
