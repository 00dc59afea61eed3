"""Evaluations that ask a model something, by name, for `config.evals`.

`generate` scores its outputs (BLEU, chrF, ROUGE-L, exact match), `choice` takes
the likeliest of several answers, `classify` the likeliest class of an example
that is no text. `moe_jax.main` hands them to the training loop; a trained or
imported run is evaluated by

    from configs import base
    from moe_jax import evaluation

    evaluation.evaluate('runs/tiny_seq2seq', base.choice_evaluation())

Not here: the loss (`moe_jax.training.evaluate`).
"""

import os
import pathlib
from collections.abc import Mapping

import jax
import ml_collections
from jax.sharding import Mesh

from moe_jax import data, generation, partitioning
from moe_jax.config import merge, to_dataclass
from moe_jax.distributed import Placing
from moe_jax.evaluation import choice, classify, generated_text
from moe_jax.training.evaluate import (
  Kind,
  Row,
  check_entries,
  make_evaluations,
)

__all__ = ['KINDS', 'evaluate']

KINDS: Mapping[str, Kind] = {
  'choice': choice.make,
  'classify': classify.make,
  'generate': generated_text.make,
}
_NAME = 'evaluate'  # of the entry, and of the file of its examples


def evaluate(
  workdir: str | os.PathLike[str],
  entry: ml_collections.ConfigDict,
  *,
  step: int | None = None,
  dtype: str = '',
  mesh: Mesh | None = None,
) -> Row:
  """What an entry of `config.evals` of any kind finds in a run's folder.

  Parameters alone are read.

  Args:
    workdir: The run's folder.
    entry: As `configs.base` makes it; its period counts for nothing.
    step: The checkpoint; None: the newest good one.
    dtype: 'bfloat16', say; see `generation.load`.
    mesh: Where the parameters are; None: the first local device.

  Raises:
    ValueError: As `generation.load`, or the entry is bad.
    CheckpointError: No checkpoint is good.
  """
  loaded = generation.load(workdir, step, dtype=dtype, mesh=mesh)
  config = merge(loaded.config, {}).unlock()
  config.evals = {_NAME: entry}
  check_entries(config, KINDS)
  (evaluation,) = make_evaluations(
    config.lock(),
    loaded.model,
    dataset=data.load(to_dataclass(data.DataConfig, config.data)),
    workdir=pathlib.Path(workdir).expanduser(),
    put=Placing(_rows(config, mesh), config.batch_size),
    kinds=KINDS,
  )
  return evaluation.measure(loaded.variables, loaded.step)


def _rows(
  config: ml_collections.ConfigDict, mesh: Mesh | None
) -> jax.sharding.Sharding:
  """Where a batch goes."""
  if mesh is None:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  rules = partitioning.make_rules(config.sharding.to_dict())
  shape = (config.batch_size, config.data.seq_len)
  return partitioning.sharding(mesh, rules, ('batch', None), shape, 'a batch')
