"""The table of 1991: counted epochs, reported failures, drawn figures."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import jacobs_table1
from experiments.origins_1991 import descent, vowels
from experiments.origins_1991.descent import TARGETS, Cases, Descent
from experiments.origins_1991.mixture import Mixture
from experiments.study import command, results
from experiments.study.parts import Row
from experiments.study.tables import ratios
from moe_jax.analysis.intervals import Interval

RATES = TARGETS['pairs'].rates


def line():
  """Cases of two classes that a line separates: below 0 and above."""
  x = np.linspace(-1, 1, 8, dtype=np.float32)
  features = np.stack([x, x[::-1] ** 2], axis=-1)
  return Cases(features, (x > 0).astype(np.float32)[:, None])


OPTIONS = Descent(num_experts=3, total_steps=150)


@functools.partial(jax.jit, static_argnames='model')
def one_step(model, params, features, targets, rate):
  """The squared error of one epoch, and the parameters of the next."""

  def loss(params):
    outputs = model.apply({'params': params}, features)
    p, o = outputs.gate_probs, outputs.experts
    distances = ((targets[:, None] - o) ** 2).sum(-1)
    losses = -jnp.log((p * jnp.exp(-distances / 2)).sum(-1))
    blend = (p[..., None] * o).sum(1)
    return losses.mean(), ((targets - blend) ** 2).sum(-1).mean()

  gradient, squared = jax.grad(loss, has_aux=True)(params)
  new = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
  return squared, new


@functools.partial(jax.jit, static_argnames='model')
def start_of(model, features, seed):
  return jax.tree.map(
    lambda leaf: leaf[0], descent.start(model, features, seed[None])
  )


def descend(rate, seed):
  """One run by definition, in a Python loop."""
  cases = line()
  params = start_of(OPTIONS.model, cases.features, np.int32(seed))
  for epoch in range(OPTIONS.total_steps):
    squared, new = one_step(
      OPTIONS.model, params, cases.features, cases.targets, rate
    )
    if squared <= 0.08:
      return epoch, params
    params = new
  return OPTIONS.total_steps, params


@pytest.mark.parametrize(('rate', 'reached'), [(0.5, False), (6.0, True)])
def test_runs_stop_where_a_loop_does(rate, reached):
  seeds = np.array([4, 5])
  params = descent.start(OPTIONS.model, line().features, seeds)
  runs = descent.train(OPTIONS, line(), params, rate)
  assert runs.reached.tolist() == [reached, reached]
  for s, seed in enumerate(seeds):
    epochs, params = descend(rate, seed)
    assert runs.epochs[s] == epochs
    for name, value in params.items():
      np.testing.assert_allclose(
        runs.params[name][s], value, rtol=1e-3, atol=1e-4
      )
  assert (runs.epochs[0] != runs.epochs[1]) == reached


def test_what_is_measured_of_a_gate():
  # Two experts divide the cases at x = 0: the first always outputs 0 and the
  # second 1, which is right everywhere. The third has no proportion.
  params = {
    'expert_out': np.zeros((3, 2, 1)),
    'expert_out_bias': np.array([[-20.0], [20.0], [0.0]]),
    'gate_out': np.array([[-99.0, 99.0, 0.0], [0, 0, 0]]),
    'gate_out_bias': np.zeros(3),
  }
  params = {k: jnp.float32(v)[None] for k, v in params.items()}
  measures = descent.measured(Mixture(3), params, line(), line())
  expected = {'train': 100, 'test': 100, 'alone': 100}
  expected |= {'experts in use': 2, 'experts ever heard': 2, 'gate entropy': 0}
  expected['I(expert; case)'] = np.log(2)  # each has half of the cases
  for name, value in expected.items():
    np.testing.assert_allclose(measures[name], [value], atol=1e-4)
  # With equal proportions all experts are heard, one is the likeliest, and none
  # decides.
  params['gate_out'] = jnp.zeros((1, 2, 3))
  measures = descent.measured(Mixture(3), params, line(), line())
  np.testing.assert_allclose(measures['gate entropy'], [np.log(3)], rtol=1e-5)
  assert measures['experts ever heard'] == 3 and measures['experts in use'] == 1
  np.testing.assert_allclose(measures['I(expert; case)'], [0], atol=1e-6)


def test_systems_have_the_papers_sizes():
  # With one output a mixture and its network have roughly equal numbers of
  # parameters, as the paper says.
  features = vowels.load()[0].features
  sizes = {}
  for name, changes in jacobs_table1.SYSTEMS.items():
    model = Descent(**changes).model
    start = functools.partial(descent.start, model)
    params = jax.eval_shape(start, features, jnp.array([0]))
    sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert sizes['4 experts, competitive'] == 24
  assert sizes['8 experts, competitive'] == 48
  gate = 3  # the gate of a network's only expert, which is always 1
  assert sizes['BP, 6 hidden'] == 25 + gate
  assert sizes['BP, 12 hidden'] == 49 + gate


def test_targets_are_pairs_of_vowels():
  train, _ = vowels.load()
  targets = descent.pairs(train).targets
  pairs = zip(train.labels.tolist(), targets[:, 0].tolist(), strict=True)
  assert {*pairs} == {(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)}


def sweep(system, epochs, lost=()):
  """Results of one system by arm, a run lost at some rates."""
  return {
    f'{system}, rate {rate:g}': [
      {'learning rate': rate, 'epochs': n, 'reached': 100.0 * reached}
      for n, reached in zip(of_rate, (True, rate not in lost), strict=True)
    ]
    for rate, of_rate in zip(RATES, epochs, strict=True)
  }


def test_the_best_rate_first_arrives_then_is_fast():
  epochs = [[9, 9], [5, 5], [4, 4], [7, 7], [8, 8], [9, 9]]
  best_rate = jacobs_table1.best_rate
  assert best_rate(sweep('a', epochs), ['a']) == RATES[2]
  # At the third rate one run does not reach the criterion.
  results = sweep('a', epochs, lost=[RATES[2]])
  assert best_rate(results, ['a']) == RATES[1]
  # The shared rate is chosen for all systems: 5 + 9 epochs at one rate, 7 + 1
  # at the other.
  results |= sweep('b', [[9, 9], [9, 9], [9, 9], [1, 1], [9, 9], [9, 9]])
  assert best_rate(results, ['a', 'b']) == RATES[3]
  assert best_rate(results, ['a']) == RATES[1]


def test_a_ratio_has_the_spread_of_both():
  # The means are 4 and 10. First only the base varies, then both in proportion.
  base = np.array([8.0, 12.0])
  quotients = ratios(np.array([4.0, 4.0]), base)
  np.testing.assert_allclose(quotients, [0.48, 0.32])  # 0.4 -+ 0.4 * 2 / 10
  assert Interval.of(quotients).mean == pytest.approx(0.4)
  np.testing.assert_allclose(ratios(0.4 * base, base), [0.4, 0.4])


def example_rows():
  """A row for each of the study's systems, with numbers of its own."""
  columns = {column.name for column in jacobs_table1.COLUMNS}
  names = [*jacobs_table1.SYSTEMS]
  names += [name + jacobs_table1.SHARED for name in names]
  return [
    Row(name, {column: [n + 0.1, n + 0.2, n] for column in columns})
    for n, name in enumerate(names)
  ]


def test_arms_are_explored_then_chosen():
  study = jacobs_table1.STUDY
  arms = study.arms_of(study.presets['full'])
  shared = study.shared(study.presets['full'], 'linear_pairs')
  explored_arms = jacobs_table1.explored(arms, shared)
  rates = TARGETS['linear_pairs'].rates
  assert len(explored_arms) == len(jacobs_table1.SYSTEMS) * len(rates)
  # The third rate is the fastest of all systems but one, whose fastest is the
  # first.
  explored_results = {}
  for arm in explored_arms:
    best = 0 if arm.line == 'BP, 6 hidden' else 2
    rate = arm.overrides['learning_rate']
    epochs = 10 if rate == rates[best] else 20
    run = {'learning rate': rate, 'epochs': epochs, 'reached': 100.0}
    explored_results[arm.name] = [run, run]
  chosen = {
    arm.name: arm for arm in jacobs_table1.chosen(arms, explored_results, {})
  }
  assert len(chosen) == 2 * len(jacobs_table1.SYSTEMS)
  own_rate = chosen['BP, 6 hidden'].overrides['learning_rate']
  shared_rate = chosen['BP, 6 hidden' + jacobs_table1.SHARED].overrides
  assert (own_rate, shared_rate['learning_rate']) == (rates[0], rates[2])
  # Jobs can be made of all arms, and those of one system are one call.
  preset, folder = study.presets['full'], pathlib.Path('x')
  (runs,) = study.runs(preset, shared, [*chosen.values()], range(2), folder)
  groups = {study.runner.together(job) for job in runs}
  assert groups == set(jacobs_table1.SYSTEMS)


@pytest.fixture(scope='module')
def output_folder(tmp_path_factory):
  """Runs the command on a task, with two seeds that are given up at once."""
  output = tmp_path_factory.mktemp('results')
  argv = ['--seeds=2', '--steps=50', '--workers=1', f'--output={output}']
  study = jacobs_table1.STUDY
  (exploration,) = study.explorations(study.presets['full'])
  exploration = dataclasses.replace(exploration, seeds=range(9, 11))
  study = dataclasses.replace(study, explorations=lambda _: [exploration])

  with pytest.MonkeyPatch.context() as patch:
    kind = TARGETS['pairs']._replace(rates=(8.0,))
    patch.setitem(TARGETS, 'pairs', kind)
    return command.main(study, argv)


@pytest.mark.slow
def test_the_command_says_who_never_arrived(output_folder):
  folder = output_folder
  assert folder.name == 'full-seeds=2-steps=50'
  text = (folder / 'table.md').read_text()
  assert '8 experts, gated: 2 of 2' in text
  assert '1124 (Table 1, secondary source) against 2209 (Table 1' in text
  summary = json.loads((folder / 'summary.json').read_text())
  assert len(summary['rows']) == 2 * len(jacobs_table1.SYSTEMS)
  assert len(summary['claims']) == len(jacobs_table1.CLAIMS)
  lines = (folder / 'rows.csv').read_text().splitlines()
  assert '"BP, 12 hidden",epochs,,1,50.0' in lines
  assert (folder / results.PICTURE).read_bytes().startswith(b'\x89PNG')


def test_published_numbers_are_of_the_papers_task():
  study, count = dataclasses.replace(jacobs_table1.STUDY, remarks=''), {}
  for name in ('vowels', 'linear_pairs'):
    summary = results.summary_of(
      study, study.presets['full'], study.tasks[name], example_rows(), {}, {}
    )
    count[name] = sum(bool(c['published']) for c in summary['claims'])
  assert count['vowels'] > 3 and count['linear_pairs'] == 0
