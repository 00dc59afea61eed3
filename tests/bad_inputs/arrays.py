"""Told bad inputs of functions, layers and models: shapes, types, numbers."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import moe_jax
from moe_jax import generation, kernels, models, routing
from moe_jax.devices import check_room
from moe_jax.generation.sampling import keep_top_p
from moe_jax.kernels.grouped_products import check_shapes
from moe_jax.layers import Attention, AttentionOptions, Lstm, LstmOptions
from moe_jax.layers.routers.token_choice import TokenChoiceRouter
from moe_jax.models.pattern import sparse_pattern
from moe_jax.partitioning import (
  MeshOptions,
  ShardingOptions,
  make_mesh,
  sharding,
)
from moe_jax.routing import (
  Routing,
  balance_bias,
  rules_without_logits,
  shazeer_rules,
)
from moe_jax.routing.dispatch import einsum, gather, sorted_rows
from moe_jax.run_config import RunConfig
from tests.bad_inputs.cases import Case
from tests.layers.routers.run import info_of

G, S, E, K, C, M = 2, 7, 5, 3, 4, 8
LOGITS, MASK = jnp.zeros((G, S, E)), jnp.ones((G, S), bool)
INDEX, GATE = jnp.zeros((G, S, K), jnp.int32), jnp.ones((G, S, K))
IDS = jnp.zeros((G, S), jnp.int32)
X = jnp.ones((G, S, M))


def case(name, phrases, call, *arguments, **options):
  """A case of a function; phrases are parted by ` | `."""
  return Case(
    name, lambda folder: call(*arguments, **options), (*phrases.split(' | '),)
  )


def token_choice(logits=LOGITS, num_selected=K, capacity=C, mask=MASK):
  return routing.token_choice(
    logits, num_selected=num_selected, capacity=capacity, mask=mask
  )


ROUTING = [
  case('logits of rank 2', '(7, 5) | [G, S, E]', token_choice, LOGITS[0]),
  case('no tokens', '(2, 0, 5) | at least 1', token_choice, LOGITS[:, :0]),
  case('other mask', '(2, 6) | (2, 7', token_choice, mask=MASK[:, 1:]),
  case('mask of floats', 'float32 | bool', token_choice, mask=GATE[..., 0]),
  case('half a slot', 'capacity=1.5', token_choice, capacity=1.5),
  case(
    'thresholds of other experts',
    '(4,)',
    shazeer_rules.threshold_choice,
    LOGITS,
    thresholds=jnp.zeros(4),
    capacity=C,
    mask=MASK,
  ),
  case(
    'given gates of fewer choices',
    '(2, 7, 2)',
    routing.given_choice,
    INDEX,
    GATE[..., 1:],
    num_experts=E,
    capacity=C,
    mask=MASK,
  ),
  case(
    'hashes of floats',
    'float32',
    routing.hash_choice,
    LOGITS[..., 0],
    num_experts=E,
    num_selected=K,
  ),
  case(
    'hash of words',
    "'words' | 'token'",
    rules_without_logits.hash_ids,
    hash_of='words',
    tokens=IDS,
    previous=IDS,
    positions=IDS,
  ),
  case(
    'bias of other experts',
    '(4,) | (2, 7, 5)',
    balance_bias.biased_scores,
    LOGITS,
    bias=jnp.zeros(4),
    scores='softmax',
  ),
]

CHOSEN = Routing(
  expert_index=INDEX,
  slot=INDEX,
  gate=GATE,
  kept=INDEX == 0,
  num_experts=E,
  capacity=C,
)
SLOTS = Routing.of_slots(
  token_index=jnp.zeros((G, E, C), jnp.int32),
  gate=jnp.ones((G, E, C)),
  group_size=S,
)


def changed(**changes):
  """A routing with changes that the tests' hook would refuse to make."""
  chosen = copy.copy(CHOSEN)
  for name, value in changes.items():
    object.__setattr__(chosen, name, value)
  return chosen


ROWS, KERNEL, SIZES = jnp.ones((9, M)), jnp.ones((E, M, 6)), jnp.ones(E, int)
DISPATCH = [
  *(
    case(
      f'rows of other tokens: {i}',
      '(2, 6, 8) | (2, 7, 3)',
      *(mover.dispatch, X[:, 1:], CHOSEN),
    )
    for i, mover in enumerate((einsum, gather, sorted_rows))
  ),
  case(
    'kept is a number',
    'kept | float32 | bool',
    *(gather.dispatch, X, changed(kept=GATE)),
  ),
  case(
    'slots of other tokens',
    'S=6 | (2, 7, 8)',
    *(einsum.dispatch, X, dataclasses.replace(SLOTS, num_tokens=6)),
  ),
  case(
    'slots without bound',
    'capacity=None | All()',
    einsum.dispatch,
    X,
    changed(capacity=None),
  ),
  case(
    'expert rows of fewer experts',
    'E=5 | (3, 8, 8)',
    gather.combine,
    jnp.ones((3, 8, M)),
    CHOSEN,
  ),
  case(
    'sizes', '4 group sizes | 5 experts', check_shapes, ROWS, KERNEL, SIZES[1:]
  ),
  case(
    'float sizes', 'float32 | integers', check_shapes, ROWS, KERNEL, SIZES * 1.0
  ),
  case(
    'backend',
    "'cuda' | 'blocks'",
    kernels.grouped_matmul,
    *(ROWS, KERNEL, SIZES, 'cuda'),
  ),
]

OPTIONS = moe_jax.MoeOptions(
  num_experts=4, expert=moe_jax.FeedForwardExpert(hidden=5)
)


def init(module, *arguments, **options):
  """Traces the initialisation of a module, without computing it."""
  jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, **options))


def moe(**changes):
  return moe_jax.MoE(dataclasses.replace(OPTIONS, **changes))


class Returns(nn.Module):
  """A user's expert that returns what a test gives it."""

  output: object

  @nn.compact
  def __call__(self, rows):
    return self.output(rows)


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


def users(change):
  """A layer whose router is changed; its options are not checked."""
  router, options = object.__new__(Users), object.__new__(moe_jax.MoeOptions)
  for made, good in ((router, moe_jax.TokenChoice()), (options, OPTIONS)):
    for field in dataclasses.fields(good):
      object.__setattr__(made, field.name, getattr(good, field.name))
  object.__setattr__(router, 'change', change)
  object.__setattr__(options, 'router', router)
  return moe_jax.MoE(options)


def replaced(name, value):
  """A change of a routing that the tests' hook does not refuse."""

  def change(chosen, aux):
    old = getattr(chosen, name)
    object.__setattr__(chosen, name, value(old) if callable(value) else value)
    return chosen, aux

  return change


LSTM, ATTENTION = Lstm(LstmOptions(5)), Attention(AttentionOptions(num_heads=2))
HASHED = moe(router=moe_jax.Hash())
LAYERS = [
  case(name, phrases, init, *arguments)
  for name, phrases, *arguments in (
    ('rank 2', '(7, 8) | [B, T, M]', moe(), X[0]),
    ('mask of other rows', '(1, 7) | (2, 7, 8)', moe(), X, MASK[:1]),
    ('ids for a mask', 'token_mask | int32 | bool', moe(), X, IDS),
    ('no ids to hash', 'TokenInfo(tokens=..., ', HASHED, X),
    ('ids of other tokens', '(2, 6) | (2, 7, 8)', LSTM, X, IDS[:, 1:]),
    (
      'segments of other rows',
      'segment_ids | (1, 7) | (2, 7, 8)',
      *(ATTENTION, X, IDS[:1], IDS),
    ),
    ('mask for segments', 'segment_ids | bool', ATTENTION, X, MASK, IDS),
    *(
      (
        f'expert returns {name}',
        f'expert Returns | {phrase} | rows [R, M]',
        moe(expert=moe_jax.ModuleExpert(Returns(output))),
        X,
      )
      for name, phrase, output in (
        ('fewer columns', '[6, 7]', lambda rows: rows[:, 1:]),
        ('one row', '[1, 8]', lambda rows: rows[:1]),
        ('integers', 'int32[6, 8]', lambda rows: rows.astype(int)),
        ('nothing', 'NoneType', lambda rows: None),
      )
    ),
    *(
      (f'router returns {name}', f'UsersRouter | {phrases}', users(change), X)
      for name, phrases, change in (
        ('nothing', 'NoneType | a Router returns', lambda chosen, aux: None),
        (
          'a pair turned',
          '(MoeAux, Routing)',
          lambda chosen, aux: (aux, chosen),
        ),
        ('other experts', 'num_experts=3 | has 4', replaced('num_experts', 3)),
        ('other groups', 'gate | (1, 7, 1)', replaced('gate', lambda g: g[:1])),
        (
          'floats',
          'float32 | int',
          replaced('expert_index', lambda i: i * 1.0),
        ),
        (
          'a loss of its own',
          "['my_loss'] | z_loss",
          lambda chosen, aux: (chosen, aux._replace(losses={'my_loss': 0.0})),
        ),
      )
    ),
  )
] + [
  case(
    'hashed ids of other tokens',
    '(2, 6) | (2, 7',
    init,
    *(HASHED, X),
    token_info=info_of(IDS[:, 1:].astype(jnp.uint32)),
  )
]

V = 11
TINY = {'vocab_size': V, 'width': 8, 'num_layers': 2}
DECODER = models.DecoderOptions(**TINY)
BOTH = models.EncoderDecoderOptions(**TINY).build()
HUGE = 2 * 10**9  # options are integers of 32 bits


def room(model, batch_size=8):
  options = RunConfig(model=model, batch_size=batch_size)
  check_room(options.least_bytes(), jax.devices()[:1])


MODELS = [
  case(f'model: {name}', phrases, init, *arguments)
  for name, phrases, *arguments in (
    ('float tokens', 'tokens | float32 | int', DECODER.build(), IDS * 1.0),
    ('text', "tokens='a b' | array", DECODER.build(), 'a b'),
    ('other segments', '(2, 6) | (2, 7)', DECODER.build(), IDS, IDS[:, 1:]),
    ('mask', 'segment_ids | bool | int', DECODER.build(), IDS, MASK),
    ('other rows of targets', '(1, 7) | (2, 7)', BOTH, IDS, IDS[:1]),
    (
      'segments of one side',
      'encoder_segment_ids and segment_ids',
      *(BOTH, IDS, IDS, IDS),
    ),
  )
] + [
  case(
    'no sparse layer', "'every 9' | num_layers=4", sparse_pattern, 'every 9', 4
  ),
  *(
    case(
      f'no room for {name}={value}',
      'the parameters of | at least | memory together',
      *(room, dataclasses.replace(DECODER, **{name: value})),
    )
    for name, value in (('num_layers', HUGE), ('width', HUGE))
  ),
  case('no room for rows', 'batch_size=2000000000', room, DECODER, HUGE),
]


def mesh(count=4, **sizes):
  return make_mesh(sizes, jax.devices()[:count])


def shard(axes, shape=None):
  rules = tuple(
    rule
    for rule in ShardingOptions(batch='data', embed='fsdp').rules
    if rule[0] in ('batch', 'embed')
  )
  return sharding(mesh(data=2, fsdp=2), rules, axes, shape, 'w')


SHARDING = [
  case('an unknown axis', "'dta' | 'data'", mesh, dta=2),
  case('a rest of 4 in 3', 'does not fit 4 devices', mesh, data=3, fsdp=-1),
  case('a misspelled axis', "axis of w 'embd'; did", shard, ('embd',)),
  case('no devices', '0 devices', mesh, count=0, data=-1),
  case('two free axes', 'fsdp=-1 | data=-1', MeshOptions, data=-1, fsdp=-1),
  case('twice', "mlp='tensor,tensor'", ShardingOptions, mlp='tensor,tensor'),
  case('an axis for two sizes', "'batch' | 'data'", shard, ('batch', 'batch')),
  case(
    'a size that is odd', 'batch=3 | 2 devices | w', shard, ('batch',), (3,)
  ),
]


@functools.cache
def prepared(kind):
  """A tiny model with parameters of zeros, prepared once."""
  model = kind(**TINY).build()
  shapes = nn.meta.unbox(models.abstract_params(model))
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  return generation.prepare(model, {'params': params})


def generate(prompt=((1, 2), (3,)), kind=models.DecoderOptions, **options):
  prompt = [[*row] for row in prompt] if isinstance(prompt, tuple) else prompt
  return generation.generate(
    *prepared(kind), prompt, **{'num_tokens': 4, **options}
  )


NAN = float('nan')
GENERATION = [
  case(f'generate: {options}', phrases, generate, **options)
  for phrases, options in (
    ('temperature=nan | finite', {'temperature': NAN}),
    ('top_k=1.5 | integer', {'top_k': 1.5, 'temperature': 1.0}),
    ('tokens | memory together', {'num_tokens': HUGE}),
    ('3 seeds for 2 prompts', {'seed': (1, 2, 3)}),
    ('stop_ids | token 11 | vocab_size=11', {'stop_ids': (V,)}),
    ("stop_ids='eos' | text", {'stop_ids': 'eos'}),
    ('num_tokens=4 | 4 forced_ids', {'forced_ids': (1, 2, 3, 4)}),
    (
      'num_beams=2 with temperature=0.5 | one of the two',
      {'num_beams': 2, 'temperature': 0.5},
    ),
    ('start_id=1 | decoder-only', {'start_id': 1}),
    ('start_id', {'kind': models.EncoderDecoderOptions}),
    ('prompt 1 of 2 | (0,)', {'prompt': ((1,), ())}),
    ('token 11 | vocab_size=11', {'prompt': ((1, V),)}),
    ('prompt 0 of 1 | 1.5 | integers', {'prompt': ((1.5, 2.0),)}),
    ('True | integers', {'prompt': ((True, False),)}),
    ("'a prompt' | token ids", {'prompt': 'a prompt'}),
    ('(2, 3) | a list of ids', {'prompt': np.ones((1, 2, 3), int)}),
  )
] + [
  case(
    'more beams returned than kept',
    'num_beams=2 and num_return=3',
    lambda: generation.beam_search(
      *prepared(models.DecoderOptions),
      [[1]],
      num_tokens=4,
      num_beams=2,
      num_return=3,
    ),
  ),
  case(
    'options for a model',
    'DecoderOptions | Model',
    generation.prepare,
    DECODER,
    {},
  ),
  case('a row of logits', '(11,) | [B, V]', keep_top_p, jnp.zeros(V), 0.5),
]
CASES = [*ROUTING, *DISPATCH, *LAYERS, *MODELS, *SHARDING, *GENERATION]
