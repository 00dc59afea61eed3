"""Sentence routing: a sentence's mean chooses the experts of all its tokens.

https://arxiv.org/abs/2110.03742. The rule is `moe_jax.routing.sentence_rule`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.partitioning import on_each_device
from moe_jax.routing.sentence_rule import sentence_ids, sentence_means, spread


@dataclasses.dataclass(frozen=True)
class Sentence(contract.RouterOptions):
  """The options of routing by sentence; losses count tokens, not sentences.

  All tokens of a sentence go to the same experts, so that a capacity would drop
  most of them: only a capacity that drops nothing is allowed.
  """

  takes_choices: ClassVar[bool] = True
  has_columns: ClassVar[bool] = True
  reads: ClassVar[tuple[str, ...]] = ('segment_ids',)

  gates: str = shared_options.GATES
  jitter: float = shared_options.JITTER
  use_bias: bool = shared_options.USE_BIAS
  balance_weight: float = shared_options.BALANCE_WEIGHT
  balance_choices: str = shared_options.BALANCE_CHOICES
  z_weight: float = shared_options.Z_WEIGHT
  importance_weight: float = shared_options.IMPORTANCE_WEIGHT

  def problems_with(self, sizes):
    yield from steps.gate_problems(sizes, self.gates)
    yield from steps.drop_problems(sizes)

  def module(self, sizes, shared, name=None):
    return SentenceRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return contract.Causality(
      "router.kind='sentence' goes by the mean of the whole sentence, so that "
      "later tokens change earlier outputs; use 'token_choice' or 'task'",
      drops=sizes.capacity.binds,
      undecodable=(
        'the sentence router needs the whole sentence, which is not there '
        'while it is generated; an encoder can route by sentence'
      ),
    )


class SentenceRouter(contract.Router):
  """The router whose logits are a linear layer on means of sentences' tokens.

  All tokens of a sentence choose by the logits of its mean.
  """

  options: Sentence

  def route(self, x, mask, train, token_info, layer, given=None):
    o = self.options
    ids = sentence_ids(token_info.segment_ids, self.sizes.row_length)
    means, sentence = on_each_device(
      sentence_means, (x.astype(jnp.float32), ids, mask)
    )
    # Noise is drawn before the means are spread, so that the tokens of a
    # sentence share it, too.
    noisy_means = steps.jittered(self, means, o.jitter, train)
    means = on_each_device(spread, (noisy_means, sentence))
    logits = steps.linear_logits(self, means, o.use_bias)
    index = steps.largest(logits, self.sizes.num_selected)
    return steps.with_linear_gates(self, logits, index, mask, given)
