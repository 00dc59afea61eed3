"""Every task of studies loads, and its label is right."""

import pytest

from experiments.study.jobs import layered
from experiments.study.tasks import PREFIX_TASKS, TASKS
from moe_jax import data
from moe_jax.config import read_options
from moe_jax.configs import base
from moe_jax.run_config import RunConfig

ALL = [*TASKS.items(), *PREFIX_TASKS.items()]


@pytest.mark.parametrize(
  ('name', 'task'),
  [
    pytest.param(
      name,
      task,
      marks=pytest.mark.slow if name in ('cipher', 'text') else (),
    )
    for name, task in ALL
  ],
)
def test_a_task_loads_and_says_what_it_is(name, task):
  config = layered(RunConfig, base.get_config(), {'data.seq_len': 64})
  config = layered(RunConfig, config, task.overrides)
  options = read_options(data.DataOptions, config.data, 'data.')
  dataset = data.load(options)
  synthetic = name != 'text'
  assert dataset.source.startswith('synthetic: ') == synthetic
  assert task.label.startswith('synthetic: ') == synthetic
  # An epoch has more rows than a short run sees, so that none is repeated.
  assert len(dataset.splits['train']) > 200
