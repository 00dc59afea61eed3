"""A model of one task has the logits of the whole model for that task."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import run_config
from moe_jax.compression import __main__ as command
from moe_jax.compression import extract, whole_run
from moe_jax.config import merge, read_options, section_of
from moe_jax.layers.experts import Dropless
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers import Task, TokenChoice
from moe_jax.layers.shared import Shared
from moe_jax.models import MODELS
from moe_jax.routing import All
from moe_jax.training.loop import train_and_evaluate
from tests.generation import folders
from tests.models import tiny

B, T, N = tiny.B, tiny.T, 4
ROOM = dict(capacity=All(), dispatch=Dropless(), group_size=-1)
BY_TASK = dict(
  num_experts=5, num_selected=2, router=Task(gates='renormalized'), **ROOM
)
KINDS = {
  'decoder': dict(moe=BY_TASK | dict(layers='every 2'), use_bias=True),
  'both by task': dict(
    kind='encoder_decoder',
    moe=BY_TASK | dict(num_selected=3, router=Task(), output_masking=0.25),
    ffn=dict(activation='doubly_gated_swiglu'),
    encoder=dict(num_layers=3, overrides={'moe': {'layers': '0,2'}}),
  ),
}


def options_of(moe, **changes):
  return dataclasses.replace(tiny.options(moe, **changes), num_tasks=N)


def inputs(model, task=None):
  arrays = {}
  for i, prefix in enumerate(model.stacks.sequences):
    arrays[f'{prefix}tokens'] = tiny.tokens(i)
    segments = np.minimum(np.arange(T) // 4 + 1, 2) * (np.arange(T) < 9)
    arrays[f'{prefix}segment_ids'] = np.tile(segments, (B, 1)).astype(np.int32)
  for prefix in () if task is None else model.stacks.task_sequences:
    arrays[f'{prefix}task_ids'] = np.full((B, T), task, np.int32)
  return arrays


@functools.cache
def applied(model):
  return jax.jit(lambda params, batch: model.apply({'params': params}, **batch))


def logits(model, params, task=None):
  batch = inputs(model, task)
  is_real = np.asarray(batch['segment_ids']) > 0  # padding meets no expert
  return np.asarray(applied(model)(params, batch)[0])[is_real]


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name == 'decoder' else pytest.mark.slow)
    for name in KINDS
  ],
)
def test_logits_are_those_of_the_whole_model(name):
  options = options_of(**KINDS[name])
  whole = options.build()
  params = tiny.params_of(whole)
  outputs = []
  for task in range(N):
    small = extract.extract(options, params, task)
    model = small.options.build()
    assert not model.stacks.task_sequences and small.layers
    shapes = jax.tree.map(jnp.shape, tiny.params_of(model))
    assert jax.tree.map(jnp.shape, small.params) == shapes
    expected = logits(whole, params, task)
    np.testing.assert_allclose(
      logits(model, small.params), expected, atol=1e-5, rtol=1e-5
    )
    outputs.append(expected)
  # The tasks differ, so that the gates of another would have been seen.
  assert min(np.abs(outputs[0] - other).max() for other in outputs[1:]) > 1e-2
  # The options are those of a run: what a config says of them is read again.
  section = section_of(small.options, MODELS)
  assert read_options(MODELS, section, 'model.') == small.options


def test_a_layer_of_two_experts_by_hand():
  # Expert 2 doubles its token, expert 0 adds 1 to it if it is positive. The
  # task goes to both, with gates of 3/4 and 1/4: 3/4 * 2x + 1/4 * (x + 1).
  experts = {
    'w_in': jnp.array([[[1.0]], [[9.0]], [[1.0]]]),  # [E, M, F]
    'b_in': jnp.zeros((3, 1)),
    'w_out': jnp.array([[[1.0]], [[9.0]], [[2.0]]]),
    'b_out': jnp.array([[1.0], [9.0], [0.0]]),
  }
  params = {'tasks': jnp.log(jnp.array([[1.0, 1.0, 1.0], [1.0, 0.1, 3.0]]))}
  options = MoeOptions(3, 2, router=Task(gates='renormalized'), capacity=All())
  index, gate = extract.choice_of_task(
    options, Shared(num_tasks=2), {'router': params, 'experts': experts}, 1
  )
  assert (index == jnp.array([[2, 0]])).all()
  np.testing.assert_allclose(gate, [[0.75, 0.25]] * len(gate), rtol=1e-6)
  index, gate = index[0], gate[0]
  dense = extract.as_one(experts, index, gate)
  np.testing.assert_allclose(dense['w_in'], [[1.0, 1.0]])
  np.testing.assert_allclose(dense['w_out'], [[1.5], [0.25]], rtol=1e-6)
  np.testing.assert_allclose(dense['b_out'], [0.25], rtol=1e-6)


def test_other_models_are_refused():
  by_token = dict(router=TokenChoice(), capacity=All())
  lost = BY_TASK | dict(layers='every 2', retained=Retained(experts='1:3'))
  for message, options in {
    'no router by task': tiny.options(by_token),
    'merged experts or uneven': options_of(lost),
  }.items():
    params = tiny.params_of(options.build())
    with pytest.raises(ValueError, match=message):
      extract.extract(options, params, 0)


def languages_of(names, encoder=None):
  """Overrides of a run of an encoder-decoder that has a task for each name."""
  router = {'kind': 'token_choice', 'token_choice': encoder or {}}
  sources = {n: {'kind': 'instructions', 'task': n} for n in names}
  return dict(
    data=dict(
      source=dict(python_stdlib=dict(modules='')),
      task=dict(kind='seq2seq'),
      mixture=dict(sources=sources),
      seq_len=32,
      target_len=24,
    ),
    model=dict(
      kind='encoder_decoder',
      num_layers=2,
      positions=dict(kind='relative'),
      moe=dict(
        layers='all',
        num_selected=2,
        router=dict(kind='task', task=dict(gates='renormalized')),
        capacity=dict(kind='all'),
        dispatch=dict(kind='dropless'),
      ),
      encoder=dict(overrides={'moe': {'router': router}}),
    ),
  )


def test_the_task_of_the_sample_goes_with_the_routers_by_task(tmp_path):
  sample = dict(task='reverse', num_tokens=9)
  languages = languages_of(('copy', 'reverse'))
  folders.write(tmp_path / 'run', **languages, sample=sample)
  run = whole_run.read(tmp_path / 'run')
  tasks = {}
  for name, model in (
    ('whole', run.options.model),
    ('new', extract.of_run(run, 'reverse').options),
  ):
    # Parameters are not looked at here.
    folder = whole_run.write(run, tmp_path / name, {'w': jnp.ones(1)}, model)
    config = run_config.from_file(folder / 'config.json')
    assert config.sample.num_tokens == 9
    tasks[name] = config.sample.task
  assert tasks == {'whole': 'reverse', 'new': ''}


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
  # The encoder routes by token, with a balancing bias that goes along.
  encoder = dict(gates='sigmoid', balance_bias_rate=0.1)
  names = 'copy', 'reverse'
  folders.write(tmp_path / 'run', **languages_of(names, encoder))
  run = whole_run.read(tmp_path / 'run')
  flags = f'--run={run.folder}', '--task=reverse', f'--output={tmp_path}/new'
  command.main(['extract', *flags])
  new_run = whole_run.read(tmp_path / 'new')
  assert 'layer 3: 2 of 4 experts kept' in capsys.readouterr().out
  small = extract.extract(run.options.model, run.variables['params'], 1)
  jax.tree.map(
    np.testing.assert_array_equal,
    new_run.variables,
    {**run.variables, 'params': small.params},
  )
  state = jax.tree.leaves(new_run.variables['router_state'])
  assert any(x.any() for x in state)
  # The run of one task trains on, with its own config.
  config = run_config.from_file(tmp_path / 'new' / 'config.json')
  short = dict(total_steps=1, sample=dict(num_tokens=0))
  short |= dict(evals={}, checkpoint=dict(keep_best=False))
  options = run_config.read(merge(config, short))
  devices = jax.devices()[:1]
  state = train_and_evaluate(
    options, new_run.folder, resume=True, devices=devices
  )
  assert int(state.step) == 1
