"""The examples in the room's README run."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from tests.models import tiny

README = pathlib.Path(models.__file__).parent / 'README.md'
CODE = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)


def test_a_model_is_built_of_its_options(capsys):
  exec(compile(CODE[0], str(README), 'exec'), {})
  assert capsys.readouterr().out == '(1,)\n'


def test_a_kind_of_ones_own_is_a_language_model():
  scope = {'__name__': 'readme'}
  exec(compile(CODE[1], str(README), 'exec'), scope)
  options = scope['BagOfTokensOptions'](width=12)
  model = options.filled(tiny.V, tiny.T).build()
  tokens = tiny.tokens()
  params = jax.jit(model.init)(tiny.key(0), tokens)
  run = jax.jit(lambda tokens: model.apply(params, tokens))
  logits, aux = run(tokens)
  swapped_logits = run(tokens[:, [1, 0, *range(2, tiny.T)]])[0]
  np.testing.assert_allclose(swapped_logits[:, 1:], logits[:, 1:], atol=1e-6)
  batch = {'targets': jnp.asarray(tokens), 'segment_ids': jnp.ones((2, 3), int)}
  assert model.loss(logits, batch).nats.shape == tokens.shape
  assert aux.stats.tokens.shape == (model.stacks.num_layers,) == (1,)
  assert model.stacks.routed_tokens(batch).shape == (1,)


def test_every_file_is_named():
  text = README.read_text()
  files = {path.name for path in README.parent.glob('*.py')}
  assert [n for n in files - {'__init__.py'} if n not in text] == []
