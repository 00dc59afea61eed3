"""Layers refuse shapes, masks, experts and routers that break a contract."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import moe_jax
from moe_jax.layers import Attention, AttentionOptions, Lstm, LstmOptions
from moe_jax.layers.experts import ExpertOptions
from moe_jax.layers.routers.token_choice import TokenChoiceRouter
from moe_jax.routing import empty_aux
from tests.bad_inputs.cases import Case, check
from tests.layers.routers.run import info_of

B, T, M, E = 2, 6, 8, 4
X = jnp.ones((B, T, M))
MASK = jnp.ones((B, T), bool)
IDS = jnp.ones((B, T), jnp.int32)
HASH = jnp.ones((B, T), jnp.uint32)
OPTIONS = moe_jax.MoeOptions(
  num_experts=E, expert=moe_jax.FeedForwardExpert(hidden=5)
)
MOE = moe_jax.MoE(OPTIONS)


def case(name, module, *arguments, phrases, **keywords):
  """A case of a layer's initialisation, which is traced and not computed."""

  def call(folder):
    jax.eval_shape(
      lambda: module.init(jax.random.key(0), *arguments, **keywords)
    )

  return Case(name, call, phrases)


def moe(**changes):
  return moe_jax.MoE(dataclasses.replace(OPTIONS, **changes))


def hashed():
  return moe(router=moe_jax.Hash())


ATTENTION = Attention(AttentionOptions(num_heads=2))
FFN = moe_jax.FeedForward(moe_jax.FfnOptions(hidden=5))
LSTM = Lstm(LstmOptions(hidden=5))
CASES = [
  case('moe-rank 1', MOE, X[0, 0], phrases=('(8,)', '[B, T, M]')),
  case('moe-rank 2', MOE, X[0], phrases=('(6, 8)', '[B, T, M]')),
  case('moe-rank 4', MOE, X[None], phrases=('(1, 2, 6, 8)', '[B, T, M]')),
  case('moe-no rows', MOE, X[:0], phrases=('(0, 6, 8)', 'at least 1')),
  case('moe-no tokens', MOE, X[:, :0], phrases=('(2, 0, 8)', 'at least 1')),
  case('moe-no width', MOE, X[..., :0], phrases=('(2, 6, 0)', 'at least 1')),
  case('moe-integers', MOE, IDS[..., None], phrases=('int32', 'float')),
  case('moe-a list', MOE, [[[1.0]]], phrases=('[[[1.0]]]', '[B, T, M]')),
  case('moe-none', MOE, None, phrases=('None', '[B, T, M]')),
  case('moe-mask of rows', MOE, X, MASK[:1], phrases=('(1, 6)', '(2, 6, 8)')),
  case(
    'moe-mask of tokens', MOE, X, MASK[:, 1:], phrases=('(2, 5)', '(2, 6, 8)')
  ),
  case('moe-mask of rank 3', MOE, X, MASK[..., None], phrases=('(2, 6, 1)',)),
  case('moe-mask of ids', MOE, X, IDS, phrases=('token_mask', 'int32', 'bool')),
  case('moe-flat mask', MOE, X, MASK.reshape(-1), phrases=('(12,)', '[B, T]')),
  case(
    'moe-hash ids',
    hashed(),
    X,
    token_info=info_of(HASH[:, 1:]),
    phrases=('(2, 5)', '(2, 6'),
  ),
  case(
    'moe-real ids',
    hashed(),
    X,
    token_info=info_of(X[..., 0]),
    phrases=('token_info.tokens', 'float32', 'int'),
  ),
  case('moe-no ids', hashed(), X, phrases=('TokenInfo(tokens=..., ',)),
  case('moe-layer', MOE, X, layer=1.5, phrases=('layer=1.5',)),
  case(
    'moe-group size',
    moe(group_size=4),
    X,
    phrases=('group_size=4', 'seq_len=6'),
  ),
  case('moe-dense twin', moe(num_experts=0), X, phrases=('num_experts=0',)),
  case('ffn-scalar', FFN, jnp.float32(1), phrases=('()', 'M')),
  case('ffn-integers', FFN, IDS, phrases=('int32', 'float')),
  case('lstm-rank', LSTM, X[0], phrases=('(6, 8)', '[B, T, M]')),
  case('lstm-ids', LSTM, X, IDS[:, 1:], phrases=('(2, 5)', '(2, 6, 8)')),
  case('lstm-empty', LSTM, X[:, :0], phrases=('(2, 0, 8)', 'at least 1')),
  case('attention-rank', ATTENTION, X[0], None, IDS, phrases=('(6, 8)',)),
  case(
    'attention-segments',
    ATTENTION,
    *(X, IDS[:1], IDS),
    phrases=('segment_ids', '(1, 6)', '(2, 6, 8)'),
  ),
  case(
    'attention-positions',
    ATTENTION,
    *(X, None, IDS[:, 1:]),
    phrases=('positions', '(2, 5)', '(2, 6, 8)'),
  ),
  case(
    'attention-mask for ids',
    ATTENTION,
    *(X, MASK, IDS),
    phrases=('segment_ids', 'bool', 'int'),
  ),
]


class Returns(nn.Module):
  """A user's expert that returns what a test gives it."""

  output: object

  @nn.compact
  def __call__(self, rows):
    return self.output(rows) if callable(self.output) else self.output


CASES += [
  case(
    f'expert-{name}',
    moe(expert=moe_jax.ModuleExpert(Returns(output))),
    X,
    phrases=('expert Returns', phrase, 'rows [R, M]'),
  )
  for name, output, phrase in (
    ('wider', lambda rows: jnp.concatenate([rows, rows], -1), '[4, 16]'),
    ('narrower', lambda rows: rows[:, 1:], '[4, 7]'),
    ('one row', lambda rows: rows[:1], '[1, 8]'),
    ('more rows', lambda rows: jnp.concatenate([rows, rows]), '[8, 8]'),
    ('rank 1', lambda rows: rows.sum(-1), '[4]'),
    ('rank 3', lambda rows: rows[None], '[1, 4, 8]'),
    ('integers', lambda rows: rows.astype(int), 'int32[4, 8]'),
    ('a pair', lambda rows: (rows, rows), '(float32[4, 8], float32[4, 8])'),
    ('none', lambda rows: None, 'NoneType'),
    ('a number', lambda rows: 1.0, 'float'),
  )
]
CASES += [
  case(
    'expert-dense',
    moe(expert=moe_jax.ModuleExpert(nn.Dense(3))),
    X,
    phrases=('expert Dense', '[4, 3]', '[4, 8]'),
  ),
  case(
    'mixture-dense',
    moe(expert=moe_jax.ModuleExpert(moe_jax.MoE(OPTIONS))),
    X,
    phrases=('[B, T, M]',),
  ),
]


class UsersRouter(TokenChoiceRouter):
  """A user's router, whose result a test changes."""

  def route(self, x, mask, train, token_info, layer):
    result = super().route(x, mask, train, token_info, layer)
    return self.options.change(*result)


@dataclasses.dataclass(frozen=True)
class Users(moe_jax.TokenChoice):
  """The options of `UsersRouter`."""

  change: object = None

  def module(self, sizes, shared, name=None):
    return UsersRouter(self, sizes, shared, name=name)


def users(change, router_class=Users):
  """A layer whose router is changed; its options are not checked."""
  router = object.__new__(router_class)
  for field in dataclasses.fields(moe_jax.TokenChoice):
    value = getattr(moe_jax.TokenChoice(), field.name)
    object.__setattr__(router, field.name, value)
  object.__setattr__(router, 'change', change)
  options = object.__new__(moe_jax.MoeOptions)
  for field in dataclasses.fields(moe_jax.MoeOptions):
    object.__setattr__(options, field.name, getattr(OPTIONS, field.name))
  object.__setattr__(options, 'router', router)
  return moe_jax.MoE(options)


def replaced(**changes):
  """A change of a routing that the tests' hook does not refuse."""

  def change(chosen, aux):
    for name, value in changes.items():
      if callable(value):
        value = value(getattr(chosen, name))
      object.__setattr__(chosen, name, value)
    return chosen, aux

  return change


CASES += [
  case(f'router-{name}', users(change), X, phrases=('UsersRouter', *phrases))
  for name, change, phrases in (
    ('nothing', lambda chosen, aux: None, ('NoneType', 'a Router returns')),
    ('no aux', lambda chosen, aux: chosen, ('Routing', 'a Router returns')),
    ('swapped', lambda chosen, aux: (aux, chosen), ('(MoeAux, Routing)',)),
    ('a dict', lambda chosen, aux: (chosen, {}), ('(Routing, dict)',)),
    ('indices', lambda chosen, aux: (chosen.gate, aux), ('float32[2, 6, 1]',)),
    ('experts', replaced(num_experts=3), ('num_experts=3', 'has 4')),
    ('groups', replaced(gate=lambda g: g[:1]), ('gate', '(1, 6, 1)')),
    ('tokens', replaced(slot=lambda s: s[:, 1:]), ('slot', '(2, 5, 1)')),
    ('choices', replaced(kept=lambda k: k[..., 0]), ('kept', '(2, 6)')),
    ('floats', replaced(expert_index=lambda i: i * 1.0), ('float32', 'int')),
    (
      'half',
      lambda chosen, aux: (chosen, aux._replace(stats=empty_aux(3, 1).stats)),
      ('load', '(3,)'),
    ),
    (
      'loss',
      lambda chosen, aux: (chosen, aux._replace(losses={'my_loss': 0.0})),
      ("['my_loss']", 'z_loss'),
    ),
  )
]
CASES += [
  case(
    'router-capacity',
    users(replaced(capacity=2.5)),
    X,
    phrases=('capacity=2.5',),
  )
]


class UsersGates(TokenChoiceRouter):
  """A user's router with gates of a wrong shape."""

  def gates(self, logits, expert_index, kept=None):
    return self.options.change(super().gates(logits, expert_index, kept))


@dataclasses.dataclass(frozen=True)
class UsersGateOptions(Users):
  """The options of `UsersGates`."""

  def module(self, sizes, shared, name=None):
    return UsersGates(self, sizes, shared, name=name)


CASES += [
  case(
    f'gates-{name}',
    users(change, UsersGateOptions),
    X,
    phrases=(f'gate has shape {shape}', 'expert_index has shape (2, 6, 1)'),
  )
  for name, change, shape in (
    ('all experts', lambda gate: jnp.repeat(gate, E, -1), '(2, 6, 4)'),
    ('tokens', lambda gate: gate[..., 0], '(2, 6)'),
    ('groups', lambda gate: gate[:1], '(1, 6, 1)'),
  )
]


class UsersExperts(nn.Module):
  """A user's experts, whose result a test changes."""

  result: object

  @nn.compact
  def __call__(self, x, routing, train):
    return self.result(x)


@dataclasses.dataclass(frozen=True)
class UsersExpert(ExpertOptions):
  """The options of `UsersExperts`; tests set their result."""

  def experts(self, dispatch, shared):
    return UsersExperts(RESULTS[0], name='experts')


RESULTS = [None]


def experts_case(name, result, phrase):
  layer = moe(expert=UsersExpert())

  def call(folder):
    RESULTS[0] = result
    jax.eval_shape(lambda: layer.init(jax.random.key(0), X))

  return Case(name, call, ('UsersExperts', 'experts return', phrase))


CASES += [
  experts_case(
    'experts-width', lambda x: (x[..., 1:], None), 'float32[2, 6, 7]'
  ),
  experts_case('experts-no aux', lambda x: x, 'float32[2, 6, 8]'),
  experts_case('experts-nothing', lambda x: None, 'NoneType'),
]


@pytest.mark.parametrize('case', CASES, ids=Case.id)
def test_refused(case, tmp_path):
  check(case, tmp_path)
