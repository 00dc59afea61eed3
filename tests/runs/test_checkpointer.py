"""Checkpoints return bit for bit on any mesh, and only good ones do."""

import logging
import shutil

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moe_jax.runs import manifest
from moe_jax.runs.checkpointer import Checkpointer, CheckpointError
from moe_jax.runs.manifest import BadCheckpoint, Manifest
from moe_jax.runs.retention import CheckpointOptions


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  router_state: list


def make_state(seed: int = 0) -> State:
  key = jax.random.key(seed)
  params = {
    'experts': jax.random.normal(key, (8, 3, 5)),
    'embed': jax.random.normal(key, (16, 3), jnp.bfloat16),
  }
  return State(
    step=jnp.int32(seed),
    params=params,
    opt_state=optax.adamw(1e-3).init(params),
    router_state=[jax.random.normal(key, (8,)).at[0].set(-0.0)],
  )


def abstract(state, sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )


ABSTRACT = abstract(make_state())


def assert_same_bits(state, expected):
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_all(directory, steps, **options):
  """Saves `make_state(step)` for each of `steps`, one after the other."""
  with Checkpointer(directory, CheckpointOptions(**options)) as checkpointer:
    for step in steps:
      checkpointer.save(step, make_state(step), extra={'next_batch': step})
  return sorted(path.name for path in directory.iterdir())


def restore(directory, **kwargs):
  with Checkpointer(directory) as checkpointer:
    return checkpointer.restore(ABSTRACT, **kwargs)


def array_file(directory, step):
  """The largest file of a checkpoint, which has its arrays."""
  files = (directory / str(step)).rglob('*')
  return max(
    (path for path in files if path.is_file() and path.suffix != '.json'),
    key=lambda path: path.stat().st_size,
  )


def flip_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(bytes(data))


DAMAGE = {
  'altered': lambda d, step: flip_bit(array_file(d, step)),
  'bytes, not': lambda d, step: array_file(d, step).write_bytes(b'cut'),
  'missing': lambda d, step: array_file(d, step).unlink(),
  'no manifest': lambda d, step: (d / f'{step}' / 'manifest.json').unlink(),
  'manifest unreadable': lambda d, step: (
    d / f'{step}' / 'manifest.json'
  ).write_text('{'),
  'manifest is of step 1': lambda d, step: (
    shutil.rmtree(d / f'{step}'),
    shutil.copytree(d / '1', d / f'{step}'),
  ),
}


def test_every_kind_of_node_comes_back_bit_for_bit(tmp_path):
  state, extra = make_state(5), {'next_batch': 123, 'config_digest': 'a1'}
  with Checkpointer(tmp_path / 'new' / 'folder') as checkpointer:
    assert checkpointer.restore(ABSTRACT) is None
    checkpointer.save(5, state, extra=extra)
    restored = checkpointer.restore(ABSTRACT)  # waits for the pending save
  assert_same_bits(restored.state, state)
  assert restored[1:] == (extra, 5, [])


def test_donated_buffers_and_what_follows_are_not_saved(tmp_path):
  # If the arrays were not copied, the save would see those of later steps.
  step = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0
  )
  state = {'w': jnp.arange(300_000, dtype=jnp.float32)}
  saved = np.array(state['w'])
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state)
    for _ in range(5):
      state = step(state)
    jax.block_until_ready(state)
    restored = checkpointer.restore(abstract(state))
  np.testing.assert_array_equal(restored.state['w'], saved)
  # A restored state can be donated too.
  np.testing.assert_array_equal(step(restored.state)['w'], saved * 3 + 1)


def test_any_mesh_reads_what_one_device_wrote_and_back(tmp_path):
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('expert', 'data'))
  state = {'w': jax.random.normal(jax.random.key(1), (8, 6, 5))}
  shardings = [
    NamedSharding(mesh, P('expert', 'data')),
    NamedSharding(mesh, P(('data', 'expert'))),
    NamedSharding(mesh, P()),
    SingleDeviceSharding(jax.devices()[3]),
  ]
  expected = np.asarray(state['w'])
  for step, sharding in enumerate(shardings):
    with Checkpointer(tmp_path) as checkpointer:
      checkpointer.save(step, state)
      state = checkpointer.restore(abstract(state, sharding)).state
    assert state['w'].sharding == sharding
    np.testing.assert_array_equal(state['w'], expected)
  # The state was saved sharded, and is restored without a mesh.
  with Checkpointer(tmp_path) as checkpointer:
    state = checkpointer.restore(abstract(state), step=2).state
  assert state['w'].devices() == {jax.devices()[0]}


def test_parameters_alone_are_read_from_a_train_state(tmp_path):
  save_all(tmp_path, [4])
  params = {'params': {'embed': ABSTRACT.params['embed']}}
  with Checkpointer(tmp_path) as checkpointer:
    restored = checkpointer.restore(params, partial=True).state
    assert_same_bits(restored['params']['embed'], make_state(4).params['embed'])
    with pytest.raises(ValueError, match='missing: params/embedding'):
      checkpointer.restore(
        {'params': {'embedding': ABSTRACT.step}}, partial=True
      )


def test_another_tree_is_refused_in_a_few_lines(tmp_path):
  save_all(tmp_path, [4])
  params = dict(ABSTRACT.params)
  params['router'] = params.pop('embed')
  params['experts'] = jax.ShapeDtypeStruct((8, 3, 6), jnp.float32)
  step = jax.ShapeDtypeStruct((), jnp.float32)
  target = ABSTRACT.replace(params=params, step=step)
  with pytest.raises(ValueError, match='holds another state') as error:
    Checkpointer(tmp_path).restore(target)
  assert str(error.value).splitlines()[1:] == [
    'missing: params/router',
    'unexpected: params/embed',
    'different: params/experts (saved float32[8,3,5], wanted float32[8,3,6]), '
    'step (saved int32[], wanted float32[])',
  ]


@pytest.mark.parametrize('reason', DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_never_blocks(
  tmp_path, reason, caplog
):
  save_all(tmp_path, [1, 2, 3], keep_newest=3)
  DAMAGE[reason](tmp_path, 3)
  with Checkpointer(tmp_path, CheckpointOptions(keep_newest=2)) as checkpointer:
    assert checkpointer.newest_good() == 2
    restored = checkpointer.restore(ABSTRACT)
    assert_same_bits(restored.state, make_state(2))
    assert restored.step == 2 and restored.extra == {'next_batch': 2}
    assert [step for step, _ in restored.skipped] == [3]
    assert reason in restored.skipped[0][1]
    with pytest.raises(CheckpointError, match=reason):
      checkpointer.restore(ABSTRACT, step=3)
    # The run reaches the same step again; the damaged checkpoint is not counted
    # among the two newest.
    checkpointer.save(3, make_state(3))
    checkpointer.wait()
    assert checkpointer.steps() == [2, 3]
  assert_same_bits(restore(tmp_path).state, make_state(3))
  assert (tmp_path / '3.aside').is_dir()
  assert 'set checkpoint 3 aside' in caplog.text


def test_names_that_are_no_steps_are_ignored(tmp_path):
  save_all(tmp_path, [1, 2])
  for name in ('9' * 200, '4294967296', '٣', '3 ', '+3', '03', '3.0', 'x'):
    (tmp_path / name).mkdir()
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.steps() == [1, 2]
    assert checkpointer.newest_good() == 2


def not_finite(step):
  """States with one bad number, by the name of its array."""
  state = make_state(step)
  embed = state.params['embed'].at[-1, 0].set(-jnp.inf)
  bias = state.router_state[0].at[-1].set(jnp.nan)
  return {
    'params/embed': state.replace(params={**state.params, 'embed': embed}),
    'router_state/0': state.replace(router_state=[bias]),
  }


@pytest.mark.parametrize('name', not_finite(3))
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, name):
  save_all(tmp_path, [1, 2])
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(CheckpointError) as error:
      checkpointer.save(3, not_finite(3)[name])
    assert f'not saved to {tmp_path}: not finite: {name}\n' in str(error.value)
    assert 'last good step: 2' in str(error.value)
    assert checkpointer.steps() == [1, 2]


def test_one_that_is_not_finite_is_passed_over(tmp_path, monkeypatch):
  save_all(tmp_path, [1, 2])
  name = 'router_state/0'
  # Versions saved so that did not check whether values are finite.
  with monkeypatch.context() as patched:
    patched.setattr('moe_jax.runs.finite.not_finite', lambda state: [])
    with Checkpointer(
      tmp_path, CheckpointOptions(keep_newest=9)
    ) as checkpointer:
      for step in (3, 4):
        checkpointer.save(step, not_finite(step)[name])
  with Checkpointer(tmp_path) as checkpointer:
    restored = checkpointer.restore(ABSTRACT)
    reason = f'not finite: {name}'
    assert (restored.step, restored.skipped) == (2, [(4, reason), (3, reason)])
    with pytest.raises(CheckpointError, match=f'4: {reason}'):
      checkpointer.restore(ABSTRACT, step=4)
    # A reader of a part is not stopped by the rest.
    params = {'params': ABSTRACT.params}
    assert checkpointer.restore(params, step=4, partial=True).step == 4


def test_a_wreck_newer_than_the_save_is_no_newest(tmp_path):
  save_all(tmp_path, [1, 5, 9], keep_newest=3)
  flip_bit(array_file(tmp_path, 9))
  with Checkpointer(tmp_path, CheckpointOptions(keep_newest=1)) as checkpointer:
    assert checkpointer.restore(ABSTRACT).step == 5
    checkpointer.save(6, make_state(6))
    checkpointer.wait()
    assert checkpointer.steps() == [6]
  assert restore(tmp_path).step == 6


def test_a_given_up_future_is_set_aside_not_restored(tmp_path):
  save_all(tmp_path, [1, 2, 3, 4], keep_newest=4)
  with Checkpointer(tmp_path, CheckpointOptions(keep_newest=4)) as checkpointer:
    assert checkpointer.restore(ABSTRACT, step=2).step == 2
    checkpointer.save(4, make_state(40))
  restored = restore(tmp_path)
  assert_same_bits(restored.state, make_state(40))
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {'1', '2', '3.aside', '4', '4.aside'}


def test_a_folder_without_manifest_blocks_no_fresh_run(tmp_path):
  for _ in range(2):
    (tmp_path / '3').mkdir()
    # The checkpoint was never finished: a run starts from the beginning.
    assert restore(tmp_path) is None
    assert save_all(tmp_path, [3])[0] == '3'
    (tmp_path / '3' / 'manifest.json').unlink()
    shutil.rmtree(tmp_path / '3')
  assert (tmp_path / '3.aside').is_dir() and (tmp_path / '3.aside2').is_dir()


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
  save_all(tmp_path, [1, 2])
  for step in (1, 2):
    flip_bit(array_file(tmp_path, step))
  with pytest.raises(CheckpointError, match=r'(?s)2: .*altered; 1: .*altered'):
    restore(tmp_path)


def test_leftovers_are_removed_in_one_line_by_a_save_alone(tmp_path, caplog):
  save_all(tmp_path, [1])
  names = ['2.saving', '3.deleting', '2.saving.orbax-checkpoint-tmp']
  for name in [*names, '7.orbax-checkpoint-tmp', 'notes']:
    shutil.copytree(tmp_path / '1', tmp_path / name)
  assert restore(tmp_path)[2:] == (1, [])
  assert (tmp_path / '2.saving').exists()  # it can be another process's save
  assert save_all(tmp_path, [8]) == ['1', '8', 'notes']
  lines = [r for r in caplog.records if r.levelno >= logging.WARNING]
  assert len(lines) == 1 and 'removed unfinished' in lines[0].getMessage()


def test_the_newest_and_the_best_are_kept(tmp_path):
  losses = [3.0, 1.0, float('nan'), 2.0, 1.0, 1.5]
  kept_steps = []
  with Checkpointer(
    tmp_path, CheckpointOptions(keep_newest=2, best_eval='valid')
  ) as checkpointer:
    assert checkpointer.best_step() is None
    for step, loss in enumerate(losses):
      checkpointer.save(step, make_state(), metrics={'valid': loss})
      checkpointer.wait()
      kept_steps.append(checkpointer.steps())
    assert checkpointer.best_step() == 1
    # Without metrics it is the newest, and never the best.
    checkpointer.save(6, make_state())
    checkpointer.save(7, make_state())
    checkpointer.wait()
    assert checkpointer.steps() == [1, 6, 7]
  assert kept_steps == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5]]
  assert save_all(tmp_path, [8], keep_best=False) == ['7', '8']


def test_the_best_is_kept_where_it_is_measured_after_the_save(tmp_path):
  kept_steps = []
  with Checkpointer(
    tmp_path,
    CheckpointOptions(keep_newest=1, best_eval='valid', best_metric='error'),
  ) as checkpointer:
    for step, error in enumerate([2.0, 3.0, jnp.float32(1), 4.0]):
      checkpointer.save(step, make_state())
      checkpointer.wait()
      kept_steps.append(checkpointer.steps())
      metrics = {'valid/error': error, 'valid': 1}
      checkpointer.save(step, make_state(), metrics=metrics)
    checkpointer.wait()
    kept_steps.append(checkpointer.steps())
  assert kept_steps == [[0], [0, 1], [0, 2], [2, 3], [2, 3]]
  # A measurement need not wait for the arrays.
  with Checkpointer(
    tmp_path / 'other', CheckpointOptions(best_eval='valid')
  ) as checkpointer:
    assert checkpointer.save(1, make_state())
    assert not checkpointer.save(1, make_state(), metrics={'valid': 1.0})
    assert not checkpointer.save(1, make_state(), extra={'more': True})
  restored = restore(tmp_path / 'other')
  assert restored.extra == {'more': True}
  assert checkpointer.best_step() == 1


def test_the_step_saved_or_restored_last_is_not_saved_again(tmp_path):
  save_all(tmp_path, [3, 4, 4])
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.restore(ABSTRACT)
    # The values beside the arrays are added.
    checkpointer.save(
      4, make_state(5), extra={'ended': True}, metrics={'train_capacity': 2.5}
    )
    checkpointer.wait()
    assert checkpointer.best_step() == 4
  assert sorted(path.name for path in tmp_path.iterdir()) == ['3', '4']
  restored = restore(tmp_path)
  assert_same_bits(restored.state, make_state(4))
  assert restored.extra == {'next_batch': 4, 'ended': True}


def test_what_cannot_be_saved_or_found_is_said(tmp_path):
  save_all(tmp_path, [4, 6])
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(ValueError, match=r'no checkpoint 5 .*have \[4, 6\]'):
      checkpointer.restore(ABSTRACT, step=5)
    with pytest.raises(ValueError, match=r"leaf 'opt/lr' is float"):
      checkpointer.save(7, {'opt': {'lr': 0.1}})
    with pytest.raises(ValueError, match=r"leaf 'key' is key<fry>.*key_data"):
      checkpointer.save(7, {'key': jax.random.key(0)})
    with pytest.raises(TypeError, match='not JSON serializable'):
      checkpointer.save(7, make_state(), extra={'batch': jnp.zeros(2)})
    assert checkpointer.steps() == [4, 6]


TREE = {'w': 'float32[3]'}


@pytest.fixture
def folder(tmp_path):
  """A sealed folder of two files, one of them in a folder of its own."""
  (tmp_path / 'd').mkdir()
  (tmp_path / 'd' / 'arrays').write_bytes(bytes(range(256)) * 4)
  (tmp_path / 'meta').write_text('{"w": 3}')
  manifest.write(
    epath.Path(tmp_path),
    Manifest(7, TREE, {'next_batch': 123}, {'loss': 0.1}, {}),
  )
  return epath.Path(tmp_path)


def verify(folder):
  manifest.verify(folder, manifest.read(folder))


def test_extra_files_are_ignored(folder):
  (folder / 'd' / '.nfs0001').write_text('of a network file system')
  verify(folder)


@pytest.mark.parametrize('path', ['d/arrays', 'meta', 'manifest.json'])
def test_any_flipped_bit_is_found(folder, path):
  content = (folder / path).read_bytes()
  for position in range(0, len(content), max(1, len(content) // 41)):
    for bit in (0, 3, 5, 7):
      flipped = bytearray(content)
      flipped[position] ^= 1 << bit
      (folder / path).write_bytes(bytes(flipped))
      with pytest.raises(BadCheckpoint, match=r'altered|unreadable'):
        verify(folder)
  (folder / path).write_bytes(content)
  verify(folder)
