"""Options of layers that contradict each other are refused by their names.

What follows from an option's own declaration (range, type, kind) is tried in
`tests/bad_inputs`. Each row is a rule between options that nothing else knows:
without it a run would train another model than its config says, or drop tokens
without a word.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from moe_jax import models, run_config
from moe_jax.layers import (
  AttentionOptions,
  Dropless,
  Einsum,
  Gather,
  LatentOptions,
  ModuleExpert,
  MoE,
  MoeOptions,
  Rotary,
)
from moe_jax.layers.experts import QuantizedExpert, SharedExpertOptions
from moe_jax.layers.moe import to_groups
from moe_jax.layers.positions import Learned, Relative
from moe_jax.layers.rotary import LongRope, Yarn
from moe_jax.layers.routers import (
  ExpertChoice,
  Hierarchical,
  NoisyTopK,
  Sentence,
  Sizes,
  Soft,
  Task,
  TokenChoice,
  TopologyAware,
)
from moe_jax.models.base import RunShape
from moe_jax.routing import GivenChoices
from moe_jax.routing.capacity import All
from tests.models import tiny
from tests.training import tiny as tiny_runs

E, K, ROOM = 12, 3, All()
GROUPS = TokenChoice(expert_groups=4, chosen_expert_groups=2)
PAIRS = dataclasses.replace(GROUPS, expert_group_score='two_best')
TWO_OF_3 = Hierarchical(branching=3, branches_selected=2)
ALL_ONES = dataclasses.replace(TWO_OF_3, gates='renormalized')
NODES = TopologyAware(devices=4, per_node=2)
ROWS = TokenChoice(batch_balance_weight=0.1, batch_balance_rows=3)
WHOLE_BATCH = TokenChoice(global_balance_weight=0.1)
CUSTOM = ModuleExpert(nn.Dense(6))
TASKS = dict(router=Task(), capacity=ROOM)
EIGHT_DEVICES = {
  'router': {'kind': 'topology', 'topology': {'devices': 8}},
  'num_experts': 8,
  'allow_future_leak': True,
}


def refuse(problems):
  raise ValueError('; '.join(problems))


def sizes(router, num_experts=E, num_selected=K):
  """Refuses what `router` says of the sizes of its layer."""
  refuse(router.problems_with(Sizes(num_experts, num_selected)))


def heads(positions, width=6, causal=True):
  refuse(positions.problems_with(width, causal))


def run(router, **shape):
  options = models.DecoderOptions(vocab_size=9, moe=MoeOptions(router=router))
  shape = dict(total_steps=9, seq_len=8, microbatches=1, rows=4) | shape
  refuse(options.problems_in(RunShape(**shape)))


def init(options, **call):
  MoE(options).init(jax.random.key(0), jnp.ones((1, 2, 6)), **call)


def soft(**changes):
  MoeOptions(router=Soft(), **changes)


def decoder(**moe):
  models.DecoderOptions(vocab_size=9, moe=MoeOptions(**moe))


def both_halves(weight):
  router = {'kind': 'token_choice', 'token_choice': {'z_weight': weight}}
  overrides = {'moe': {'router': router}}
  return tiny.options(
    TASKS, 'encoder_decoder', encoder=dict(overrides=overrides)
  )


def learned(max_len, length):
  ids = jnp.ones((1, length), jnp.int32)
  x, table = jnp.ones((1, length, 4)), jnp.ones((max_len, 4))
  Learned(max_len).add(x, ids, ids > 0, ids, table)


def groups_of(size):
  to_groups(jnp.ones((3, 8, 6)), jnp.ones((3, 8), bool), size)


def imposed():
  given = GivenChoices(jnp.zeros((1, 2, K), jnp.int32))
  init(MoeOptions(E, K, force_balance='random'), given=given)


def topology_run():
  run_config.read(tiny_runs.config(model={'moe': EIGHT_DEVICES}))


def case(message, f, *args, **options):
  return pytest.param(message, f, args, options, id=message)


CASES = [
  # Attention and positions.
  case('num_kv_heads=3 does not', AttentionOptions, 4, 3),
  case('num_heads=4 does not', AttentionOptions(4).within, 10),
  case('fixed_scale=0.1 has no', AttentionOptions, fixed_scale=0.1),
  case("biases='q' must be", AttentionOptions, biases='q'),
  case("biases='query' must be", LatentOptions, biases='query'),
  case("'query_down', which", LatentOptions, query_rank=0, biases='query_down'),
  case(
    'positions: rotary_width=5', tiny.options,
    attention=LatentOptions(rotary_width=5),
  ),
  case(
    r"attention\.kind='latent'", tiny.options,
    kind='encoder_decoder', attention=LatentOptions(),
  ),
  case('head_width=5 must be even', heads, Rotary(), 5),
  case(r'head_width=6 \* fraction=0.3', heads, Rotary(fraction=0.3)),
  case('short_factor', heads, Rotary(scaling=LongRope((1.0, 1.0)))),
  case('long_factor', heads, Rotary(scaling=LongRope((1.0,) * 3, (1.0,)))),
  case('theta=0.5 must', heads, Rotary(theta=0.5, scaling=Yarn())),
  case('beta_fast=1.0', Yarn, beta_fast=1.0),
  case('max_distance=16', Relative, 32, 16),
  case('buckets=2 must', heads, Relative(buckets=2), causal=False),
  case('seq_len=3 > max_len=2', learned, 2, 3),
  # The sparse layer and its experts.
  case(r'num_selected=9 not in \[1, num_experts=5\]', MoeOptions, 5, 9),
  case("'dropless' has no slots", MoeOptions, dispatch=Dropless()),
  case('num_experts=0 is the dense twin', init, MoeOptions(0)),
  case('group_size=5 is neither', groups_of, 5),
  case('gated=True has no effect', SharedExpertOptions, 0, gated=True),
  case(
    'ModuleExpert, which have no width', MoeOptions,
    expert=CUSTOM, shared_expert=SharedExpertOptions(9),
  ),
  case(
    'Dropless serves no experts of', MoeOptions,
    expert=CUSTOM, capacity=ROOM, dispatch=Dropless(),
  ),
  case("use.*'einsum'", soft, capacity=ROOM, dispatch=Gather()),
  case("slots_per_expert.*'all'", soft),
  case('in codes', soft, capacity=ROOM, expert=QuantizedExpert(6)),
  case(
    'ExpertChoice choose tokens', MoeOptions,
    router=ExpertChoice(), force_balance='random',
  ),
  case(
    'Hierarchical makes its own', MoeOptions, E, K,
    router=TWO_OF_3, force_balance='round_robin',
  ),
  case('batch gives choices, too', imposed),
  # Routers and the sizes of their layers.
  case('every gate 1', sizes, TokenChoice(gates='renormalized'), E, 1),
  case('=1 with', sizes, NoisyTopK(gates='renormalized_after_drop'), E, 1),
  case("'raw'", sizes, TokenChoice(gates='sigmoid_renormalized'), E, 1),
  case("'sampled'", sizes, TokenChoice(second_policy='sampled'), E, 1),
  case(
    'draws by the softmax', TokenChoice,
    choice_policy='sampled', expert_groups=2,
  ),
  case('second_threshold=0.5 has no', TokenChoice, second_threshold=0.5),
  case(
    'balance_bias_scores=.* no effect', TokenChoice,
    balance_bias_scores='softmax',
  ),
  case(
    "'sigmoid' does not belong to gates", TokenChoice,
    balance_bias_rate=0.1, balance_bias_scores='sigmoid',
  ),
  case('num_experts=10 does not divide', sizes, GROUPS, 10),
  case('num_selected=7 is more than', sizes, GROUPS, E, 7),
  case("'two_best' needs 2", sizes, PAIRS, 4, 2),
  case(
    'is more than expert_groups=4', TokenChoice,
    expert_groups=4, chosen_expert_groups=5,
  ),
  case('num_experts=13 .*branching=3', sizes, TWO_OF_3, 13, 4),
  case('num_selected=3 .*branches_selected=2', sizes, TWO_OF_3),
  case(r'num_selected=5 not in .* \(in each', sizes, TWO_OF_3, E, 10),
  case('num_selected=1 .*gradient away', sizes, ALL_ONES, E, 2),
  case('branches_selected=4', Hierarchical, branching=3, branches_selected=4),
  case('load_weight=0.1 has no', Hierarchical, load_weight=0.1),
  case('devices=6', TopologyAware, devices=6, per_node=4),
  case('num_experts=10 is not divisible', sizes, NODES, 10, 2),
  case('num_selected=5 is more than', sizes, NODES, 8, 5),
  case("kind='per_token' .*'all'", MoeOptions, router=Task()),
  case("='per_token' .*'all'", MoeOptions, router=Sentence()),
  # Models and runs.
  case(
    'for encoders alone', decoder,
    router=Soft(), capacity=ROOM, dispatch=Einsum(), allow_future_leak=True,
  ),
  case('future_leak=True', tiny.options, dict(TASKS, router=Sentence())),
  case('num_tasks=0', lambda: tiny.options(TASKS).build()),
  case('num_tasks=3 has no effect', tiny.options, num_tasks=3),
  case(
    'num_tasks=2 is smaller than the 3',
    lambda: tiny.options(TASKS, num_tasks=2).filled(tiny.V, tiny.T, 3),
  ),
  case('z_weight=0.5 .* 0.001 in the decoder', both_halves, 0.5),
  case('global_balance_weight=0.1 with', run, WHOLE_BATCH, microbatches=2),
  case('rows=3 does not divide the 4 rows', run, ROWS),
  case('4 groups in a microbatch do not divi', topology_run),
]  # fmt: skip


@pytest.mark.parametrize(('message', 'f', 'args', 'options'), CASES)
def test_what_contradicts_itself_is_refused(message, f, args, options):
  with pytest.raises(ValueError, match=message):
    f(*args, **options)


def test_what_fits_is_taken():
  taken = [
    *Rotary().problems_with(6, causal=True),
    *Relative(buckets=2).problems_with(6, causal=True),
    *TokenChoice().problems_with(Sizes(E, K)),
    *GROUPS.problems_with(Sizes(E, 6)),
    *TWO_OF_3.problems_with(Sizes(E, 4)),
    # A single branch has a gate of one, which takes no gradient away.
    *Hierarchical(branching=1, gates='renormalized').problems_with(Sizes(4, 2)),
  ]
  assert not taken
  assert both_halves(0.001).encoder_half.moe.router.z_weight == 0.001
  fitting = ((WHOLE_BATCH, {}), (ROWS, dict(rows=6, microbatches=2)))
  for router, shape in fitting:
    with pytest.raises(ValueError, match=r'^$'):
      run(router, **shape)
