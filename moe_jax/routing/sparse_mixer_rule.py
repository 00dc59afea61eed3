"""SparseMixer: experts are drawn one after another, from masked softmaxes.

SparseMixer-v2 (GRIN, https://arxiv.org/abs/2409.12136), the router of
Phi-3.5-MoE. In training an expert is drawn from the softmax of the logits that
are near the largest, and the gradient of its gate estimates that of the
expected output; in inference the likeliest expert is taken. Every further
choice is made likewise among the experts that are left. Gates of a token do not
sum to one.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.capacity import check_selected
from moe_jax.routing.rows import decided
from moe_jax.routing.token_choice_rule import at_choices
from moe_jax.shapes import Array, Float32, Int32, PRNGKey, checked

# If the drawn expert is not the likeliest one, its gate is kept whole with
# probability 1/4 and multiplied by 1/3 otherwise. This is Heun's third-order
# method, by which the paper integrates the expected output.
_WHOLE, _SHARE = 0.25, 1 / 3


@checked
def sparse_mixer(
  router_logits: Float32[Array, 'G S E'],
  *,
  num_selected: int,
  threshold: float = 0.02,
  key: PRNGKey | None = None,
  imposed: Int32[Array, 'G S K'] | None = None,
) -> tuple[Int32[Array, 'G S K'], Float32[Array, 'G S K']]:
  """The experts of each token, in the order of their choice, and their gates.

  An expert with logit x takes part in a choice if (max - x) / max(|x|, max) is
  at most `threshold`, where max is the largest logit that is left. Ties go to
  the lower expert.

  Args:
    router_logits: The logits.
    num_selected: K; 2 in the paper and in Phi-3.5-MoE.
    threshold: The largest quotient with which an expert takes part.
    key: The key of the draws; None takes the likeliest experts (inference).
    imposed: Experts to choose instead of drawn ones; negative numbers where the
      rule draws. An imposed expert that takes no part in a choice has gate 0.

  Returns:
    The experts, and their gates, whose gradient is that of the softmax at the
    expert, also where the gate is multiplied by 1/3.
  """
  E, K = router_logits.shape[-1], num_selected
  check_selected(K, E)
  open_logits, experts, gates = router_logits, [], []
  for k in range(K):
    largest = open_logits.max(-1, keepdims=True)
    scale = jnp.maximum(jnp.abs(router_logits), largest)
    # If numerator and scale are zero, the quotient is NaN, which is not above
    # the threshold, so that the expert takes part.
    is_far = (largest - router_logits) / scale > threshold
    near_logits = jnp.where(
      jax.lax.stop_gradient(is_far), -jnp.inf, open_logits
    )
    best = expert = open_logits.argmax(-1).astype(jnp.int32)
    if key is not None:
      key, noise_key, whole_key = jax.random.split(key, 3)
      noise = jax.random.gumbel(noise_key, near_logits.shape, near_logits.dtype)
      expert = (near_logits + noise).argmax(-1).astype(jnp.int32)
    if imposed is not None:
      imposed_expert = imposed[..., k]
      expert = jnp.where(imposed_expert >= 0, imposed_expert, expert)
    expert = decided(expert)
    gate = at_choices(jax.nn.softmax(near_logits), expert[..., None])[..., 0]
    if key is not None:
      is_whole = jax.random.bernoulli(whole_key, _WHOLE, expert.shape)
      lost_share = jnp.where(is_whole | (expert == best), 0.0, 1 - _SHARE)
      gate = gate - jax.lax.stop_gradient(gate * lost_share)
    experts.append(expert)
    gates.append(gate)
    chosen = jax.nn.one_hot(expert, E, dtype=jnp.bool_)
    open_logits = jnp.where(chosen, -jnp.inf, open_logits)
  return jnp.stack(experts, -1), jnp.stack(gates, -1)
