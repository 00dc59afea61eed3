"""Rules of routing refuse shapes, sizes and types that do not fit."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax import routing
from moe_jax.routing import (
  balance_bias,
  rules_without_logits,
  shazeer_rules,
  token_choice_rule,
)
from tests.bad_inputs.cases import Case, check

G, S, E, K = 2, 7, 5, 3
LOGITS = jnp.zeros((G, S, E), jnp.float32)
MASK = jnp.ones((G, S), bool)
INDEX = jnp.zeros((G, S, K), jnp.int32)
GATE = jnp.ones((G, S, K), jnp.float32)
IDS = jnp.zeros((G, S), jnp.uint32)
BIAS = jnp.zeros(E, jnp.float32)
TOKENS = jnp.zeros((G, S), jnp.int32)


def case(name, f, arguments, phrases, **changes):
  """A case of a function whose good arguments have some changes."""
  if isinstance(phrases, str):
    phrases = (phrases,)
  return Case(name, lambda folder: f(**{**arguments, **changes}), phrases)


def ones(*shape, dtype=jnp.float32):
  return jnp.ones(shape, dtype)


# The rules, with good arguments.
RULES = {
  'token_choice': (
    routing.token_choice,
    {'router_logits': LOGITS, 'num_selected': K, 'capacity': 4, 'mask': MASK},
  ),
  'expert_choice': (
    routing.expert_choice,
    {'router_logits': LOGITS, 'capacity': 4, 'mask': MASK},
  ),
  'batchwise_choice': (
    shazeer_rules.batchwise_choice,
    {'router_logits': LOGITS, 'num_selected': K, 'mask': MASK},
  ),
  'threshold_choice': (
    shazeer_rules.threshold_choice,
    {'router_logits': LOGITS, 'thresholds': BIAS, 'capacity': 4, 'mask': MASK},
  ),
  'z_loss': (routing.z_loss, {'router_logits': LOGITS, 'mask': MASK}),
}
GIVEN = {
  'expert_index': INDEX,
  'gate': GATE,
  'num_experts': E,
  'capacity': 4,
  'mask': MASK,
}
EVEN = {k: v for k, v in GIVEN.items() if k != 'gate'}
HASH = {'ids': IDS, 'num_experts': E, 'num_selected': K}
RANDOM = {
  'key': jax.random.key(0),
  'num_groups': G,
  'group_size': S,
  'num_experts': E,
  'num_selected': K,
}

CASES = [
  case(f'{name}-{defect}', *RULES[name], phrases, **{argument: value})
  for name in RULES
  for defect, argument, value, phrases in (
    ('rank 1', 'router_logits', ones(E), ('(5,)', '[G, S, E]')),
    ('rank 2', 'router_logits', ones(S, E), ('(7, 5)', '[G, S, E]')),
    ('rank 4', 'router_logits', ones(1, G, S, E), ('(1, 2, 7, 5)',)),
    ('no groups', 'router_logits', ones(0, S, E), ('(0, 7, 5)', 'at least 1')),
    ('no tokens', 'router_logits', ones(G, 0, E), ('(2, 0, 5)', 'at least 1')),
    (
      'integers',
      'router_logits',
      ones(G, S, E, dtype=int),
      ('type int', 'flo'),
    ),
    ('a list', 'router_logits', [[1.0]], ('[[1.0]]', 'an array [G, S, E]')),
    ('none', 'router_logits', None, ('None', 'an array [G, S, E]')),
    (
      'mask of other groups',
      'mask',
      ones(3, S, dtype=bool),
      ('(3, 7)', '(2, 7'),
    ),
    (
      'mask of other tokens',
      'mask',
      ones(G, 6, dtype=bool),
      ('(2, 6)', '(2, 7'),
    ),
    ('mask of rank 1', 'mask', ones(S, dtype=bool), ('(7,)', '[G, S]')),
    ('mask of numbers', 'mask', ones(G, S), ('mask', 'float32', 'bool')),
  )
]
CASES += [
  case(f'{name}-capacity {value!r}', *RULES[name], phrases, capacity=value)
  for name in ('token_choice', 'expert_choice', 'threshold_choice')
  for value, phrases in (
    (0, 'capacity=0'),
    (-2, 'capacity=-2'),
    (1.5, 'capacity=1.5'),
    (True, 'capacity=True'),
    ('3', "capacity='3'"),
    (float('nan'), 'capacity=nan'),
  )
]
CASES += [
  case(f'{name}-capacity above S', *RULES[name], phrases, capacity=8)
  for name in ('expert_choice', 'threshold_choice')
  for phrases in [('capacity=8', 'group_size=7')]
]
CASES += [
  case(
    f'{name}-num_selected {value!r}', f, arguments, phrases, num_selected=value
  )
  for name, (f, arguments) in {
    'token_choice': RULES['token_choice'],
    'batchwise_choice': RULES['batchwise_choice'],
    'hash_choice': (routing.hash_choice, HASH),
    'random_choice': (routing.random_choice, RANDOM),
  }.items()
  for value, phrases in (
    (0, ('num_selected=0', 'num_experts=5')),
    (-1, ('num_selected=-1', 'num_experts=5')),
    (6, ('num_selected=6', 'num_experts=5')),
    (2.0, ('num_selected=2.0', 'integer')),
    (True, ('num_selected=True', 'integer')),
    (None, ('num_selected=None', 'integer')),
  )
]
CASES += [
  case(
    'given-gates', routing.given_choice, GIVEN, '(2, 7, 2)', gate=GATE[..., 1:]
  ),
  case('given-index', routing.given_choice, GIVEN, 'int', expert_index=GATE),
  case('given-mask', routing.given_choice, GIVEN, '(1, 7)', mask=MASK[:1]),
  case('given-capacity', routing.given_choice, GIVEN, 'capacity=0', capacity=0),
  case('given-half', routing.given_choice, GIVEN, '0.5', capacity=0.5),
  case(
    'given-experts', routing.given_choice, GIVEN, 'num_experts=2', num_experts=2
  ),
  case(
    'given-priority',
    routing.given_choice,
    GIVEN,
    ("'batch_priority'", "'token_major'"),
    slot_priority='batch_priority',
  ),
  case(
    'even-rank', routing.even_choice, EVEN, '(2, 7)', expert_index=INDEX[..., 0]
  ),
  case('even-mask', routing.even_choice, EVEN, '(2, 6)', mask=MASK[:, 1:]),
  case('hash-rank', routing.hash_choice, HASH, '(7,)', ids=IDS[0]),
  case('hash-float', routing.hash_choice, HASH, 'float32', ids=LOGITS[..., 0]),
  case('hash-empty', routing.hash_choice, HASH, '(0, 7)', ids=IDS[:0]),
  case(
    'random-groups', routing.random_choice, RANDOM, 'num_groups=0', num_groups=0
  ),
  case(
    'random-size', routing.random_choice, RANDOM, 'group_size=-1', group_size=-1
  ),
]
IDS_OF = {
  'hash_of': 'token',
  'tokens': TOKENS,
  'previous': TOKENS,
  'positions': TOKENS,
}
CASES += [
  case(
    'ids-of',
    rules_without_logits.hash_ids,
    IDS_OF,
    ("'words'", "'token'"),
    hash_of='words',
  ),
  case(
    'ids-previous',
    rules_without_logits.hash_ids,
    IDS_OF,
    '(2, 6)',
    previous=TOKENS[:, 1:],
  ),
  case(
    'ids-positions',
    rules_without_logits.hash_ids,
    IDS_OF,
    '(7,)',
    positions=TOKENS[0],
  ),
  case(
    'ids-float',
    rules_without_logits.hash_ids,
    IDS_OF,
    'float32',
    tokens=LOGITS[..., 0],
  ),
  case(
    'previous',
    rules_without_logits.previous_tokens,
    {'tokens': TOKENS},
    ('(2, 6)', '(2, 7)'),
    segment_ids=TOKENS[:, 1:],
  ),
]
BALANCE = {'router_probs': LOGITS, 'expert_index': INDEX, 'mask': MASK}
IMPORTANCE = {
  'gate': GATE,
  'expert_index': INDEX,
  'mask': MASK,
  'num_experts': E,
}
CASES += [
  case(
    'balance-index',
    routing.balance_loss,
    BALANCE,
    '(2, 6, 3)',
    expert_index=INDEX[:, 1:],
  ),
  case('balance-mask', routing.balance_loss, BALANCE, '(1, 7)', mask=MASK[:1]),
  case(
    'balance-choices', routing.balance_loss, BALANCE, "'last'", choices='last'
  ),
  case(
    'balance-half',
    routing.balance_loss,
    BALANCE,
    'float16',
    router_probs=LOGITS.astype(jnp.float16),
  ),
  case(
    'importance-gate',
    routing.importance_loss,
    IMPORTANCE,
    '(2, 7, 2)',
    gate=GATE[..., 1:],
  ),
  case(
    'importance-experts',
    routing.importance_loss,
    IMPORTANCE,
    'num_experts=2.5',
    num_experts=2.5,
  ),
  case(
    'load', routing.load_loss, {'probability': LOGITS}, '(7, 2)', mask=MASK.T
  ),
  case(
    'choose',
    routing.choose,
    {'scores': LOGITS},
    'num_selected=6',
    num_selected=6,
  ),
  case(
    'choices',
    token_choice_rule.at_choices,
    {'values': LOGITS},
    '(1, 7, 3)',
    expert_index=INDEX[:1],
  ),
  case(
    'noise',
    routing.noisy_logits,
    {'clean': LOGITS, 'key': None},
    '(2, 7, 4)',
    noise=LOGITS[..., 1:],
  ),
  case(
    'bias',
    balance_bias.biased_scores,
    {'router_logits': LOGITS, 'scores': 'softmax'},
    ('(4,)', '(2, 7, 5)'),
    bias=BIAS[1:],
  ),
  case(
    'scores',
    balance_bias.biased_scores,
    {'router_logits': LOGITS, 'bias': BIAS},
    "'tanh'",
    scores='tanh',
  ),
  case(
    'moved',
    balance_bias.moved,
    {'bias': BIAS, 'rate': 0.1},
    '(4,)',
    load=BIAS[1:],
  ),
  case('thresholds', *RULES['threshold_choice'], '(4,)', thresholds=BIAS[1:]),
  case(
    'levels',
    shazeer_rules.hierarchical_load,
    {'branch_probability': LOGITS, 'branch_index': INDEX, 'mask': MASK},
    '(2, 7, 2, 3)',
    expert_probability=ones(G, S, 2, 3),
  ),
]


@pytest.mark.parametrize('case', CASES, ids=Case.id)
def test_refused(case, tmp_path):
  check(case, tmp_path)
