"""One process of several: its flags, and its rows of a batch."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import partitioning
from moe_jax.config import OptionError
from moe_jax.devices import Placing, Timeouts, connect, fetch

TIMEOUTS = Timeouts()


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (('h:1', None, None), '--coordinator=h:1 without --num_processes and --pr'),
    ((None, 2, 0), 'without --coordinator: give all three'),
    (('h:1', 2, None), 'without --process_id'),
    (('h:1', 2, 2), r'--process_id=2 not in \[0, num_processes=2\)'),
    (('h:1', 2, -1), '--process_id=-1'),
    (('h:1', 0, 0), '--num_processes=0'),
    (('h', 2, 0), "--coordinator='h' is not host:port"),
    (('h:x', 2, 0), "--coordinator='h:x'"),
    ((':80', 2, 0), "--coordinator=':80'"),
    (('h:99999', 2, 0), "--coordinator='h:99999'"),
  ],
)
def test_flags_that_do_not_fit_together(given, message):
  with pytest.raises(ValueError, match=message):
    connect(TIMEOUTS, *given)


def test_one_process_connects_to_nothing(monkeypatch):
  for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
    monkeypatch.delenv(name, raising=False)
  assert not connect(TIMEOUTS)
  assert not connect(TIMEOUTS, '192.0.2.1:1', 1, 0)
  assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('heartbeat_timeout_seconds', 0),
    ('initialization_timeout_seconds', -1),
    ('stall_timeout_seconds', -1),
  ],
)
def test_timeouts_out_of_range(name, value):
  with pytest.raises(OptionError, match=f'^{name}={value} must be at least'):
    Timeouts(**{name: value})


@pytest.mark.parametrize('spec', [('data', 'expert'), ('tensor',), ()])
def test_a_batch_is_placed_as_it_is(spec):
  mesh = partitioning.make_mesh({'data': 2, 'expert': 2, 'tensor': 2})
  sharding = NamedSharding(mesh, PartitionSpec(spec))
  placing = Placing(sharding, 8)
  batch = {
    'tokens': np.arange(24).reshape(8, 3),
    'weights': np.arange(16.0, dtype=np.float32).reshape(8, 2),
  }
  np.testing.assert_array_equal(placing.rows, np.arange(8))
  for placed_batch in (placing(batch), placing.local(batch)):
    for name, values in batch.items():
      assert placed_batch[name].sharding.is_equivalent_to(sharding, 2)
      np.testing.assert_array_equal(placed_batch[name], values)
  np.testing.assert_array_equal(
    fetch(placing(batch))['tokens'], batch['tokens']
  )
