"""The study of 2013: equations, digits, information, a run of seconds."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments import eigen_2013
from experiments.gates_2013 import deep_moe, digits, measures, training
from experiments.gates_2013.deep_moe import DeepMoe
from experiments.study import results as study_results
from experiments.study.parts import Arm, Preset
from tests import reference


def test_one_example_by_hand():
  # Three experts got 9, 3 and 0 of twelve examples, 4 each on average. The
  # first is ahead by 5, more than the margin of 4: its gate of 0.6 becomes 0,
  # and the others share it in the ratio of their gates, 3 to 1.
  totals = jnp.array([9.0, 3.0, 0.0])
  out = deep_moe.overused(totals, 4.0)
  np.testing.assert_array_equal(out, [True, False, False])
  logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
  gates = deep_moe.constrained_gates(logits, out)
  np.testing.assert_allclose(gates, [[0.0, 0.75, 0.25]], rtol=1e-6)
  # A lead equal to the margin is allowed.
  assert not deep_moe.overused(totals, 5.0).any()
  # With the example totals are 9, 3.75 and 0.25.
  new_totals = deep_moe.moved(totals, gates.sum(0))
  mean = (9 + 3.75 + 0.25) / 3
  np.testing.assert_allclose(
    new_totals, [9 - mean, 3.75 - mean, 0.25 - mean], rtol=1e-5
  )


def test_steps_follow_the_definition():
  E, T, B, margin = 5, 30, 7, 3.0
  rng = np.random.default_rng(E)
  logits = rng.normal(np.linspace(2, 0, E), 1.0, (T, B, E)).astype(np.float32)

  @jax.jit
  def step(totals, logits):
    out = deep_moe.overused(totals, margin)
    gates = deep_moe.constrained_gates(logits, out)
    return deep_moe.moved(totals, gates.sum(0)), gates

  _, balanced_gates = jax.lax.scan(step, jnp.zeros(E), jnp.asarray(logits))
  expected = reference.balanced_gates(logits, margin)
  np.testing.assert_allclose(balanced_gates, expected, rtol=1e-4, atol=1e-6)
  assert (expected == 0).any()


def test_equal_totals_whose_mean_is_rounded_let_all_in():
  rng = np.random.default_rng(0)
  totals = jnp.tile(rng.uniform(1, 2, (200, 1)).astype(np.float32), (1, 6))
  # Six totals are equal, and yet all can be above their mean in float32.
  assert (totals > totals.mean(-1, keepdims=True)).all(-1).any()
  assert not jax.vmap(lambda row: deep_moe.overused(row, 0.0))(totals).any()


def test_totals_of_a_long_run_lose_no_gate():
  # In 40 steps of a million examples each, totals differ by half an example,
  # which a float32 sum above 2^24 cannot represent.
  mass = jnp.array([2.0**20 + 0.5, 2.0**20])
  totals = jnp.zeros(2)
  for _ in range(40):
    totals = deep_moe.moved(totals, mass)
  np.testing.assert_allclose(totals, [10.0, -10.0])


B, V, SHAPE = 6, 10, (3, 5)
MODEL = DeepMoe((3, 2), (7, 8), (9, 10))


def drawn(seed=0):
  """Random parameters, examples and classes."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(B, *SHAPE)).astype(np.float32)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x)['params']
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes
  )
  return params, x, rng.integers(0, V, B).astype(np.int32)


def layer(p, x):
  """sum_i g_i(x) f_i(x), one example and one expert at a time."""
  mixtures, gates = [], []
  for row in x:
    h = np.maximum(row @ p['gate_in']['kernel'] + p['gate_in']['bias'], 0)
    g = reference.softmax(h @ p['gate_out']['kernel'] + p['gate_out']['bias'])
    experts = zip(p['w_in'], p['b_in'], strict=True)
    outputs = [np.maximum(row @ w + b, 0) for w, b in experts]
    mixtures.append(
      sum(weight * out for weight, out in zip(g, outputs, strict=True))
    )
    gates.append(g)
  return np.array(mixtures), np.array(gates)


def test_it_is_the_papers_equations():
  params, x, _ = drawn()
  z1, g1 = layer(params['layer_0'], x.reshape(B, -1))
  z2, g2 = layer(params['layer_1'], z1)
  last = params['classifier']
  logits, gates = jax.jit(MODEL.apply)({'params': params}, x)
  np.testing.assert_allclose(
    logits, z2 @ last['kernel'] + last['bias'], rtol=1e-4, atol=1e-5
  )
  for found, expected in zip(gates, (g1, g2), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_an_expert_that_sits_out_has_no_gate_and_learns_nothing():
  params, x, _ = drawn()
  sit_out = [jnp.array([True, False, False]), jnp.array([False, False])]

  def total(params):
    logits, gates = MODEL.apply({'params': params}, x, sit_out)
    return (logits**2).sum(), gates

  gradient, gates = jax.jit(jax.grad(total, has_aux=True))(params)
  assert not gates[0][:, 0].any() and gates[1].all()
  np.testing.assert_allclose(gates[0].sum(-1), 1, rtol=1e-5)
  assert not gradient['layer_0']['w_in'][0].any()
  assert gradient['layer_0']['w_in'][1].any()


def test_the_constraint_holds_until_it_is_lifted():
  params, x, labels = drawn()
  batch = digits.Digits(x, labels)
  options = training.Training(margin=2.0, balance_steps=2)
  sizes = dict(num_experts=(3, 2), hidden=(7, 8), gate_hidden=(9, 10))
  options = dataclasses.replace(options, **sizes)
  step = jax.jit(training.make_step(options, optax.sgd(0.0)))
  # Expert 1 of the first layer is ahead by more than the margin all the time.
  ahead = [jnp.array([-40.0, 80.0, -40.0]), jnp.zeros(2)]
  carry = params, optax.sgd(0.0).init(params), ahead, 0
  masses = []
  for _ in range(3):
    (params, state, totals, number), mass = step(carry, batch)
    masses.append(mass)
    carry = params, state, ahead, number
  assert [mass[0][1] == 0 for mass in masses] == [True, True, False]
  np.testing.assert_allclose(masses[0][0].sum(), B, rtol=1e-5)
  # Totals move by the sums of gates, less their mean.
  np.testing.assert_allclose(totals[1], masses[2][1] - B / 2, atol=1e-5)


def test_every_fifth_of_a_class_is_held_out():
  labels = np.array([0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1], np.int32)
  # The fifth 0 is at index 6 and the fifth 1 at index 10; neither class has a
  # tenth.
  assert np.flatnonzero(digits.is_held_out(labels)).tolist() == [6, 10]


def test_the_splits_are_apart_stratified_and_fixed():
  splits = digits.load('digits')
  counts = np.array([np.bincount(e.labels, minlength=10) for e in splits])
  assert counts.sum() == 1797
  np.testing.assert_array_equal(counts[1], counts.sum(0) // 5)
  assert splits[0].images.min() == 0 and splits[0].images.max() == 1
  # The stored results are of these images.
  assert digits.digest(splits, 14).startswith('25f98d915b07')


def test_batches_have_whole_images_at_every_place():
  # No pixel is background, so that the place shows; the number is the image's.
  numbers = np.arange(1, 6, dtype=np.float32)
  images = np.tile(numbers[:, None, None], (1, 8, 8))
  few = digits.Digits(images, np.arange(5, dtype=np.int32))
  batches = list(digits.batches(few, 14, 3, 20, 100))
  again = list(digits.batches(few, 14, 3, 20, 100))
  np.testing.assert_array_equal(batches[7].images, again[7].images)
  shifted = np.concatenate([batch.images for batch in batches])
  labels = np.concatenate([batch.labels for batch in batches])
  np.testing.assert_array_equal(shifted.max((1, 2)), labels + 1)
  # Every epoch has each image once, in another order.
  epochs = labels.reshape(-1, 5)
  assert (np.sort(epochs) == np.arange(5)).all()
  assert len(np.unique(epochs, axis=0)) > 50
  ink = shifted > 0
  np.testing.assert_array_equal(ink.sum((1, 2)), 64)
  rows, columns = ink.any(2).argmax(1), ink.any(1).argmax(1)
  counts = np.bincount(7 * rows + columns, minlength=49)
  # Each place is expected 41 times; five standard deviations are 32.
  assert len(counts) == 49 and counts.min() > 9 and counts.max() < 73


# Registered, it would be the 'mnist' of all other tests of the process.
class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset of images in which the pixel of their number is white."""

  VERSION = tfds.core.Version('3.0.1')  # that of TFDS
  SHAPE = (3, 4, 1)

  def _info(self):
    features = {
      'image': tfds.features.Image(shape=self.SHAPE, encoding_format='png'),
      'label': tfds.features.ClassLabel(names=['odd', 'even']),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    numbers = {'train': range(8), 'test': range(8, 12)}
    return {k: self._generate_examples(v) for k, v in numbers.items()}

  def _generate_examples(self, numbers):
    for i in numbers:
      image = np.zeros(self.SHAPE, np.uint8)
      image.reshape(-1, self.SHAPE[-1])[i] = 255
      # TFDS would encode a numpy array with TensorFlow.
      image = Image.fromarray(image.squeeze())
      yield i, {'image': image, 'label': 'odd' if i % 2 else 'even'}


@pytest.mark.slow
def test_mnist_is_that_of_tfds(tmp_path, monkeypatch):
  dataset = Mnist(data_dir=tmp_path, file_format='array_record')
  dataset.download_and_prepare()
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  digits.load.cache_clear()
  train, validation = digits.load('mnist')
  digits.load.cache_clear()
  assert (len(train.labels), len(validation.labels)) == (8, 4)
  for images, labels in (train, validation):
    assert images.max(axis=(1, 2)).tolist() == [1.0] * len(labels)
    spot = images.reshape(len(labels), -1).argmax(1)
    np.testing.assert_array_equal(labels, (spot + 1) % 2)


def entropy(*p):
  return -sum(q * math.log(q) for q in p if q)


def test_information_of_two_labels_by_hand():
  # Two labels are equally likely. One has gates of 0.9 and 0.1, and the other
  # 0.1 and 0.9: the information is ln 2, the entropy of the mean, less the
  # entropy for each label.
  gates = np.array([[0.9, 0.1], [0.1, 0.9]])
  information = measures.mutual_information(gates, np.array([0.5, 0.5]))
  np.testing.assert_allclose(information, math.log(2) - entropy(0.9, 0.1))
  # A rare label carries less information; mean gates are 0.7 and 0.3.
  information = measures.mutual_information(gates, np.array([0.75, 0.25]))
  np.testing.assert_allclose(information, entropy(0.7, 0.3) - entropy(0.9, 0.1))
  certain = np.eye(4)
  information = measures.mutual_information(certain, np.full(4, 0.25))
  np.testing.assert_allclose(information, math.log(4))


def cyclic_labels(N=60, C=4):
  return np.arange(N) % C


def test_gates_that_follow_the_place_say_nothing_of_the_class():
  # There are six places, of which each expert has two; all images are equal.
  place_gates = np.eye(3)[np.arange(6) // 2]
  gates = np.tile(place_gates, (60, 1, 1))
  information = measures.about_place(gates)
  np.testing.assert_allclose(information.measured, math.log(3))
  assert 0 < information.by_chance < 0.1
  assert measures.about_class(gates, cyclic_labels()) == (0.0, 0.0)


def test_gates_that_follow_the_class_say_nothing_of_the_place():
  # Expert 0 has classes 0 and 1, expert 1 class 2, and expert 2 class 3.
  labels = cyclic_labels()
  label_gates = np.eye(3)[np.array([0, 0, 1, 2])[labels]]
  gates = np.repeat(label_gates[:, None], 6, axis=1)
  information = measures.about_class(gates, labels)
  np.testing.assert_allclose(information.measured, entropy(0.5, 0.25, 0.25))
  assert 0 < information.by_chance < 0.1
  about_place = measures.about_place(gates)
  np.testing.assert_allclose(about_place, 0, atol=1e-12)


def test_independent_gates_have_no_excess():
  # Gates are random for every image, so that the estimate is only bias: (E -
  # 1)(C - 1) / 2N in the limit of one-hot gates, and none in the excess.
  images = 40
  rng, labels = np.random.default_rng(0), cyclic_labels(images)
  found = []
  for seed in range(20):
    one_hot = np.eye(3)[rng.integers(0, 3, images)]
    gates = np.repeat(one_hot[:, None], 2, axis=1)
    found.append(measures.about_class(gates, labels, seed))
  bias = 2 * 3 / (2 * images)
  np.testing.assert_allclose(
    np.mean([i.measured for i in found]), bias, rtol=0.35
  )
  excess = [i.excess for i in found]
  error = np.std(excess, ddof=1) / math.sqrt(20)
  assert abs(np.mean(excess)) < 3 * error < bias


STUDY = eigen_2013.STUDY


def depth_of(arm) -> int:
  return len(arm.overrides['num_experts'])


@pytest.fixture(scope='module')
def results(tmp_path_factory):
  """Results of runs of six steps with few units, with the lifted constraint."""
  preset, by_arm = Preset(6, 1), {}
  folder = tmp_path_factory.mktemp('eigen')
  for arm in STUDY.arms_of(preset):
    if arm.name.startswith('lifted'):
      units = {'hidden': (12, 8), 'gate_hidden': (6, 5)}
      small_sizes = {
        name: sizes[: depth_of(arm)] for name, sizes in units.items()
      }
      arm = Arm(arm.name, {**arm.overrides, **small_sizes, 'batch_size': 8})
      shared = STUDY.shared(preset)
      ((job,),) = STUDY.runs(preset, shared, [arm], [0], folder)
      STUDY.runner([job])
      by_arm[arm.name] = [job.result()]
  return by_arm


@pytest.mark.slow
def test_a_run_has_what_the_table_shows(results):
  deep = results[eigen_2013.BALANCED][0]
  for column in STUDY.columns:
    assert math.isfinite(column.of(deep)), column.name
  single = results[eigen_2013.row_name('lifted', 1)][0]
  assert 'layer_1/place' in single and 'layer_2/place' not in single
  for i in (1, 2):
    by_place = np.array(deep[f'layer_{i}/by_place'])
    by_class = np.array(deep[f'layer_{i}/by_class'])
    np.testing.assert_allclose(by_place.sum(0), np.ones((7, 7)), atol=1e-4)
    # The mean over places and the mean over classes are the same.
    counts = np.bincount(digits.load('digits')[1].labels)
    share = counts / counts.sum()
    np.testing.assert_allclose(
      by_place.mean((1, 2)), by_class @ share, atol=1e-4
    )


@pytest.mark.slow
def test_its_claims_are_about_its_rows(results):
  preset = STUDY.presets['full']
  arms = STUDY.arms_of(preset)
  by_arm = {  # with two seeds
    arm.name: results[eigen_2013.row_name('lifted', depth_of(arm))] * 2
    for arm in arms
  }
  rows = STUDY.make_rows(arms, by_arm, {})
  task = STUDY.tasks[STUDY.task]
  summary = study_results.summary_of(STUDY, preset, task, rows, by_arm, {})
  assert len(summary['claims']) == len(STUDY.claims)
  json.dumps(summary)
  steps = [a.overrides['balance_steps'] for a in arms]
  assert steps == [0, -1, preset.steps // 2] * 2 + [0]
