"""What studies can train on: every task loads, and is labelled as it is."""

import pytest

from configs import base
from experiments.tasks import task
from moe_jax.config import merge, to_dataclass
from moe_jax.data import DataConfig, load


def nested(flat):
  """{'data.source': x} as {'data': {'source': x}}."""
  found = {}
  for name, value in flat.items():
    *sections, key = name.split('.')
    at = found
    for section in sections:
      at = at.setdefault(section, {})
    at[key] = value
  return found


@pytest.mark.parametrize('name', ['cipher', 'kv_recall', 'text'])
def test_a_task_loads_and_says_what_it_is(name):
  chosen = task(name)
  config = merge(base.get_config(), nested(chosen.overrides))
  config = merge(config, {'data': {'seq_len': 64}})
  dataset = load(to_dataclass(DataConfig, config.data))
  synthetic = name != 'text'
  assert dataset.source.startswith('synthetic: ') == synthetic
  assert chosen.label.startswith('synthetic: ') == synthetic
  # All of an epoch is more than a short run sees, or is to be seen again.
  assert len(dataset.splits['train']) > 300


def test_an_unknown_task_names_those_there_are():
  message = r"'cypher'; did you mean 'cipher'.*\['cipher', 'kv_recall', 'text'"
  with pytest.raises(ValueError, match=message):
    task('cypher')
