"""The setting of evaluations, on one device. This module has no tests."""

import dataclasses

import jax

from moe_jax import data
from moe_jax.devices import Placing
from moe_jax.training.evaluate import Setting, make_evaluations


def placing(batch_size, **options):
  """Moves batches to the first device."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return Placing(sharding, batch_size, **options)


def setting(run, folder, **changes):
  """The setting of a run's evaluations, changed by `changes`."""
  model, put = run.build(), placing(run.batch_size)
  plain = Setting(model, data.load(run.data), run.data, folder, put)
  return dataclasses.replace(plain, **changes)


def measure_of(name, entry, run, folder, **changes):
  """The function that measures a run's only evaluation."""
  its_setting = setting(run, folder, **changes)
  (evaluation,) = make_evaluations(
    {name: entry}, run.model, run.sharding.rules, its_setting
  )
  return evaluation.measure
