"""Logits that are not finite generate no token, not even token 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import generate as command
from moe_jax import generation
from moe_jax.routing.capacity import All
from moe_jax.runs import finite
from moe_jax.runs.checkpointer import Checkpointer, CheckpointError
from moe_jax.runs.workdir import CHECKPOINTS
from tests.generation import folders
from tests.models import tiny

PROMPTS = [[3, 17, 5, 8], [11]]


@pytest.fixture(scope='module')
def model():
  return tiny.build(dict(capacity=All()), embedding=dict(tie=False))


def generate(model, params, **options):
  return generation.generate(
    model, {'params': params}, PROMPTS, num_tokens=4, **options
  )


def with_first(value, params):
  """The parameters with another first number in each array."""
  params = jax.tree.map(np.array, params)
  for array in jax.tree.leaves(params):
    array.flat[0] = value
  return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize(
  'options',
  [
    pytest.param({'temperature': 0.9, 'top_k': 3}, marks=pytest.mark.slow),
    {'num_beams': 2},
  ],
)
def test_logits_that_are_not_finite_are_an_error(model, options):
  params = with_first(np.nan, tiny.params_of(model))
  with pytest.raises(ValueError, match='logits of new token 1 are not finite'):
    generate(model, params, **options)


def test_a_run_that_is_not_finite_is_refused_by_name(
  tmp_path, monkeypatch, capsys
):
  folders.write(tmp_path)
  loaded = generation.load(tmp_path)
  params = loaded.variables['params']
  nan_params = with_first(np.nan, params)
  with monkeypatch.context() as patched:
    patched.setattr(finite, 'not_finite', lambda tree: [])
    with Checkpointer(tmp_path / CHECKPOINTS) as checkpoints:
      checkpoints.save(99, {'params': nan_params})
  with pytest.raises(CheckpointError, match='99: not finite: params/'):
    generation.load(tmp_path, 99)
  assert generation.load(tmp_path).skipped[0][0] == 99
  with pytest.raises(SystemExit) as exit_info:
    command.main([f'--workdir={tmp_path}', '--step=99', '--prompt=a'])
  captured = capsys.readouterr()
  assert exit_info.value.code == 1 and captured.out == ''
  assert '99: not finite: params/' in captured.err
