"""The study of 1991: its errors by hand, its vowels, its table."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import jacobs_table1
from experiments.origins_1991 import descent, mixture, vowels
from experiments.origins_1991.descent import TARGETS, Cases, Descent
from experiments.origins_1991.mixture import LOSSES, Mixture
from experiments.study import command, results
from experiments.study.parts import Row
from experiments.study.tables import ratios
from moe_jax.analysis.intervals import Interval
from tests.reference import softmax

N, E, V = 3, 4, 2
loss_of = {name: jax.jit(function) for name, function in LOSSES.items()}
gradients_of = {
  name: jax.jit(
    jax.grad(lambda o, x, d, f=function: f(o, x, d).sum(), argnums=(0, 1))
  )
  for name, function in LOSSES.items()
}
each_loss = pytest.mark.parametrize('loss', LOSSES)


def case(seed=0, spread=1.5):
  """Random outputs, gate logits and targets."""
  rng = np.random.default_rng(seed)
  outputs = rng.normal(0, spread, (N, E, V))
  return outputs, rng.normal(0, 1, (N, E)), rng.normal(0, 1, (N, V))


def by_hand(loss, outputs, gate_logits, targets):
  """The errors, and the published gradients, in a loop over cases, float64."""
  losses, of_outputs, of_logits = [], [], []
  for o, x, d in zip(outputs, gate_logits, targets, strict=True):
    p = softmax(x)
    distances = ((d - o) ** 2).sum(-1)
    blended = sum(p[i] * o[i] for i in range(E))
    if loss == 'cooperative':
      losses.append(((d - blended) ** 2).sum())
      of_outputs.append(-2 * p[:, None] * (d - blended))
      of_logits.append(-2 * p * ((d - blended) * (o - blended)).sum(-1))
    elif loss == 'gated':
      losses.append(p @ distances)
      of_outputs.append(-2 * p[:, None] * (d - o))
      of_logits.append(p * (distances - losses[-1]))
    else:
      joint = p * np.exp(-distances / 2)
      h = joint / joint.sum()
      losses.append(-np.log(joint.sum()))
      of_outputs.append(-h[:, None] * (d - o))
      of_logits.append(p - h)
  return map(np.array, (losses, of_outputs, of_logits))


@each_loss
def test_errors_and_gradients_are_the_published_ones(loss):
  expected, *published = by_hand(loss, *case())
  values = [jnp.asarray(value, jnp.float32) for value in case()]
  np.testing.assert_allclose(loss_of[loss](*values), expected, rtol=1e-5)
  for found, by_paper in zip(gradients_of[loss](*values), published):
    np.testing.assert_allclose(found, by_paper, rtol=2e-5, atol=2e-6)


def test_far_targets_stay_finite():
  # exp(-||d - o||^2 / 2) is 0 in float32, but the log of the sum is finite.
  example = jnp.array([[[0.0], [1.0]]]), jnp.zeros((1, 2)), jnp.array([[30.0]])
  # The nearer expert has all of the posterior.
  np.testing.assert_allclose(
    loss_of['competitive'](*example), [29.0**2 / 2 + np.log(2)], rtol=1e-6
  )
  assert jnp.isfinite(gradients_of['competitive'](*example)[1]).all()


def test_a_mixture_is_a_loop_over_its_experts():
  shapes = dict(
    expert_in=(E, 5, 6),
    expert_in_bias=(E, 6),
    expert_out=(E, 6, V),
    expert_out_bias=(E, V),
    gate_out=(5, E),
    gate_out_bias=(E,),
  )
  rng = np.random.default_rng(3)
  w = {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}
  x = rng.normal(size=(N, 5)).astype(np.float32)
  model = Mixture(E, expert_hidden=6, output='softmax', num_outputs=V)
  outputs = jax.jit(model.apply)({'params': w}, x)
  for n in range(N):
    p = softmax(x[n] @ w['gate_out'] + w['gate_out_bias'])
    experts = []
    for i in range(E):
      hidden = x[n] @ w['expert_in'][i] + w['expert_in_bias'][i]
      o = (1 / (1 + np.exp(-hidden))) @ w['expert_out'][i]
      experts.append(softmax(o + w['expert_out_bias'][i]))
    tolerance = dict(rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(outputs.experts[n], experts, **tolerance)
    np.testing.assert_allclose(outputs.gate_probs[n], p, **tolerance)
    np.testing.assert_allclose(outputs.prediction[n], p @ experts, **tolerance)


def test_what_a_linear_expert_says():
  # Weights are 1 and 2, the input is (1, 0.5) and the bias 1: the output is 3,
  # or the logistic of 3; a softmax over one output is always 1.
  params = {
    'expert_out': jnp.array([[[1.0], [2.0]]]),
    'expert_out_bias': jnp.array([[1.0]]),
    'gate_out': jnp.ones((2, 1)),
    'gate_out_bias': jnp.ones(1),
  }
  x = jnp.array([[1.0, 0.5]])
  for output, expected in (('linear', 3.0), ('logistic', 0.9526)):
    y = Mixture(1, output=output).apply({'params': params}, x).prediction
    np.testing.assert_allclose(y, [[expected]], atol=1e-4)


def test_it_starts_with_equal_proportions_and_different_experts():
  x = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
  model = Mixture(E, num_outputs=V)
  outputs, variables = jax.jit(model.init_with_output)(jax.random.key(1), x)
  np.testing.assert_array_equal(outputs.gate_probs, np.full((N, E), 1 / E))
  experts = np.asarray(outputs.experts)
  assert all((experts[:, 0] != experts[:, i]).all() for i in range(1, E))
  largest = max(abs(leaf).max() for leaf in jax.tree.leaves(variables))
  assert 0.4 < largest <= mixture.INIT_SCALE


HEADER = ('Type', 'Sex', 'Speaker', 'Vowel', 'IPA', 'F0', 'F1', 'F2', 'F3')
# A man's vowels [i], twice, and [ah] once, as in the file; [E] of 'head' is not
# among the four classes.
ONES = [
  ('iy', 160, 240, 2280, 2850),
  ('*iy', 186, 280, 2400, 2790),
  ('eh', 160, 500, 1800, 2500),
  ('ah', 155, 620, 1200, 2550),
]


def table(speakers=52):
  """Returns lines of a table in which all speakers have equal vowels."""
  return [
    ('m', 'm', n + 1, vowel, 'x', *formants)
    for n in range(speakers)
    for vowel, *formants in ONES
  ]


def read(folder, lines, header=HEADER):
  text = '\n'.join('\t'.join(map(str, line)) for line in (header, *lines))
  (folder / 'table.tsv').write_text(text + '\n')
  return vowels.load(f'{folder}/table.tsv')


def test_a_table_is_read(tmp_path):
  train, test = read(tmp_path, table())
  # The first 50 of 52 speakers are for training; each has three vowels of the
  # four classes.
  assert len(train.labels) == 150 and len(test.labels) == 6
  np.testing.assert_allclose(
    test.features[:3], [[0.24, 2.28], [0.28, 2.4], [0.62, 1.2]]
  )
  assert test.labels[:3].tolist() == [0, 0, 3]


@pytest.mark.parametrize(
  ('column', 'value', 'message'),
  [
    (6, 'x', 'line 7: .*could not convert'),
    (7, 0, 'line 7: .*no formants'),
    (3, 'zz', 'line 7: .*no vowel of'),
  ],
)
def test_a_bad_table_is_refused(column, value, message, tmp_path):
  lines = [list(line) for line in table()]
  lines[5][column] = value
  with pytest.raises(ValueError, match=message):
    read(tmp_path, lines)


def test_drawn_speakers_are_the_same_at_every_call():
  train, test = vowels.load()
  assert (len(train.labels), len(test.labels)) == (50 * 4 * 2, 25 * 4 * 2)
  np.testing.assert_array_equal(train.features, vowels.load()[0].features)
  # The stored results are of these speakers.
  assert vowels.digest((train, test)).startswith('de2a21f08002')


def formants(group, draws=40):
  """Returns formants of simulated studies, [speakers, vowels, repeats, 2]."""
  names = list(vowels.SPEAKERS)
  first = sum(vowels.SPEAKERS[name] for name in names[: names.index(group)])
  own = slice(first, first + vowels.SPEAKERS[group])
  tokens = [np.array(vowels.drawn(seed))[:, 2:] for seed in range(draws)]
  return np.concatenate([t.reshape(75, 4, 2, 2)[own] for t in tokens])


@pytest.mark.parametrize('group', sorted(vowels.SPEAKERS))
def test_drawn_vowels_have_the_published_means_and_the_stated_spreads(group):
  samples = formants(group)
  # The mean of a lognormal with so small a spread lies half a per cent above
  # its median; the mean over 40 x 14 children is known to half a per cent.
  mean = samples.mean((0, 2))
  np.testing.assert_allclose(mean, vowels.MEANS[group], rtol=0.02)
  logs = np.log(samples)
  token_spread = (logs[:, :, 0] - logs[:, :, 1]).std((0, 1)) / 2**0.5
  np.testing.assert_allclose(token_spread, vowels.OF_TOKEN, rtol=0.06)
  variances = np.square(
    [*zip(vowels.OF_SPEAKER, vowels.OF_VOWEL, vowels.OF_TOKEN)]
  )
  np.testing.assert_allclose(
    logs.std((0, 2)), [np.sqrt(variances.sum(1))] * 4, rtol=0.08
  )
  # The covariance of a speaker's different vowels is the speaker's own
  # variance.
  speaker_spread = np.cov(logs[:, 0, 0, 0], logs[:, 3, 0, 0])[0, 1] ** 0.5
  np.testing.assert_allclose(speaker_spread, vowels.OF_SPEAKER[0], rtol=0.15)


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
    losses = LOSSES['competitive'](
      outputs.experts, outputs.gate_logits, targets
    )
    return losses.mean(), ((targets - outputs.prediction) ** 2).sum(-1).mean()

  gradient, squared = jax.grad(loss, has_aux=True)(params)
  new = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
  return squared, new


def descend(rate, params):
  """One run by definition, in a Python loop."""
  cases = line()
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
  for s in range(2):
    epochs, last = descend(rate, {k: v[s] for k, v in params.items()})
    assert runs.epochs[s] == epochs
    for name, value in last.items():
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
