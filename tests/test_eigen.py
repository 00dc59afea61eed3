"""The study of 2013: information by definition, and a run of seconds."""

import json
import math

import numpy as np
import pytest

from experiments import eigen_2013
from experiments.gates_2013 import digits, measures
from experiments.study import results as study_results
from experiments.study.parts import Arm, Preset


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
