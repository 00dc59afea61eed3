"""A teacher's largest logits on disk, and runs that learn from them."""

import dataclasses
import shutil

import numpy as np
import pytest

from moe_jax import run_config
from moe_jax.compression import teacher_logits
from moe_jax.compression.distill import Teacher
from moe_jax.config import read_options
from moe_jax.data import DataOptions
from tests.compression.test_distill import MIX, config_of, start_run
from tests.training import tiny

STEPS = 6


def write(teacher, output, data=None, **changes):
  data = tiny.config(data=data or {}).data
  numbers = dict(seed=0, batch_size=4, batches=STEPS, top=257) | changes
  options = read_options(DataOptions, data, 'data.')
  return teacher_logits.write(teacher, output, options, **numbers)


@pytest.fixture(scope='module')
def all_logits(teacher, tmp_path_factory):
  """All 257 logits of six batches."""
  return write(teacher, tmp_path_factory.mktemp('kept') / 'whole')


def config_with_logits(teacher, logits, **overrides):
  options = {**MIX, 'logits': str(logits.folder)}
  return config_of(teacher, distil=options, **overrides)


@pytest.mark.slow
def test_all_logits_from_disk_are_those_beside(teacher, all_logits, tmp_path):
  config = config_with_logits(teacher, all_logits)
  run, state, _ = start_run(config, tmp_path / 'run')
  config = config_of(teacher, distil=MIX)
  beside, beside_state, _ = start_run(config, tmp_path / 'beside')
  batches = run.batches(0)
  for _ in range(STEPS):  # the reader counts the steps
    batch = next(batches)
    beside_state, expected = beside.train_step(beside_state, batch)
    state, step = run.train_step(state, batch)
    # Stored logits have 11 bits.
    np.testing.assert_allclose(step.loss, expected.loss, rtol=1e-4)
  assert all_logits.left_out_max < 1e-5


def test_the_largest_are_kept_and_the_rest_is_told(
  teacher, tmp_path, all_logits
):
  largest = write(teacher, tmp_path / 'some', top=3, batches=1)
  batch, largest_batch = all_logits.rows[:4], largest.rows
  np.testing.assert_array_equal(
    largest_batch['teacher_ids'], batch['teacher_ids'][..., :3]
  )
  probs = np.exp(batch['teacher_log_probs'].astype(np.float64))
  np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-3)
  _, _, first = start_run(config_of(teacher), tmp_path / 'run')
  is_real = np.asarray(first['loss_weights']) != 0
  left_out = 1 - probs[..., :3].sum(-1)[is_real]
  np.testing.assert_allclose(largest.left_out_mean, left_out.mean(), rtol=1e-3)
  np.testing.assert_allclose(largest.left_out_max, left_out.max(), rtol=1e-3)


def test_what_a_killed_command_left_is_written_anew(
  teacher, all_logits, tmp_path
):
  folder = tmp_path / 'kept'
  folder.mkdir()
  (folder / 'rows.npy').write_bytes(b'x')
  with pytest.raises(ValueError, match='has no finished logits'):
    teacher_logits.read(folder)
  finished = write(teacher, folder)
  assert finished == teacher_logits.read(folder)
  assert finished.rows_sha256 == all_logits.rows_sha256
  with pytest.raises(ValueError, match=r"has 'manifest.json'; give a new fol"):
    write(teacher, folder)


def test_other_runs_and_damage_are_refused(teacher, all_logits, tmp_path):
  cases = {
    'seed: 0 there, 1 here': {'seed': 1},
    '24 rows there, 28 here': {'total_steps': 7},
  }
  stored_logits = teacher_logits.read(all_logits.folder)

  def changed(run, **changes):
    config = config_with_logits(teacher, all_logits, **changes)
    options = run_config.read(config).filled(257)
    return dataclasses.replace(run, options=options)

  config = config_with_logits(teacher, all_logits)
  run, _, _ = start_run(config, tmp_path / 'run')
  for message, changes in cases.items():
    run = changed(run, **changes)
    options = run.options
    with pytest.raises(ValueError, match=message):
      taught = Teacher(run, options.distill)
      stored_logits.check(run, taught.step, taught.digest)
  shutil.copytree(all_logits.folder, tmp_path / 'damaged')
  damaged = teacher_logits.read(tmp_path / 'damaged')
  damaged.path.write_bytes(damaged.path.read_bytes()[:-1] + b'x')
  run = changed(run)
  stored_logits.check(run, taught.step, taught.digest)
  with pytest.raises(ValueError, match='damaged: its sha256 is not the man'):
    damaged.check(run, taught.step, taught.digest)


def test_other_weights_of_a_mixture_are_noticed(teacher, tmp_path):
  def mixture(weights):
    sources = {
      name: {'kind': 'python_stdlib', 'modules': name}
      for name in ('asyncio', 'email')
    }
    values = dict(sources=sources, rule='given', weights=weights, period=20)
    return {'source': {'python_stdlib': {'modules': ''}}, 'mixture': values}

  # The first batch of four rows has four of asyncio either way.
  weights, other_weights = ({'asyncio': n, 'email': 1.0} for n in (9.0, 19.0))
  stored_logits = write(teacher, tmp_path / 'kept', mixture(weights), top=4)
  config = config_with_logits(
    teacher, stored_logits, data=mixture(other_weights)
  )
  run, state, batch = start_run(config, tmp_path / 'run')
  with pytest.raises(ValueError, match=f'batch {STEPS - 1} has other targets'):
    run.train_step(state, batch)


def test_a_changed_batch_size_leaves_each_row_its_logits(
  teacher, all_logits, tmp_path
):
  # One step of four rows, then three of two.
  changes = dict(batch_size=2, total_steps=4)
  config = config_with_logits(teacher, all_logits, **changes)
  run, state, _ = start_run(config, tmp_path / 'run')
  run = dataclasses.replace(run, row_offset=4 - 2)
  arrays_of = all_logits.reader(run)
  state = state.replace(step=state.step + 1)
  kept = all_logits.rows
  kept_digests = kept['targets'].tolist()
  for batch, _ in zip(run.batches(1), range(3)):
    digests = teacher_logits.row_digests(batch['targets']).tolist()
    rows = [kept_digests.index(digest) for digest in digests]
    for name, values in arrays_of(state).items():
      np.testing.assert_array_equal(values, kept[name][rows])
