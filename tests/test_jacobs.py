"""1991's table: epochs counted as told, runs that fail said, figures drawn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import jacobs_table1
from experiments.origins_1991 import (
  jacobs_claims,
  jacobs_figures,
  jacobs_measures,
  jacobs_problems,
  jacobs_runs,
)
from experiments.origins_1991.jacobs_problems import (
  RATES,
  TARGETS,
  Cases,
  Problem,
)
from experiments.study import results
from experiments.study.study import Row
from experiments.study.tables import Interval, ratios
from moe_jax.data import open_classes
from moe_jax.models.adaptive import AdaptiveMixture


def line(error=0.08):
  """Cases that one line parts: below 0 and above."""
  x = np.linspace(-1, 1, 8, dtype=np.float32)
  features = np.stack([x, x[::-1] ** 2], axis=-1)
  labels = (x > 0).astype(np.int32)
  cases = Cases(features, labels[:, None].astype(np.float32), labels)
  rates = (1.0, 2.0)
  return Problem(cases, cases, 'logistic', error, rates, ('no', 'yes'), 'line')


def descend(config, problem, rate, seed, most):
  """The definition: one run, in a Python loop."""
  model = AdaptiveMixture(config)
  params = jax.tree.map(
    lambda leaf: leaf[0],
    jacobs_runs.start(model, problem.train.features, jnp.array([seed])),
  )
  targets = problem.train.targets

  def loss(params):
    outputs = jacobs_runs.forward(model, params, problem.train.features)
    p, o = outputs.gate_probs, outputs.expert_outputs
    distances = ((targets[:, None] - o) ** 2).sum(-1)
    found = -jnp.log((p * jnp.exp(-distances / 2)).sum(-1))
    blend = (p[..., None] * o).sum(1)
    return found.mean(), ((targets - blend) ** 2).sum(-1).mean()

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  for epoch in range(most):
    (_, squared), gradient = step(params)
    if squared <= problem.error:
      return epoch, params
    params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
  return most, params


def test_runs_stop_where_a_loop_does():
  problem = line()
  config = problem.config(num_experts=3, loss='competitive')
  runs = jacobs_runs.train(config, problem, (0.5, 6.0), (4, 5), 150)
  assert runs.reached.tolist() == [[False, False], [True, True]]
  for r, rate in enumerate((0.5, 6.0)):
    for s, seed in enumerate((4, 5)):
      epochs, params = descend(config, problem, rate, seed, 150)
      assert runs.epochs[r, s] == epochs
      for name, value in params.items():
        np.testing.assert_allclose(
          runs.at(r)[name][s], value, rtol=1e-3, atol=1e-4
        )
  assert runs.epochs[1, 0] != runs.epochs[1, 1]


def test_a_run_is_given_up_where_another_rate_has_long_been_done():
  problem = line(error=0.15)
  config = problem.config(num_experts=3, loss='competitive')
  rates, seeds, most = (6.0, 0.5), (4, 5), 3000
  patient = jacobs_runs.train(config, problem, rates, seeds, most)
  assert patient.reached.all()
  hasty = jacobs_runs.train(config, problem, rates, seeds, most, patience=3)
  assert hasty.reached.tolist() == [[True, True], [False, False]]
  # Who was given up counts as one that never arrived, whenever that was.
  assert patient.epochs[1].min() > 3 * patient.epochs[0].max()
  assert hasty.epochs.tolist() == [patient.epochs[0].tolist(), [most, most]]
  choose = jacobs_runs.best_rate
  assert choose(rates, [hasty]) == choose(rates, [patient]) == 6.0


def test_a_path_is_the_run_that_was_counted():
  problem = line()
  config = problem.config(num_experts=3, loss='competitive')
  path = jacobs_runs.path(config, problem, 6.0, 5, every=7, count=2)
  for step in (0, 1, 2):
    _, params = descend(config, problem, 6.0, 5, 7 * step)
    for name, value in params.items():
      np.testing.assert_allclose(path[name][step], value, rtol=1e-4, atol=1e-5)


def test_what_is_measured_of_a_gate():
  # Two experts parted at x = 0: the first always says 0, the second 1, which
  # is right everywhere. The third is never heard.
  problem = line()
  params = {
    'expert_out': np.zeros((3, 2, 1)),
    'expert_out_bias': np.array([[-20.0], [20.0], [0.0]]),
    'gate_out': np.array([[-99.0, 99.0, 0.0], [0, 0, 0]]),
    'gate_out_bias': np.zeros(3),
  }
  params = {k: jnp.float32(v)[None] for k, v in params.items()}
  config = problem.config(num_experts=3, loss='competitive')
  found = jacobs_measures.measured(config, problem, params)
  expected = {'train': 100, 'test': 100, 'alone': 100}
  expected |= {'experts in use': 2, 'experts ever heard': 2, 'gate entropy': 0}
  expected['I(expert; case)'] = np.log(2)  # each has half of the cases
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], [value], atol=1e-4)
  # With equal proportions all are heard, one is the likeliest, no one decides.
  params['gate_out'] = jnp.zeros((1, 2, 3))
  found = jacobs_measures.measured(config, problem, params)
  np.testing.assert_allclose(found['gate entropy'], [np.log(3)], rtol=1e-5)
  assert found['experts ever heard'] == 3 and found['experts in use'] == 1
  np.testing.assert_allclose(found['I(expert; case)'], [0], atol=1e-6)


def test_problems_have_the_papers_sizes():
  # A mixture and its network are roughly equal in parameters, as the paper
  # says, where there is one output.
  problem = jacobs_problems.problem(open_classes('vowels'), 'pairs')
  sizes = {}
  for name, system in jacobs_claims.SYSTEMS.items():
    model = AdaptiveMixture(problem.config(**system))
    params = jacobs_runs.start(model, problem.train.features, jnp.array([0]))
    sizes[name] = sum(leaf[0].size for leaf in jax.tree.leaves(params))
  assert sizes['4 experts, competitive'] == 24
  assert sizes['8 experts, competitive'] == 48
  gate = 3  # of a network's only expert, which is always 1
  assert sizes['BP, 6 hidden'] == 25 + gate
  assert sizes['BP, 12 hidden'] == 49 + gate


def test_targets_of_every_kind():
  source = open_classes('vowels')
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
  assert 'linear outputs' in linear.says and max(linear.rates) == 2
  one_hot = jacobs_problems.problem(source, 'one_hot').train.targets
  np.testing.assert_array_equal(one_hot.argmax(-1), labels)
  assert (one_hot.sum(-1) == 1).all()


def sweep(epochs, reached):
  return jacobs_runs.Runs(np.array(epochs), np.array(reached), {})


def test_the_best_rate_first_arrives_then_is_fast():
  yes = [[True, True]] * 6
  slow_first = sweep([[9, 9], [5, 5], [4, 4], [7, 7], [8, 8], [9, 9]], yes)
  assert jacobs_runs.best_rate(RATES, [slow_first]) == RATES[2]
  # At the third rate one run does not arrive.
  lossy = slow_first._replace(
    reached=np.array([*yes[:2], [True, False], *yes[3:]])
  )
  assert jacobs_runs.best_rate(RATES, [lossy]) == RATES[1]
  # The shared one is of all systems: 5 + 9 epochs there, 7 + 1 here.
  other = sweep([[9, 9], [9, 9], [9, 9], [1, 1], [9, 9], [9, 9]], yes)
  assert jacobs_runs.best_rate(RATES, [lossy, other]) == RATES[3]


def test_a_ratio_has_the_spread_of_both():
  # 4 against 10 on average; what varies is the base alone, then both alike.
  base = np.array([8.0, 12.0])
  found = ratios(np.array([4.0, 4.0]), base)
  np.testing.assert_allclose(found, [0.48, 0.32])  # 0.4 -+ 0.4 * 2 / 10
  assert Interval.of(found).mean == pytest.approx(0.4)
  np.testing.assert_allclose(ratios(0.4 * base, base), [0.4, 0.4])


def test_claims_have_rows_columns_and_verdicts():
  columns = {column.name for column in jacobs_claims.COLUMNS}
  names = [*jacobs_claims.SYSTEMS]
  names += [name + jacobs_claims.SHARED for name in names]
  rows = [
    Row(name, {column: [n + 0.1, n + 0.2, n] for column in columns})
    for n, name in enumerate(names)
  ]
  words = {results.verdict(c, rows).word for c in jacobs_claims.CLAIMS}
  assert words >= {results.REPRODUCED, results.OPPOSITE}
  cells = [cell for c in jacobs_claims.CLAIMS for cell in c.published]
  assert 'jacobs1991/table1/BP, 12 hidden/mean_epochs' in cells


def test_published_numbers_are_of_the_papers_task():
  def published(*argv, targets='pairs'):
    options = jacobs_table1.parse(argv)
    claims = jacobs_table1.claims_of(options, targets)
    assert len(claims) == len(jacobs_claims.CLAIMS)
    return sum(bool(claim.published) for claim in claims)

  assert published() == published('--data=files:a.txt') > 3
  assert published('--error=0.3') == published('--data=files:a.npz') == 0
  assert published('--data=digits', targets='one_hot') == 0
  assert published(targets='linear_pairs') == 0


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """What the command writes, of two seeds that are given up at once."""
  output = tmp_path_factory.mktemp('results')
  argv = ['--seeds=2', '--max-epochs=50', f'--output={output}']
  with pytest.MonkeyPatch.context() as patch:
    kind = TARGETS['pairs']._replace(rates=(8.0,))
    patch.setitem(TARGETS, 'pairs', kind)
    patch.setattr(jacobs_table1, 'EXPLORED', range(9, 11))
    return jacobs_table1.main(argv)


def test_the_command_says_who_never_arrived(folder):
  assert folder.name == 'full-seeds=2-max-epochs=50'
  text = (folder / 'table.md').read_text()
  assert 'drawn around the means of Peterson and Barney' in text
  assert 'at most 50 epochs' in text
  assert 'experiments.jacobs_table1 --seeds=2 --max-epochs=50`' in text
  assert 'did not reach the criterion in 50 epochs' in text
  assert '8 experts, gated: 2 of 2' in text
  assert '1124 (Table 1, secondary source) against 2209 (Table 1' in text
  summary = json.loads((folder / 'summary.json').read_text())
  assert len(summary['rows']) == 2 * len(jacobs_claims.SYSTEMS)
  verdicts = [claim['verdict'] for claim in summary['claims']]
  assert len(verdicts) == len(jacobs_claims.CLAIMS)
  assert set(verdicts) <= set(results.WORDS)
  lines = (folder / 'rows.csv').read_text().splitlines()
  assert '"BP, 12 hidden",epochs,,1,50.0' in lines
  sweeps = json.loads((folder / 'sweep.json').read_text())
  assert sweeps['BP, 6 hidden']['8'] == {'epochs': 50.0, 'reached': 0.0}
  for name in ('figure.png', 'boundaries.png'):
    assert (folder / name).read_bytes().startswith(b'\x89PNG')


def test_boundaries_are_where_experts_decide():
  # An expert that says yes where x > 0.25: its line is there, upright.
  problem = line()
  params = {
    'expert_out': np.array([[[8.0], [0.0]]]),
    'expert_out_bias': np.array([[-2.0]]),
    'gate_out': np.zeros((2, 1)),
    'gate_out_bias': np.zeros(1),
  }
  config = problem.config(num_experts=1, loss='competitive')
  params = {k: jnp.float32(v)[None].repeat(3, 0) for k, v in params.items()}
  life = jacobs_figures.Life(config, params, 10)
  ax = Figure().subplots()
  jacobs_figures.draw(ax, problem, life, 1)
  lines = [
    path.vertices
    for collection in ax.collections
    for path in collection.get_paths()
    if len(path.vertices) > 50  # no marker has so many
  ]
  assert len(lines) == 2  # the expert's and the blend's
  for found in lines:
    np.testing.assert_allclose(found[:, 0], 0.25, atol=1e-3)
  figure = jacobs_figures.boundaries(problem, {'one': life}, (0.0, 1.0))
  titles = [ax.get_title() for ax in figure.axes]
  assert titles == ['one, epoch 0', 'one, epoch 20']


def test_an_animation_has_a_frame_a_step(tmp_path):
  from PIL import Image

  problem = line()
  config = problem.config(num_experts=2, loss='competitive')
  path = jacobs_runs.path(config, problem, 6.0, 0, every=5, count=2)
  life = jacobs_figures.Life(config, path, 5)
  moving = jacobs_figures.animation(problem, {'two': life})
  moving.save(tmp_path / 'a.gif', writer='pillow', dpi=30)
  with Image.open(tmp_path / 'a.gif') as image:
    assert image.n_frames == 3


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--data=nothing'], "unknown source of the task 'classes' 'nothing'"),
    (['--seeds=0'], '--seeds=0 is below 1'),
    (['--error=-1'], '--error=-1.0 is negative'),
  ],
)
def test_bad_options_are_refused(argv, message, capsys):
  with pytest.raises(SystemExit):
    jacobs_table1.main(argv)
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
  source = open_classes(f'npz:{tmp_path}/three.npz')
  with pytest.raises(ValueError, match=r"'pairs' are of four.*has 3.*one_hot"):
    jacobs_problems.problem(source, 'pairs')
  assert jacobs_problems.problem(source, 'one_hot').train.targets.shape == (
    3,
    3,
  )
