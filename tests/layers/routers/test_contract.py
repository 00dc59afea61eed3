"""Every router of the list, and one of a user's, keeps its options' promises.

A router is covered as soon as it stands in `ROUTERS`. The oracles are the
options themselves (causality, losses, state, cost), and what a router does when
later tokens, padding or choices are others. What is special of one kind is in
the file of that kind; its rule is in `tests/routing`.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import All, Einsum, PerToken, Shared
from moe_jax.analysis.counts import router_multiply_adds
from moe_jax.config import OptionError, fields_of
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.parameters import Role, roles_of
from moe_jax.layers.routers import ROUTERS, RouterOptions, Sizes
from moe_jax.routing import GivenChoices
from moe_jax.routing.dispatch import einsum, gather
from tests.layers.routers.run import info_of
from tests.models import tiny
from tests.own_kinds import InTurn

G, S, E, K, M = 40, 8, 6, 2, 5
TIGHT = Sizes(E, K, PerToken(factor=0.8))
ROOMY = Sizes(E, K, All())
ONE = dataclasses.replace(TIGHT, num_selected=1)
SHARED = Shared(num_tasks=9)


def tight(options):
  """Sizes that drop choices, or with room for all where none may be dropped."""
  return ROOMY if any(options.problems_with(TIGHT)) else TIGHT


def alternatives(options):
  """Yields the options with one named value changed, for every such value."""
  for name, field in fields_of(type(options)).items():
    for value in field.option.choices:
      try:
        yield dataclasses.replace(options, **{name: value})
      except OptionError:
        continue  # the value needs other values


def stateful(options):
  """Options with which the router keeps state, or None if it never does."""
  for other in (options, *alternatives(options)):
    for name, field in fields_of(type(other)).items():
      if field.type is float:
        try:
          changed = dataclasses.replace(other, **{name: 0.1})
        except OptionError:
          continue
        if changed.keeps_state:
          return changed
  return None


def with_losses(options):
  """The options with a weight for every loss that can have one."""
  for name in fields_of(type(options)):
    if name.endswith('_weight'):
      with contextlib.suppress(OptionError):  # there is nothing to weigh
        options = dataclasses.replace(options, **{name: 0.1})
  return options


# Weights of losses change no program, so that the tests share the programs.
OPTIONS = {k: with_losses(cls()) for k, cls in ROUTERS.builtin.items()}
OPTIONS['own'] = InTurn(step=0)


def leak(options, sizes=TIGHT):
  return options.causality(sizes).leak


def settings():
  """Pairs (options, sizes) that differ in whether later tokens matter."""
  for options in OPTIONS.values():
    sizes = tight(options)
    yield options, sizes
    if sizes is ROOMY:
      continue
    if leak(options) is not None:
      yield options, ROOMY  # a router that may be causal if nothing is dropped
    for other in alternatives(options):
      if (leak(other) is None) != (leak(options) is None):
        yield other, TIGHT
      if leak(other) and not leak(other, ONE):
        yield other, ONE


def name(value):
  if isinstance(value, Sizes):
    return f'{value.num_selected}-{type(value.capacity).__name__}'
  return type(value).__name__


def inputs(seed=0, groups=G):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(groups, S, M)).astype(np.float32)
  return x, rng.integers(0, 9, (groups, S)).astype(np.int32)


@functools.cache
def fresh(options):
  """Initial variables in boxes, which no capacity changes."""
  module = options.module(ROOMY, SHARED, 'router')

  @jax.jit
  def init(key, x, ids):
    start = module.init(key, x, jnp.ones((G, S), bool), token_info=info_of(ids))
    return {k: v for k, v in start.items() if k != 'intermediates'}

  return init(tiny.key(0), *inputs())


def variables(options):
  """Random variables, as some kernels start at zero."""
  start = fresh(options)
  rng = np.random.default_rng(1)

  def with_noise(leaf, role):
    noise = rng.normal(size=leaf.shape) if role.form == 'kernel' else 0.0
    return jnp.asarray(leaf + np.float32(noise))

  start_values = jax.tree.map(np.asarray, nn.meta.unbox(start))
  return jax.tree.map(with_noise, start_values, roles_of(start))


def program(options, sizes, train):
  """A function of x, hash ids and mask -> (routing, aux, output)."""
  params = variables(options)
  module = options.module(sizes, SHARED, 'router')

  def run(x, ids, mask):
    rngs = {'router': tiny.key(2)} if train else None
    routing, aux = module.apply(
      params, x, mask, train, info_of(ids), 0, rngs=rngs
    )
    # Mixtures are moved by weights alone.
    move = einsum if options.mixes else gather
    rows = move.dispatch(x, routing)
    rows = rows * jnp.arange(1.0, E + 1)[:, None, None]
    return routing, aux, move.combine(rows, routing)

  return run


@functools.cache
def compiled(options, sizes, train):
  return jax.jit(program(options, sizes, train))


@functools.cache
def output_alone(options, sizes, train):
  """The compiled program -> output, which compiles in half the time."""
  run = program(options, sizes, train)
  return jax.jit(lambda *args: run(*args)[-1])


def output(options, sizes, train, *args):
  """The output, by the whole program where other tests need that as well."""
  if options in OPTIONS.values() and sizes == tight(options):
    return compiled(options, sizes, train)(*args)[-1]
  return output_alone(options, sizes, train)(*args)


@pytest.mark.parametrize(('options', 'sizes'), settings(), ids=name)
def test_causal_is_what_later_tokens_do_not_change(options, sizes):
  (old, old_ids), (new, new_ids) = inputs(0), inputs(1)
  t = np.random.default_rng(0).integers(0, S - 1, (G, 1))
  past = np.arange(S)[None] <= t  # tokens that stay, [G, S]
  real = np.random.default_rng(5).random((G, S)) < 0.5

  def changes(train):
    run = functools.partial(output, options, sizes, train)
    before = run(old, old_ids, np.ones((G, S), bool))
    # Later tokens are others, and some of them are padding.
    after = run(
      np.where(past[..., None], old, new),
      np.where(past, old_ids, new_ids),
      past | real,
    )
    difference = np.abs(np.asarray(before) - np.asarray(after))[past]
    return (difference > 1e-5).any()

  # Noise, if there is any, falls on what evaluation does.
  modes = (False, True) if options in OPTIONS.values() else (True,)
  leak = options.causality(sizes).leak
  assert (leak is None) != any(map(changes, modes))
  assert leak is None or 'later tokens change earlier outputs' in leak


# The random router is left out: its draws depend on the shape of its input.
@pytest.mark.parametrize('sizes', [TIGHT, ROOMY], ids=name)
@pytest.mark.parametrize('kind', [kind for kind in OPTIONS if kind != 'random'])
def test_a_router_decodes_if_steps_give_what_whole_rows_do(kind, sizes):
  options = OPTIONS[kind]
  if any(options.problems_with(sizes)):
    pytest.skip('the router refuses a capacity that binds')
  causality = options.causality(sizes)
  serving = ROOMY if causality.room_in_generation else sizes
  x, ids = inputs()
  run = functools.partial(output, options, serving, False)
  row_outputs = run(x, ids, np.ones((G, S), bool))
  # A step has one token, which padding follows: programs are shared.
  first = np.arange(S) < np.ones((G, 1))
  steps = np.stack(
    [
      run(np.roll(x, -t, 1), np.roll(ids, -t, 1), first)[:, 0] for t in range(S)
    ],
    1,
  )
  alike = np.allclose(row_outputs, steps, rtol=1e-4, atol=1e-4)
  assert (causality.undecodable is None) == alike


@pytest.mark.parametrize('kind', OPTIONS)
def test_the_losses_that_a_router_names_are_those_it_has(kind):
  options = OPTIONS[kind]
  weights = options.loss_weights()
  x, ids = inputs()
  _, aux, _ = compiled(options, tight(options), True)(
    x, ids, np.ones((G, S), bool)
  )
  assert aux.losses.keys() == weights.keys()
  for name in weights:
    has_weight = getattr(options, name.replace('_loss', '_weight')) > 0
    assert (aux.losses[name] > 0) == has_weight, name


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('kind', OPTIONS)
def test_padding_takes_no_slot_and_changes_nothing(kind, train):
  options = OPTIONS[kind]
  run = compiled(options, tight(options), train)
  mask = np.random.default_rng(4).random((G, S)) < 0.7
  (x, ids), (_, other_ids) = inputs(0), inputs(1)
  worse = np.where(mask[..., None], x, np.float32(np.nan))
  results = [
    run(x, ids, mask), run(worse, np.where(mask, ids, other_ids), mask)
  ]  # fmt: skip
  for routing, aux, y in results:
    slots = np.asarray(routing.slot_shares()) > 0
    assert not slots[~mask].any() and slots[mask].any()
    assert not np.asarray(y)[~mask].any()
    assert aux.stats.tokens == mask.sum()
    if options.mixes or not options.by_expert:
      # Every token has K choices, which a mixture divides.
      np.testing.assert_allclose(
        aux.stats.load.sum(), K * mask.sum(), rtol=1e-5
      )
    if options.mixes:
      continue
    # Each slot has at most one token.
    assert slots.sum(1).max() == 1
    np.testing.assert_allclose(aux.stats.kept_load.sum(), slots.sum())
  (_, aux, y), (_, same_aux, same_y) = results
  # XLA's vectors may round numbers beside NaN otherwise, by a last bit.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  close(y, same_y)
  jax.tree.map(close, aux, same_aux)


@pytest.mark.parametrize('kind', OPTIONS)
def test_gradients_reach_all_parameters_and_no_padding(kind):
  options, groups = OPTIONS[kind], 4
  if kind == 'hierarchical':
    options = dataclasses.replace(options, noisy=True)
  module, params = options.module(ROOMY, SHARED, 'router'), variables(options)
  x, ids = inputs(groups=groups)
  mask = np.arange(S)[None] < np.array([[S], [5], [2], [0]])
  worse = np.where(mask[..., None], x, np.float32(np.nan))

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(params, x):
    real, info = jax.tree.map(jnp.asarray, (mask, info_of(ids)))
    chosen, aux = module.apply(params, x, real, False, info)
    toward = jnp.cos(jnp.arange(chosen.gate.size)).reshape(chosen.gate.shape)
    return (chosen.gate * toward).sum() + sum(aux.losses.values())

  d_params, dx = gradient(params, worse)
  for leaf in jax.tree.leaves(d_params):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-5
  assert not np.asarray(dx)[~mask].any() and np.isfinite(dx).all()


@pytest.mark.parametrize('kind', OPTIONS)
def test_imposed_choices_are_served_instead_of_a_routers_own(kind):
  options, groups = OPTIONS[kind], 4
  module, params = options.module(ROOMY, SHARED, 'router'), variables(options)
  x, ids = inputs(groups=groups)
  mask = np.ones((groups, S), bool)
  mask[1, 5:] = False
  rng = np.random.default_rng(6)
  expert = rng.random((groups, S, E)).argsort(-1)[..., :K].astype(np.int32)
  kept = rng.random(expert.shape) < 0.7

  @jax.jit
  def experts_of_tokens(x, mask, ids, given):
    routing, _ = module.apply(params, x, mask, False, info_of(ids), given=given)
    return (routing.slot_shares() > 0).any(-1)  # [G, S, E]

  # An expert that chooses takes all tokens that are imposed on it.
  given = GivenChoices(expert, None if options.by_expert else kept)
  if not options.takes_choices:
    with pytest.raises(ValueError, match='takes no others'):
      experts_of_tokens(x, mask, ids, given)
    return
  served = np.zeros((groups, S, E), bool)
  np.put_along_axis(served, expert, kept | options.by_expert, -1)
  np.testing.assert_array_equal(
    experts_of_tokens(x, mask, ids, given), served & mask[..., None]
  )


@pytest.mark.parametrize('kind', OPTIONS)
def test_parameters_are_a_routers_and_cost_what_is_said(kind):
  options = OPTIONS[kind]
  start = fresh(options)
  roles = jax.tree.leaves(
    roles_of(start.get('params', {})), is_leaf=lambda x: isinstance(x, Role)
  )
  assert {role.role for role in roles} <= {'router'}
  kernels = [
    leaf
    for leaf, role in zip(
      jax.tree.leaves(nn.meta.unbox(start.get('params', {}))),
      roles,
      strict=True,
    )
    if role.form == 'kernel'
  ]
  total = sum(kernel.size for kernel in kernels)
  moe = MoeOptions(E, K, router=options, capacity=All(), dispatch=Einsum())
  cost = router_multiply_adds(moe, M)
  # A token is multiplied by only some of the kernels that are stacked.
  assert (cost == total) or any(kernel.ndim > 2 for kernel in kernels)
  assert cost <= total and (cost > 0) == (total > 0)


@pytest.mark.parametrize('kind', OPTIONS)
def test_state_is_kept_where_it_is_said_and_moves(kind):
  options = OPTIONS[kind]
  assert not options.keeps_state and 'router_state' not in fresh(options)
  can_keep = type(options).keeps_state is not RouterOptions.keeps_state
  options = stateful(options)
  assert (options is not None) == can_keep
  if not can_keep:
    return
  assert options.keeps_state
  state = fresh(options)['router_state']
  load = jnp.arange(float(E))
  new_state = options.move_state(state, load)
  assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
  for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new_state)):
    assert (np.asarray(before) != np.asarray(after)).any()
  # In a stack of layers each layer's state moves by its own load; at a rate of
  # 0 none moves.
  stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
  loads = jnp.stack([load, load[::-1]])
  moved = options.move_state(stack, loads)
  for i in range(2):
    layer_state = options.move_state(state, loads[i])
    layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], moved)
    jax.tree.map(np.testing.assert_array_equal, layer, layer_state)
  unmoved = options.move_state(state, load, 0.0)
  jax.tree.map(np.testing.assert_array_equal, unmoved, state)


@pytest.mark.parametrize('kind', OPTIONS)
def test_what_a_router_needs_of_a_batch_it_says(kind):
  options = OPTIONS[kind]
  module = options.module(tight(options), SHARED, 'router')
  apply = functools.partial(
    jax.eval_shape,
    module.apply,
    variables(options),
    inputs()[0],
    np.ones((G, S), bool),
  )
  info = info_of(inputs()[1])
  apply(token_info=info.only(options.reads))
  for name in options.reads:
    with pytest.raises(ValueError, match=f'no {name} are given'):
      apply(token_info=info._replace(**{name: None}))


@pytest.mark.parametrize('kind', OPTIONS)
def test_sizes_and_other_forms_of_the_options(kind):
  options = OPTIONS[kind]
  assert not list(options.problems_with(ROOMY))
  for problem in options.problems_with(TIGHT):
    assert problem.startswith('capacity.kind=') and "use 'all'" in problem
  for num_selected in (0, E + 2):
    sizes = dataclasses.replace(ROOMY, num_selected=num_selected)
    (problem, *_) = options.problems_with(sizes)
    assert problem.startswith('num_selected=')
  assert type(options.shrunk()) is type(options)
  assert not (options.by_expert and options.causality(TIGHT).drops)
  assert not options.causality(ROOMY).drops
