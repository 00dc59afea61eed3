"""Runs that learn from another run, from config to step."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import models, run_config
from moe_jax.compression import distill
from moe_jax.config import OptionError, merge
from moe_jax.data import tokenizers
from moe_jax.runs import metrics
from moe_jax.training import loop, setup
from tests.finetuning.test_start import set_up
from tests.generation import folders
from tests.models.tiny import assert_trees_close
from tests.reference import softmax
from tests.training import tiny
from tests.training.hooks import SigtermAt

TEACHER = {'moe': {'num_experts': 4, 'num_selected': 2}}
STUDENT = {'moe': {'num_experts': 0, 'num_selected': 2}}
SHORT = {'sample': {'num_tokens': 0}, 'optimizer': {'clip_norm': 0.0}}


def config_of(teacher, *, model=STUDENT, distil=(), **overrides):
  """Config of a run that the teacher teaches; `distil` has its options."""
  config = tiny.config(**{**SHORT, 'model': model, **overrides})
  options = {'teacher': str(teacher), **dict(distil)}
  return merge(config, {'distill': options})


def start_run(config, workdir, devices=1):
  """A run with its hook started, its first state and its first batch."""
  run = set_up(config, workdir, devices)
  hook = distill.Distilling()
  with run.checkpoints:
    run, state, _ = setup.begin(run, hook.initial)
  run = hook.start(run) or run
  return run, state, next(run.batches(0))


def begin_run(config, workdir):
  """A run, and the parameters and the printed line with which it begins."""
  run = set_up(config, workdir)
  variables, line = distill.Distilling().initial(run)
  return run, variables['params'], line


def train(config, workdir, *hooks):
  distilling = distill.Distilling()
  return loop.train_and_evaluate(
    run_config.read(config),
    workdir,
    hooks=[distilling, *hooks],
    devices=jax.devices()[:1],
    initial=distilling.initial,
  )


MIX = {'hard_weight': 0.25, 'soft_weight': 0.75, 'temperature': 2.0}
LARGE = {'batch_size': 16, 'distil': MIX}


@pytest.fixture(scope='module')
def one_step(teacher, tmp_path_factory):
  """The first parameters, the batch, and the results of one step."""
  config = config_of(teacher, **LARGE)
  run, state, batch = start_run(config, tmp_path_factory.mktemp('one'))
  params = jax.device_get(state.params)
  return params, batch, jax.device_get(run.train_step(state, batch))


def test_the_step_has_the_loss_of_the_definition(teacher, one_step, tmp_path):
  params, batch, (_, step) = one_step
  outputs, teacher_params = [], folders.write(tmp_path, model=TEACHER)[3]
  for overrides, model_params in (
    (STUDENT, params), (TEACHER, teacher_params)
  ):  # fmt: skip
    model = tiny.model_of(tiny.options(model=overrides))
    apply = jax.jit(functools.partial(model.apply, **model.inputs(batch)))
    outputs.append(np.asarray(apply({'params': model_params})[0], np.float64))
  nats = weights = 0.0
  for b, t in np.ndindex(*batch['tokens'].shape):
    w = float(batch['loss_weights'][b, t])
    student, sparse = (o[b, t] for o in outputs)
    hard = -np.log(softmax(student))[int(batch['targets'][b, t])]
    soft = -(softmax(sparse / 2) * np.log(softmax(student / 2))).sum()
    nats += w * (0.25 * hard + 0.75 * 2**2 * soft)
    weights += w
  np.testing.assert_allclose(step.loss, nats / weights, rtol=1e-5)


def assert_same_step(result, one_step):
  (state, step), (first, expected) = result, one_step[2]
  np.testing.assert_allclose(step.loss, expected.loss, rtol=1e-5)
  np.testing.assert_allclose(step.grad_norm, expected.grad_norm, rtol=1e-4)
  # Its moments are those of the gradient.
  assert_trees_close(state.opt_state, first.opt_state, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_mesh_and_microbatches_change_nothing(
  teacher, one_step, tmp_path, capsys
):
  table = {'sharding': {'expert': '', 'expert_mlp': 'expert'}}
  config = config_of(
    teacher,
    batch_size=16,
    microbatches=2,
    distil={**MIX, **table},
    mesh={'data': 1, 'fsdp': 2, 'expert': 4},
  )
  run, state, batch = start_run(config, tmp_path, 8)
  assert 'teacher: step 3' in capsys.readouterr().out
  # The teacher's table splits the width of its experts, not their number.
  restored = distill.Teacher(run, run.options.distill).restored
  layers = restored.state['params']['layers']
  kernel = layers['layer_1']['moe']['experts']['w_in']
  assert kernel.addressable_shards[0].data.shape == (1, 4, 8, 5)
  assert_same_step(jax.device_get(run.train_step(state, batch)), one_step)


def test_hard_labels_alone_are_ordinary_training(teacher, tmp_path):
  hard = {'hard_weight': 1.0, 'soft_weight': 0.0}
  taught = start_run(config_of(teacher, distil=hard), tmp_path / 'taught')[0]
  # No teacher is computed: the step is the run's own.
  assert taught.train_step is taught.programs.train_step


def test_all_but_experts_begin_as_the_teachers(teacher, tmp_path):
  params = folders.write(tmp_path / 'again', model=TEACHER)[3]
  _, student_params, line = begin_run(config_of(teacher), tmp_path / 'run')
  assert 'beginning with the weights of step 3' in line
  assert 'feed-forwards of layers [1] drawn anew' in line
  teacher_layer = params['layers'].pop('layer_1')
  student_layer = student_params['layers'].pop('layer_1')
  jax.tree.map(np.testing.assert_array_equal, student_params, params)
  assert teacher_layer.pop('moe').keys() == {'experts', 'router'}
  student_ffn = student_layer.pop('ffn')
  jax.tree.map(np.testing.assert_array_equal, student_layer, teacher_layer)
  # The twin's feed-forward is that of a run without a teacher.
  model = tiny.model_of(tiny.options(model=STUDENT))
  init = jax.jit(functools.partial(models.init_params, model))
  fresh_ffn = nn.meta.unbox(init(jax.random.key(0)))['layers']['layer_1']['ffn']
  jax.tree.map(np.testing.assert_array_equal, student_ffn, fresh_ffn)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(teacher, tmp_path):
  source = tmp_path / 'source'
  shutil.copytree(teacher, source)
  config = config_of(
    source,
    model={**STUDENT, 'dropout': 0.1},
    evals={},
    checkpoint={'every_steps': 2, 'keep_best': False},
    total_steps=4,
  )
  unbroken = train(config, tmp_path / 'whole')
  assert int(train(config, tmp_path / 'run', SigtermAt(3)).step) == 3
  # The teacher has trained on since; the run keeps to the checkpoint it had.
  folders.write(tmp_path / 'newer', steps=(9,), model=TEACHER)
  shutil.copytree(
    tmp_path / 'newer' / 'checkpoints' / '9', source / 'checkpoints' / '9'
  )
  resumed = train(config, tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)
  rows = metrics.read_metrics(tmp_path / 'whole' / metrics.FILE_NAME)
  assert all(np.isfinite(row['train/loss']) for row in rows if 'loss' in row)
  shutil.rmtree(source / 'checkpoints' / '3')
  with pytest.raises(ValueError, match='checkpoint'):
    train(config, tmp_path / 'run')


def test_what_does_not_fit_is_refused(teacher, tmp_path):
  run = set_up(config_of(teacher), tmp_path / 'run')

  def refused(message, folder=teacher, **changes):
    options = run_config.read(config_of(folder, **changes)).filled(257)
    changed = dataclasses.replace(run, options=options, model=options.build())
    with pytest.raises(ValueError, match=message):
      distill.Distilling().initial(changed)

  letters = tokenizers.Chars('abc')
  folders.write(tmp_path / 'letters', tokenizer=letters, model=TEACHER)
  refused('was trained on tokens of', tmp_path / 'letters')
  refused(r'embedding: \[257, 16\] there', model={**STUDENT, 'width': 32})
  large = {**STUDENT, 'vocab_size': 300}
  refused('logits of vocab_size=257, this model of 300', model=large)
  whole = {'moe': {**TEACHER['moe'], 'group_size': -1}}
  folders.write(tmp_path / 'whole', model=whole)
  refused('group_size=-1 with microb', tmp_path / 'whole', microbatches=2)
  # A run without the hook would train without its teacher.
  with pytest.raises(ValueError, match=r"\['distill'\] of the config have no"):
    loop.train_and_evaluate(run.options, tmp_path / 'run')


def test_options_that_contradict_are_refused(teacher):
  for message, options in {
    'nothing to learn': {'hard_weight': 0.0, 'soft_weight': 0.0},
    'teacher=.* has no effect with so': {'soft_weight': 0.0, 'start': 'none'},
    'temperature=2': {'soft_weight': 0.0, 'temperature': 2.0},
  }.items():
    with pytest.raises(OptionError, match=message):
      run_config.read(config_of(teacher, distil=options))
  init_from = {'init_from': {'workdir': 'runs/other'}}
  with pytest.raises(OptionError, match='a run begins with one of them'):
    run_config.read(merge(config_of(teacher), init_from))


def test_another_teacher_of_the_same_step_is_noticed(teacher, tmp_path):
  source = tmp_path / 'source'
  shutil.copytree(teacher, source)
  run, _, _ = start_run(config_of(source), tmp_path / 'run')
  path = source / 'checkpoints' / '3' / 'manifest.json'
  path.write_text(path.read_text() + '\n')
  with pytest.raises(ValueError, match='is not that which taught'):
    distill.Distilling().start(run)
