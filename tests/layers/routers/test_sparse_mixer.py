"""The sparse mixer's gates and gradient are those of transformers.

Other routers meet transformers in whole models, in `tests/interop`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.sparse_mixer_rule import sparse_mixer
from tests.layers.routers.run import G, S, draw
from tests.models import tiny

pytestmark = pytest.mark.slow
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

E, K = 12, 3


@pytest.mark.parametrize('training', [False, True])
def test_sparse_mixer_of_transformers_has_the_same_gates_and_gradient(training):
  from transformers.models.phimoe.modeling_phimoe import sparsemixer

  logits, weights = draw(G * S, E) + 1, draw(G * S, 2, seed=1)
  torch_logits = torch.tensor(logits, requires_grad=True)
  torch.manual_seed(0)
  gates, index = sparsemixer(torch_logits, jitter_eps=0.2, training=training)
  (gates * torch.tensor(weights)).sum().backward()

  def total(logits):
    chosen, gate = sparse_mixer(
      logits.reshape(G, S, E),
      num_selected=2,
      threshold=0.4,
      key=tiny.key(0) if training else None,
      imposed=jnp.asarray(index.numpy().reshape(G, S, 2), jnp.int32)
      if training
      else None,
    )
    return (gate.reshape(-1, 2) * weights).sum(), (chosen, gate)

  gradient, (chosen, gate) = jax.grad(total, has_aux=True)(jnp.asarray(logits))
  assert (index[:, 0] != torch_logits.argmax(-1)).any() == training
  np.testing.assert_array_equal(chosen.reshape(-1, 2), index)
  if not training:
    gates = gates.detach().numpy()
    np.testing.assert_allclose(gate.reshape(-1, 2), gates, rtol=1e-5)
  np.testing.assert_allclose(gradient, torch_logits.grad, rtol=1e-4, atol=1e-6)
