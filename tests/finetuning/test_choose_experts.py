"""Expert-specialised fine-tuning: experts are chosen and train alone."""

import jax
import numpy as np
import pytest

from moe_jax import data
from moe_jax.finetuning import __main__ as command
from moe_jax.finetuning import choose_experts
from moe_jax.layers.routers.contract import Router
from moe_jax.training import loop, setup
from moe_jax.training.trainable import ChosenExperts, read_chosen
from tests.finetuning import steps
from tests.finetuning.steps import V, arrays
from tests.generation import folders
from tests.training import tiny

# Layers 1 and 3 of four are sparse; different experts of them train.
CHOSEN = {1: (0, 2), 3: (3,)}
W_IN = 'layers/layer_1/moe/experts/w_in'
MODEL = dict(vocab_size=V, num_layers=4, moe=dict(num_selected=2, layers='1,3'))


def test_the_fewest_experts_that_reach_the_share():
  # Two layers of four experts: in layer 1 one expert has half of the use.
  shares = {1: np.array([0.1, 0.5, 0.1, 0.3]), 3: np.array([0.25] * 4)}
  assert choose_experts.chosen(shares, 0.5) == {1: (1,), 3: (0, 1)}
  assert choose_experts.chosen(shares, 0.51) == {1: (1, 3), 3: (0, 1, 2)}
  assert choose_experts.chosen(shares, 0.8) == {1: (1, 3), 3: (0, 1, 2, 3)}
  every = (0, 1, 2, 3)
  assert choose_experts.chosen(shares, 1.0) == {1: every, 3: every}


@pytest.mark.slow
def test_use_is_counted_choice_by_choice():
  moe = dict(num_selected=2, layers='all')
  options = tiny.options(model=dict(vocab_size=V, num_layers=1, moe=moe))
  model, batch = options.build(), tiny.batch(options, vocab_size=V)
  variables = {'params': tiny.params_of(options.filled(V))}

  @jax.jit
  def intermediates_of(variables, batch):
    return model.apply(
      variables,
      **model.inputs(batch),
      capture_intermediates=lambda module, _: isinstance(module, Router),
      mutable=['intermediates'],
    )

  _, collections = jax.device_get(intermediates_of(variables, batch))
  layers = model.stacks.layer_trees(collections['intermediates'])
  shares = {
    score: choose_experts.shares(model, variables, [batch, batch], score)
    for score in choose_experts.SCORES
  }
  routing, _ = layers[0]['moe']['router']['__call__'][0]
  gates, tokens = np.zeros(4), np.zeros(4)
  is_real = np.asarray(batch['segment_ids']).reshape(routing.gate.shape[:2]) > 0
  for g, s, k in np.ndindex(*routing.gate.shape):
    expert = routing.expert_index[g, s, k]
    tokens[expert] += is_real[g, s]
    gates[expert] += routing.kept[g, s, k] * routing.gate[g, s, k]
  by_tokens, by_gate = shares['tokens'][0], shares['gate'][0]
  np.testing.assert_allclose(by_tokens, tokens / tokens.sum(), rtol=1e-6)
  np.testing.assert_allclose(by_gate, gates / gates.sum(), rtol=1e-5)
  assert np.abs(by_gate - by_tokens).max() > 1e-3


def train_two_steps(path, devices=1, optimizer='adamw', **overrides):
  """Parameters before and after, the state, and the programs."""
  options, programs = steps.programs_of(
    devices,
    trained_experts=path,
    model=MODEL,
    optimizer=dict(kind=optimizer, weight_decay=0.1),
    **overrides,
  )
  return *steps.train(options, programs, 2), programs


@pytest.fixture(scope='module')
def chosen_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('chosen') / 'experts.json'
  ChosenExperts(4, CHOSEN).write(path)
  return str(path)


@pytest.mark.parametrize(
  'kwargs',
  [
    dict(trainable='experts'),
    pytest.param(
      dict(devices=8, trainable='experts + router', optimizer='adafactor'),
      marks=pytest.mark.slow,
    ),
  ],
  ids=str,
)
def test_only_chosen_experts_train(chosen_file, kwargs):
  before, after, state, programs = train_two_steps(chosen_file, **kwargs)
  num_trained = 0
  for name, value in after.items():
    if '/experts/' not in name:
      changed = (value != before[name]).any()
      is_router = '/router/' in name and 'router' in kwargs['trainable']
      assert changed == is_router, name
      continue
    for i, layer in enumerate(CHOSEN):  # [R, E, ...]: a period for each
      for e in range(4):
        old, new = before[name][i, e], value[i, e]
        unchanged = old.tobytes() == new.tobytes()
        assert unchanged == (e not in CHOSEN[layer]), (name, layer, e)
        num_trained += 0 if unchanged else new.size
  if kwargs['trainable'] == 'experts':
    part = programs.trained.part(state.params)
    assert programs.trained.count(part) == num_trained
  if 'optimizer' not in kwargs:  # moments are there, and are zero
    moments = arrays(state.opt_state)
    (mu,) = (x for n, x in moments.items() if n.endswith('mu/' + W_IN))
    assert mu[0, 0].any() and not mu[0, 1].any() and not mu[1, :3].any()


@pytest.mark.slow
def test_adapters_of_chosen_experts_alone_train(chosen_file):
  before, after, *_ = train_two_steps(
    chosen_file, lora=dict(rank=2, parts='experts + attention')
  )
  b = f'lora/{W_IN}/b'
  assert [[bool(after[b][i, e].any()) for e in range(4)] for i in (0, 1)] == [
    [True, False, True, False],
    [False, False, False, True],
  ]
  assert (after[W_IN] == before[W_IN]).all()


@pytest.mark.parametrize(
  ('layers', 'trainable', 'message'),
  [
    ({1: (0,)}, 'experts', r'by layer \{1: 4\}, the model has \{1: 4, 3: 4\}'),
    ({1: (1, 1), 3: (0,)}, 'experts', r'layer 1 has \[1, 1\], not distinct'),
    (CHOSEN, 'attention', 'trained_experts has no effect'),
  ],
)
def test_a_file_that_does_not_fit_is_refused(
  tmp_path, layers, trainable, message
):
  ChosenExperts(4, layers).write(tmp_path / 'experts.json')
  with pytest.raises(ValueError, match=message):
    train_two_steps(str(tmp_path / 'experts.json'), trainable=trainable)


@pytest.mark.slow
def test_a_file_that_has_changed_is_said(tmp_path, capsys):
  file = tmp_path / 'experts.json'
  ChosenExperts(4, {1: (0,)}).write(file)
  options = tiny.options(
    total_steps=1,
    trained_experts=str(file),
    evals={},
    checkpoint=dict(keep_best=False),
    sample=dict(num_tokens=0),
  )
  setup_kwargs = dict(devices=jax.devices()[:1], resume=True)
  loop.train_and_evaluate(options, tmp_path / 'run', **setup_kwargs)

  def begin_output():
    capsys.readouterr()
    setup.begin(setup.set_up(options, tmp_path / 'run', **setup_kwargs))
    return capsys.readouterr().out

  output = begin_output()
  assert 'going on from' in output and 'WARNING' not in output
  ChosenExperts(4, {1: (0, 2)}).write(file)
  assert 'WARNING: other experts train than before' in begin_output()


def test_one_command_chooses_from_data(tmp_path, capsys):
  model = {k: v for k, v in MODEL.items() if k != 'vocab_size'}
  folders.write(tmp_path / 'run', model=model)
  file = tmp_path / 'experts.json'
  args = ['choose', f'--workdir={tmp_path / "run"}', '--share=0.6']
  command.main([*args, f'--output={file}', '--batches=2', '--score=tokens'])
  output = capsys.readouterr().out
  choice = read_chosen(str(file))
  assert choice.describe() in output
  assert f'--config.trained_experts={file}' in output
  shares = {int(i): np.array(s) for i, s in choice.about['shares'].items()}
  assert choice.layers == choose_experts.chosen(shares, 0.6)
  assert set(choice.layers) == {1, 3}
  # The task may read pairs, whose inputs end in an EOS; the ids are the same.
  task = data.DataOptions(
    source=data.InstructionSource('copy', num_train=40, num_validation=4),
    task=data.Seq2SeqTask(),
    seq_len=24,
  )
  choose_experts.choose(
    tmp_path / 'run', share=0.6, num_batches=1, options=task
  )
