"""The table of 1991: counted epochs, reported failures, drawn figures."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments import jacobs_table1
from experiments.origins_1991 import (
  jacobs_claims,
  jacobs_figures,
  jacobs_measures,
  jacobs_problems,
  jacobs_rows,
  jacobs_runs,
)
from experiments.origins_1991.jacobs_problems import (
  RATES,
  TARGETS,
  Cases,
  Problem,
)
from experiments.study import command, results, verdicts
from experiments.study.parts import Row
from experiments.study.tables import Interval, ratios
from moe_jax import data


def line(error=0.08):
  """Cases of two classes that a line separates: below 0 and above."""
  x = np.linspace(-1, 1, 8, dtype=np.float32)
  features = np.stack([x, x[::-1] ** 2], axis=-1)
  labels = (x > 0).astype(np.int32)
  cases = Cases(features, labels[:, None].astype(np.float32), labels)
  rates = (1.0, 2.0)
  return Problem(cases, cases, 'logistic', error, rates, ('no', 'yes'), 'line')


@functools.partial(jax.jit, static_argnames='model')
def one_step(model, params, features, targets, rate):
  """The squared error of one epoch, and the parameters of the next."""

  def loss(params):
    outputs = jacobs_runs.forward(model, params, features)
    p, o = outputs.gate_probs, outputs.expert_outputs
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
    lambda leaf: leaf[0], jacobs_runs.start(model, features, seed[None])
  )


def descend(model, problem, rate, seed, most):
  """One run by definition, in a Python loop."""
  features, targets = problem.train.features, problem.train.targets
  params = start_of(model, features, np.int32(seed))
  for epoch in range(most):
    squared, new = one_step(model, params, features, targets, rate)
    if squared <= problem.error:
      return epoch, params
    params = new
  return most, params


def test_runs_stop_where_a_loop_does():
  problem = line()
  model = problem.model(num_experts=3, loss='competitive')
  runs = jacobs_runs.train(model, problem, (0.5, 6.0), (4, 5), 150)
  assert runs.reached.tolist() == [[False, False], [True, True]]
  for r, rate in enumerate((0.5, 6.0)):
    for s, seed in enumerate((4, 5)):
      epochs, params = descend(model, problem, rate, seed, 150)
      assert runs.epochs[r, s] == epochs
      for name, value in params.items():
        np.testing.assert_allclose(
          runs.at(r)[name][s], value, rtol=1e-3, atol=1e-4
        )
  assert runs.epochs[1, 0] != runs.epochs[1, 1]


def test_a_run_is_given_up_where_another_rate_has_long_been_done():
  problem = line(error=0.15)
  model = problem.model(num_experts=3, loss='competitive')
  rates, seeds, most = (6.0, 0.5), (4, 5), 3000
  patient = jacobs_runs.train(model, problem, rates, seeds, most)
  assert patient.reached.all()
  hasty = jacobs_runs.train(model, problem, rates, seeds, most, patience=3)
  assert hasty.reached.tolist() == [[True, True], [False, False]]
  # A run that is given up counts as one that never reached the criterion,
  # whatever its number of epochs.
  assert patient.epochs[1].min() > 3 * patient.epochs[0].max()
  assert hasty.epochs.tolist() == [patient.epochs[0].tolist(), [most, most]]
  choose = jacobs_rows.best_rate
  assert choose([swept(rates, hasty)]) == choose([swept(rates, patient)]) == 6.0


def test_a_path_is_the_run_that_was_counted():
  problem = line()
  model = problem.model(num_experts=3, loss='competitive')
  path = jacobs_runs.path(model, problem, 6.0, 5, every=7, count=2)
  for step in (0, 1, 2):
    _, params = descend(model, problem, 6.0, 5, 7 * step)
    for name, value in params.items():
      np.testing.assert_allclose(path[name][step], value, rtol=1e-4, atol=1e-5)


def test_what_is_measured_of_a_gate():
  # Two experts divide the cases at x = 0: the first always outputs 0 and the
  # second 1, which is right everywhere. The third has no proportion.
  problem = line()
  params = {
    'expert_out': np.zeros((3, 2, 1)),
    'expert_out_bias': np.array([[-20.0], [20.0], [0.0]]),
    'gate_out': np.array([[-99.0, 99.0, 0.0], [0, 0, 0]]),
    'gate_out_bias': np.zeros(3),
  }
  params = {k: jnp.float32(v)[None] for k, v in params.items()}
  model = problem.model(num_experts=3, loss='competitive')
  measures = jacobs_measures.measured(model, problem, params)
  expected = {'train': 100, 'test': 100, 'alone': 100}
  expected |= {'experts in use': 2, 'experts ever heard': 2, 'gate entropy': 0}
  expected['I(expert; case)'] = np.log(2)  # each has half of the cases
  for name, value in expected.items():
    np.testing.assert_allclose(measures[name], [value], atol=1e-4)
  # With equal proportions all experts are heard, one is the likeliest, and none
  # decides.
  params['gate_out'] = jnp.zeros((1, 2, 3))
  measures = jacobs_measures.measured(model, problem, params)
  np.testing.assert_allclose(measures['gate entropy'], [np.log(3)], rtol=1e-5)
  assert measures['experts ever heard'] == 3 and measures['experts in use'] == 1
  np.testing.assert_allclose(measures['I(expert; case)'], [0], atol=1e-6)


def test_problems_have_the_papers_sizes():
  # With one output a mixture and its network have roughly equal numbers of
  # parameters, as the paper says.
  problem = jacobs_problems.problem(data.VowelsSource().classes(), 'pairs')
  sizes = {}
  for name, system in jacobs_claims.SYSTEMS.items():
    model = problem.model(**system)
    start = functools.partial(jacobs_runs.start, model)
    params = jax.eval_shape(start, problem.train.features, jnp.array([0]))
    sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert sizes['4 experts, competitive'] == 24
  assert sizes['8 experts, competitive'] == 48
  gate = 3  # the gate of a network's only expert, which is always 1
  assert sizes['BP, 6 hidden'] == 25 + gate
  assert sizes['BP, 12 hidden'] == 49 + gate


def test_targets_of_every_kind():
  source = data.VowelsSource().classes()
  labels = source.examples('train').labels
  pairs = jacobs_problems.problem(source, 'pairs').train.targets
  assert set(zip(labels.tolist(), pairs[:, 0].tolist(), strict=True)) == {
    (0, 0.0),
    (1, 1.0),
    (2, 0.0),
    (3, 1.0),
  }
  linear = jacobs_problems.problem(source, 'linear_pairs', 0.2)
  np.testing.assert_array_equal(linear.train.targets, pairs)
  assert linear.expert_output == 'linear' and linear.error == 0.2
  assert 'linear outputs' in linear.description and max(linear.rates) == 2
  one_hot = jacobs_problems.problem(source, 'one_hot').train.targets
  np.testing.assert_array_equal(one_hot.argmax(-1), labels)
  assert (one_hot.sum(-1) == 1).all()


def swept(rates, runs):
  """Results of runs by learning rate, as a table has them."""
  return {
    rate: [
      {'epochs': epochs, 'reached': 100.0 * reached}
      for epochs, reached in zip(*of_rate, strict=True)
    ]
    for rate, *of_rate in zip(rates, runs.epochs, runs.reached, strict=True)
  }


def sweep(epochs, reached):
  runs = jacobs_runs.Runs(np.array(epochs), np.array(reached), {})
  return swept(RATES, runs)


def test_the_best_rate_first_arrives_then_is_fast():
  epochs = [[9, 9], [5, 5], [4, 4], [7, 7], [8, 8], [9, 9]]
  yes = [[True, True]] * 6
  assert jacobs_rows.best_rate([sweep(epochs, yes)]) == RATES[2]
  # At the third rate one run does not reach the criterion.
  lossy = sweep(epochs, [*yes[:2], [True, False], *yes[3:]])
  assert jacobs_rows.best_rate([lossy]) == RATES[1]
  # The shared rate is chosen for all systems: 5 + 9 epochs at one rate, 7 + 1
  # at the other.
  other = sweep([[9, 9], [9, 9], [9, 9], [1, 1], [9, 9], [9, 9]], yes)
  assert jacobs_rows.best_rate([lossy, other]) == RATES[3]


def test_a_ratio_has_the_spread_of_both():
  # The means are 4 and 10. First only the base varies, then both in proportion.
  base = np.array([8.0, 12.0])
  quotients = ratios(np.array([4.0, 4.0]), base)
  np.testing.assert_allclose(quotients, [0.48, 0.32])  # 0.4 -+ 0.4 * 2 / 10
  assert Interval.of(quotients).mean == pytest.approx(0.4)
  np.testing.assert_allclose(ratios(0.4 * base, base), [0.4, 0.4])


def example_rows():
  """A row for each of the study's systems, with numbers of its own."""
  columns = {column.name for column in jacobs_claims.COLUMNS}
  names = [*jacobs_claims.SYSTEMS]
  names += [name + jacobs_claims.SHARED for name in names]
  return [
    Row(name, {column: [n + 0.1, n + 0.2, n] for column in columns})
    for n, name in enumerate(names)
  ]


def test_claims_have_rows_columns_and_verdicts():
  rows = example_rows()
  words = {verdicts.verdict(c, rows).word for c in jacobs_claims.CLAIMS}
  assert words >= {verdicts.REPRODUCED, verdicts.OPPOSITE}
  cells = [cell for c in jacobs_claims.CLAIMS for cell in c.published]
  assert 'jacobs1991/table1/BP, 12 hidden/mean_epochs' in cells


def test_arms_are_explored_then_chosen():
  study = jacobs_table1.STUDY
  arms = study.arms_of(study.presets['full'])
  shared = study.shared(study.presets['full'], 'linear_pairs')
  explored_arms = jacobs_rows.explored(arms, shared)
  rates = TARGETS['linear_pairs'].rates
  assert len(explored_arms) == len(jacobs_claims.SYSTEMS) * len(rates)
  # The third rate is the fastest of all systems but one, whose fastest is the
  # first.
  explored_results = {}
  for arm in explored_arms:
    best = 0 if arm.line == 'BP, 6 hidden' else 2
    epochs = 10 if arm.x == rates[best] else 20
    run = {'learning rate': arm.x, 'epochs': epochs, 'reached': 100.0}
    explored_results[arm.name] = [run, run]
  chosen = {
    arm.name: arm for arm in jacobs_rows.chosen(arms, explored_results, {})
  }
  assert len(chosen) == 2 * len(jacobs_claims.SYSTEMS)
  own_rate = chosen['BP, 6 hidden'].overrides['learning_rate']
  shared_rate = chosen['BP, 6 hidden' + jacobs_claims.SHARED].overrides
  assert (own_rate, shared_rate['learning_rate']) == (rates[0], rates[2])
  # Jobs can be made of all arms, and those of one system are one call.
  jobs = study.jobs(shared, list(chosen.values()), range(2), pathlib.Path('x'))
  groups = {study.runner.together(job) for job in jobs}
  assert groups == set(jacobs_claims.SYSTEMS)


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
    # Only one moment is drawn, as pictures of thirty take long.
    patch.setattr(jacobs_table1, 'MOMENTS', 1)
    return command.main(study, argv)


@pytest.mark.slow
def test_the_command_says_who_never_arrived(output_folder):
  folder = output_folder
  assert folder.name == 'full-seeds=2-steps=50'
  text = (folder / 'table.md').read_text()
  assert 'drawn around the means of Peterson and Barney' in text
  assert 'at most 50 epochs' in text
  assert 'experiments.jacobs_table1 --seeds=2 --steps=50`' in text
  assert 'did not reach the criterion in 50 epochs' in text
  assert '8 experts, gated: 2 of 2' in text
  assert '1124 (Table 1, secondary source) against 2209 (Table 1' in text
  summary = json.loads((folder / 'summary.json').read_text())
  assert len(summary['rows']) == 2 * len(jacobs_claims.SYSTEMS)
  words = [claim['verdict'] for claim in summary['claims']]
  assert len(words) == len(jacobs_claims.CLAIMS)
  assert set(words) <= set(verdicts.WORDS)
  lines = (folder / 'rows.csv').read_text().splitlines()
  assert '"BP, 12 hidden",epochs,,1,50.0' in lines
  for name in (results.PICTURE, 'boundaries.png'):
    assert (folder / name).read_bytes().startswith(b'\x89PNG')
  with Image.open(folder / 'boundaries.gif') as image:
    assert image.n_frames == 1 + 1  # the start, and a moment


def test_published_numbers_are_of_the_papers_task():
  study, count = dataclasses.replace(jacobs_table1.STUDY, remarks=''), {}
  for name in ('vowels', 'linear_pairs'):
    summary = results.summary_of(
      study, study.presets['full'], study.tasks[name], example_rows(), {}, {}
    )
    count[name] = sum(bool(c['published']) for c in summary['claims'])
  assert count['vowels'] > 3 and count['linear_pairs'] == 0


def test_boundaries_are_where_experts_decide():
  # The expert's output is 1 where x > 0.25, so that its line is vertical there.
  problem = line()
  params = {
    'expert_out': np.array([[[8.0], [0.0]]]),
    'expert_out_bias': np.array([[-2.0]]),
    'gate_out': np.zeros((2, 1)),
    'gate_out_bias': np.zeros(1),
  }
  model = problem.model(num_experts=1, loss='competitive')
  params = {k: jnp.float32(v)[None].repeat(3, 0) for k, v in params.items()}
  life = jacobs_figures.Life(model, params, 10)
  ax = Figure().subplots()
  jacobs_figures.draw(ax, problem, life, 1)
  lines = [
    path.vertices
    for collection in ax.collections
    for path in collection.get_paths()
    if len(path.vertices) > 50  # markers have fewer
  ]
  assert len(lines) == 2  # the expert's and the mixture's
  for boundary in lines:
    np.testing.assert_allclose(boundary[:, 0], 0.25, atol=1e-3)
  figure = jacobs_figures.boundaries(problem, {'one': life}, (0.0, 1.0))
  titles = [ax.get_title() for ax in figure.axes]
  assert titles == ['one, epoch 0', 'one, epoch 20']


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--config.data.kind=nothing'], "unknown source 'nothing'"),
    (['--config.data.kind=digits'], "'pairs' are of four classes"),
    (['--seeds=-1'], '--seeds: -1 must be at least 0'),
    (['--config.error=-1'], 'error=-1.0 must be at least 0'),
    (['--errors=1'], "unknown argument '--errors=1'"),
  ],
)
def test_bad_options_are_refused(argv, message, tmp_path, capsys):
  with pytest.raises(SystemExit):
    command.main(jacobs_table1.STUDY, [*argv, f'--output={tmp_path}'])
  assert message in capsys.readouterr().err


def test_pairs_are_of_four_classes(tmp_path):
  arrays = {
    f'{split}_{kind}': value
    for split in ('train', 'validation')
    for kind, value in (
      ('features', np.eye(3)),
      ('labels', np.arange(3)),
    )
  }
  np.savez(tmp_path / 'three.npz', **arrays)
  source = data.NpzSource(path=f'{tmp_path}/three.npz').classes()
  with pytest.raises(ValueError, match=r"'pairs' are of four.*has 3.*one_hot"):
    jacobs_problems.problem(source, 'pairs')
  assert jacobs_problems.problem(source, 'one_hot').train.targets.shape == (
    3,
    3,
  )
