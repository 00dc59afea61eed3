"""Every task of studies loads, and its label is right."""

import pytest

from experiments.study.jobs import layered
from experiments.study.tasks import PREFIX_TASKS, TASKS
from moe_jax import data
from moe_jax.config import read_options
from moe_jax.configs import base
from moe_jax.run_config import RunConfig


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=[pytest.mark.slow] * (n in ('cipher', 'text')))
    for n in (*TASKS, *PREFIX_TASKS)
  ],
)
def test_a_task_loads_and_says_what_it_is(name):
  task = {**TASKS, **PREFIX_TASKS}[name]
  config = layered(RunConfig, base.get_config(), {'data.seq_len': 64})
  config = layered(RunConfig, config, task.overrides)
  dataset = data.load(read_options(data.DataOptions, config.data, 'data.'))
  synthetic = name != 'text'
  assert dataset.source.startswith('synthetic: ') == synthetic
  assert task.label.startswith('synthetic: ') == synthetic
  # An epoch has more rows than a short run sees, so that none is repeated.
  assert len(dataset.splits['train']) > 200
