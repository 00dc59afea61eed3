"""The setting of evaluations, on one device. This module has no tests."""

import jax

from moe_jax import data
from moe_jax.devices import Placing
from moe_jax.training.evaluate import Setting


def placing(batch_size, **options):
  """Moves batches to the first device."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return Placing(sharding, batch_size, **options)


def setting(run, folder, **changes):
  """The setting of a run's evaluations, changed by `changes`."""
  fields = dict(
    model=run.build(),
    dataset=data.load(run.data),
    data=run.data,
    workdir=folder,
    put=placing(run.batch_size),
  )
  return Setting(**{**fields, **changes})
