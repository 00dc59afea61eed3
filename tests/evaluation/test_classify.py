"""Accuracy over rows that do not fill their batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import evaluation, generate, run_config
from moe_jax.configs import base
from moe_jax.data import ClassRows, NpzSource
from moe_jax.distributed import Placing
from moe_jax.evaluation import ClassifyEvaluation, LossEvaluation, classify
from moe_jax.models import AdaptiveOptions
from moe_jax.sections import merge
from moe_jax.training import loop
from tests import golden
from tests.training import tiny
from tests.training.test_evaluate import stopped_before


def placing():
  device = jax.local_devices()[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  return Placing(sharding, 3, microbatches=3)


def test_told(tmp_path):
  # The model has one expert, whose second output is the feature: it predicts
  # class 1 where the feature is above 0.
  features = np.array([[1.0], [-1.0], [2.0], [-2.0], [3.0]])
  labels = np.array([1, 0, 0, 0, 1])  # the third is labelled wrongly
  arrays = {
    f'{split}_{kind}': array
    for split in ('train', 'validation')
    for kind, array in (('features', features), ('labels', labels))
  }
  np.savez(tmp_path / 'a.npz', **arrays)
  source = NpzSource(path=f'{tmp_path}/a.npz').classes()
  rows = ClassRows(source, 'validation')
  mixture = AdaptiveOptions().adaptive
  mixture = dataclasses.replace(mixture, num_experts=1, expert_output='linear')
  model = AdaptiveOptions(
    vocab_size=2, feature_shape=(1,), adaptive=mixture
  ).build()
  params = {
    'expert_out': jnp.array([[[0.0, 1.0]]]),
    'expert_out_bias': jnp.zeros((1, 2)),
    'gate_out': jnp.zeros((1, 1)),
    'gate_out_bias': jnp.zeros(1),
  }
  # Batches have three rows; the second batch has one row of padding, which does
  # not count.
  measure = classify.Classify(model, 0, 3, rows, placing())
  metrics = measure({'params': params}, 7)
  assert metrics == {
    'accuracy': pytest.approx(80.0),
    'standard_error': pytest.approx(100 * np.sqrt(0.8 * 0.2 / 5)),
    'chance': 50.0,
    'items': 5,
  }
  stopped_before(1, measure, {'params': params})


def test_a_finished_run_is_asked_again(tmp_path, capsys):
  config = merge(golden.config('jacobs_vowels'), {'total_steps': 2})
  loop.train_and_evaluate(
    run_config.read(config), tmp_path, devices=jax.devices()[:1]
  )
  printed = capsys.readouterr().out
  metrics = evaluation.evaluate(tmp_path, ClassifyEvaluation())
  assert f'evaluation classes: accuracy {metrics["accuracy"]:.4g}, ' in printed
  assert metrics['items'] == 200 and metrics['chance'] == 25
  loss = evaluation.evaluate(tmp_path, LossEvaluation())
  assert np.isfinite(loss['loss'])
  with pytest.raises(SystemExit):
    generate.main([f'--workdir={tmp_path}', '--prompt=i'])
  assert 'AdaptiveMixture does not generate' in capsys.readouterr().err


def test_a_language_model_says_no_classes(tmp_path):
  config = tiny.config().unlock()
  config.evals = {'c': base.classify_evaluation()}
  config.checkpoint.keep_best = False
  with pytest.raises(ValueError, match=r'evals\.c: Decoder predicts tokens'):
    loop.train_and_evaluate(
      run_config.read(config.lock()),
      tmp_path / 'run',
      devices=jax.devices()[:1],
    )
