"""The contract of every optimizer; schedules by formula, rules by name.

Every kind, a user's own among them, updates each matrix of a stack as it would
alone, on a mesh as on one device, and bfloat16 as float32; its state stays
finite and is saved. optax is the oracle of AdamW and Adafactor; the iteration
of Muon is in `test_muon.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.layers.parameters import Role
from moe_jax.partitioning import make_mesh
from moe_jax.runs import finite
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.training import rounded_moments
from moe_jax.training.optimizer import OPTIMIZERS, Adafactor, AdamW, clipped
from moe_jax.training.schedules import Constant, Cosine, InverseSqrt, Trapezoid
from tests.models import tiny as tiny_models
from tests.own_kinds import SignSgd
from tests.training import tiny

AXES = {
  'w': ('embed', 'mlp'),
  'layers': {'experts': ('layers', 'expert', 'embed', 'mlp')},
  'scale': ('embed',),
}
ROLES = {
  'w': Role('ffn', 'kernel'),
  'layers': {'experts': Role('expert', 'kernel')},
  'scale': Role('norm', 'scale'),
}
AT_ONCE = Constant(warmup_steps=0)


def transformation(options):
  return options.transformation(10, AXES, ROLES)


def random_tree(seed, size=1.0):
  rng = np.random.default_rng(seed)
  return {
    'w': rng.normal(size=(6, 5)).astype(np.float32),
    'layers': {
      'experts': (size * rng.normal(size=(2, 4, 6, 8))).astype(np.float32)
    },
    'scale': rng.normal(size=6).astype(np.float32),
  }


@pytest.fixture(scope='module')
def params():
  return random_tree(0) | {'scale': np.ones(6, np.float32)}


@pytest.fixture(scope='module')
def grads():
  # Experts have very different sizes, so that a shared statistic would show.
  return random_tree(1, size=10.0 ** np.arange(4).reshape(1, 4, 1, 1))


def program(transform, steps=3):
  """A compiled (parameters, gradients) -> parameters after some steps.

  Gradients double, as Adam sees no scale that all steps share.
  """

  @jax.jit
  def stepped(params, grads):
    state = transform.init(params)
    for i in range(steps):
      scaled = optax.tree.scale(2.0**i, grads)
      updates, state = transform.update(scaled, state, params)
      params = optax.apply_updates(params, updates)
    return params

  return stepped


def run(transform, params, grads, steps=3):
  return jax.device_get(program(transform, steps)(params, grads))


# Matrices are large enough to be factored.
FACTORED = functools.partial(Adafactor, min_factored_size=2)
KINDS = {**OPTIMIZERS.builtin, 'adafactor': FACTORED, 'own': SignSgd}
HALVES = functools.partial(AdamW, moment_dtype='bfloat16')


def optimizer(kind, **values):
  options = dict(schedule=AT_ONCE, learning_rate=0.1, clip_norm=0.0)
  return kind(**options | values)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_each_matrix_of_a_stack_is_updated_as_alone(kind, params, grads):
  o = optimizer(kind)
  alone = o.transformation(10, ('embed', 'mlp'), Role('expert', 'kernel'))
  expected = jax.vmap(jax.vmap(program(alone)))(
    params['layers']['experts'], grads['layers']['experts']
  )
  stacked = run(transformation(o), params, grads)['layers']['experts']
  np.testing.assert_allclose(stacked, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'kind', [*KINDS.values(), HALVES], ids=[*KINDS, 'bfloat16 moments']
)
def test_a_mesh_changes_no_update(kind, params, grads):
  mesh = make_mesh(dict(fsdp=2, expert=2, tensor=2))
  spec = PartitionSpec(None, 'expert', 'fsdp', 'tensor')
  specs = {
    'w': PartitionSpec('fsdp'),
    'layers': {'experts': spec},
    'scale': PartitionSpec('fsdp'),
  }
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  placed = jax.device_put((params, grads), (shardings, shardings))
  transform = transformation(optimizer(kind))
  expected = run(transform, params, grads)
  assert_close(run(transform, *placed), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_moments_of_bfloat16_parameters_are_those_of_float32(
  kind, params, grads
):
  # At b2 = 0.999 the nearest bfloat16 to a second moment is mostly the old one.
  betas = {'b2': 0.999} if hasattr(kind, 'b2') else {}
  o = optimizer(kind, weight_decay=0.0, **betas)
  short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, grads))
  long = jax.tree.map(lambda x: x.astype(jnp.float32), short)

  def updated(params, grads):
    state = transformation(o).init(params)
    for _ in range(3):
      updates, state = transformation(o).update(grads, state, params)
    return updates, state

  for a, b in zip(*map(jax.tree.leaves, (updated(*short), updated(*long)))):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_a_state_stays_finite_and_is_saved(kind, params, tmp_path):
  """An infinite leaf is always a fault, also without any gradient."""
  transform = transformation(optimizer(kind))
  state = jax.jit(transform.init)(params)
  assert finite.not_finite(state) == []
  update = jax.jit(transform.update)
  for size in (0.0, 1e-3):
    grads = optax.tree.scale(size, params)
    updates, state = update(grads, state, params)
    assert finite.not_finite((updates, state)) == []
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    restored = checkpoints.restore(jax.eval_shape(lambda: state)).state
  assert_close(update(params, restored, params), update(params, state, params))


def test_adamw_is_optax_adamw_clipped_by_the_global_norm(params, grads):
  o = optimizer(AdamW, clip_norm=2e4, decay_rules=(('', 1.0),))
  # The first of three gradients is below the norm, and the last is above.
  assert 0.6e4 < optax.global_norm(grads) < 1.9e4
  reference = optax.chain(
    optax.clip_by_global_norm(2e4),
    optax.adamw(0.1, o.b1, o.b2, o.epsilon, weight_decay=o.weight_decay),
  )
  assert_close(
    run(transformation(o), params, grads), run(reference, params, grads)
  )


def test_adafactor_is_optax_adafactor(params, grads):
  o = optimizer(FACTORED, b1=0.0, weight_decay=0.0)
  reference = optax.adafactor(
    0.1,
    min_dim_size_to_factor=2,
    decay_rate=0.8,
    multiply_by_parameter_scale=True,
    weight_decay_rate=None,
  )
  new, expected = (
    run(transform, params, grads)['w']
    for transform in (transformation(o), reference)
  )
  np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ('schedule', 'step', 'expected'),
  [
    (Cosine, 0, 0.1),  # the first of ten warm-up steps
    (Cosine, 9, 1.0),
    (Cosine, 55, 0.1 + 0.9 * 0.5),  # half way down to final_fraction
    (Cosine, 100, 0.1),  # after the last step
    (Constant, 99, 1.0),
    (InverseSqrt, 9, 1.0),
    (InverseSqrt, 40, 0.5),  # sqrt(10 / 40)
    (Trapezoid, 80, 1.0),
    (Trapezoid, 95, 0.25),  # 15 of the last 20 steps are taken
    (Trapezoid, 99, 0.05),  # the last step still learns
    # All steps after the warm-up are a line, of which half are taken.
    (functools.partial(Trapezoid, decay_fraction=1.0), 55, 0.5),
  ],
)
def test_schedule_by_formula(schedule, step, expected):
  rate = schedule(warmup_steps=10).rate(1.0, 100)(step)
  np.testing.assert_allclose(rate, expected, rtol=1e-6)


@pytest.mark.parametrize('schedule', [Cosine, Constant, InverseSqrt, Trapezoid])
def test_a_warmup_is_at_most_half_of_the_run(schedule):
  # Four of nine steps warm up, even if a hundred are asked for.
  steps = jnp.arange(9)
  long, cut = (
    np.asarray(jax.jit(schedule(warmup_steps=n).rate(1.0, 9))(steps))
    for n in (100, 4)
  )
  np.testing.assert_array_equal(long, cut)
  np.testing.assert_allclose(long[:4], [0.25, 0.5, 0.75, 1.0])
  # A run of one step has no warm-up.
  assert schedule(warmup_steps=100).rate(1.0, 1)(np.zeros(1)) == 1.0


def test_runs_are_equal_until_the_shorter_one_decays():
  short, long = (Trapezoid(warmup_steps=3).rate(1.0, n) for n in (10, 20))
  stable = Trapezoid().stable_steps(10)
  steps = jax.numpy.arange(10)
  equal = np.asarray(short(steps) == long(steps))
  assert equal[: stable + 1].all() and not equal[stable + 1 :].any()


def test_adafactor_clips_each_update_at_its_option(params, grads):
  # The first update has a root mean square of 1 before it is clipped.
  steps = {}
  for clip in (1.0, 0.1):
    o = Adafactor(
      schedule=AT_ONCE, b1=0.0, clip_norm=0.0, weight_decay=0.0,
      update_clip=clip,
    )  # fmt: skip
    new = run(transformation(o), params, grads, steps=1)
    steps[clip] = jax.tree.map(lambda a, b: np.asarray(a - b), new, params)
  for update, limited in zip(*map(jax.tree.leaves, steps.values())):
    np.testing.assert_allclose(limited, update / 10, rtol=1e-2, atol=1e-6)


def decayed(params, **options):
  """Fraction of each parameter that a step without a gradient leaves."""
  zeros = jax.tree.map(np.zeros_like, params)
  o = AdamW(schedule=AT_ONCE, learning_rate=1.0, weight_decay=0.5, **options)
  new_params = run(transformation(o), params, zeros, steps=1)
  return jax.tree.map(
    lambda a, b: round(float((np.asarray(a) / b).mean()), 5), new_params, params
  )


def test_patterns_of_a_users_own_come_first(params):
  fractions = decayed(params, rate_rules=(('experts', 0.1),))
  np.testing.assert_allclose(fractions['layers']['experts'], 0.95, rtol=1e-5)
  assert (fractions['w'], fractions['scale']) == (0.5, 1.0)
  fractions = decayed(params, decay_rules=(('^w$', 0.0), ('scale', 2.0)))
  np.testing.assert_allclose(fractions['scale'], 0.0, atol=1e-6)
  assert (fractions['w'], fractions['layers']['experts']) == (1.0, 0.5)


def test_rules_select_parts_of_the_model_too(params):
  # 'experts' is the role here, and 'ffn' is in no name.
  fractions = decayed(
    params,
    rate_rules=(('part:ffn + norms', 0.1), ('', 0.2)),
    decay_rules=(('part:all - experts', 1.0),),
  )
  assert fractions == {'w': 0.95, 'layers': {'experts': 0.9}, 'scale': 0.95}
  # The first that selects a parameter counts, whatever its form.
  fractions = decayed(params, rate_rules=(('^w$', 0.0), ('part:all', 0.1)))
  assert (fractions['w'], fractions['layers']['experts']) == (1.0, 0.95)
  # A part that does not train may be named, as long as the model has it.
  frozen = {'w': None, 'layers': params['layers'], 'scale': None}
  axes = {'w': None, 'layers': AXES['layers'], 'scale': None}
  o = AdamW(schedule=AT_ONCE, rate_rules=(('part:ffn', 0.1),))
  part = o.transformation(
    10,
    axes,
    ROLES,
    lambda tree, is_leaf=None: {**tree, 'w': None, 'scale': None},
  )
  assert run(part, frozen, frozen, steps=1)['w'] is None


@pytest.mark.parametrize('name', ['rate_rules', 'decay_rules'])
def test_a_part_that_the_model_lacks_is_refused_by_the_rule(name):
  o = AdamW(**{name: (('part:lstm', 0.1),)})
  with pytest.raises(ValueError, match=f"{name}='lstm'.*have .*'experts'"):
    transformation(o)
  # An expression that is in no name would have no effect.
  o = AdamW(**{name: (('expert/', 0.1),)})
  with pytest.raises(
    ValueError, match=f"{name}='re:expert/': .* no parameter of"
  ):
    transformation(o)


def test_no_bias_decays_that_of_a_router_among_them():
  options = tiny.options(
    total_steps=100,
    model={'use_bias': True, **tiny.router(use_bias=True)},
    optimizer={'learning_rate': 1.0, 'weight_decay': 0.5},
  )
  params = tiny_models.params_of(tiny.model_of(options))
  params = jax.tree.map(np.ones_like, params)
  zeros = jax.tree.map(np.zeros_like, params)
  new_params = run(tiny.optimizer_of(options), params, zeros, steps=1)
  decays = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, leaf in jax.tree_util.tree_leaves_with_path(new_params)
    if (leaf < 1).any()
  }
  router = 'layers/layer_1/moe/router'
  assert f'{router}/w' in decays
  assert f'{router}/b' not in decays
  last = {name.rpartition('/')[2] for name in decays}
  assert not [x for x in last if x in ('b', 'scale') or x.startswith('b_')]


@pytest.mark.parametrize('largest', [0.5, 1e9])
def test_clipping_is_that_of_optax(grads, largest):
  """Equal up to rounding if it clips, and bit for bit if it does not."""
  grads = {**grads, 'half': grads['w'].astype(jnp.bfloat16)}
  a, b = (
    jax.jit(transform.update)(grads, transform.init(grads))[0]
    for transform in (clipped(largest), optax.clip_by_global_norm(largest))
  )
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    rounding = 1e-2 if x.dtype == jnp.bfloat16 else 1e-6
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    np.testing.assert_allclose(x, y, rtol=rounding if largest < 1 else 0)


rounded_of = jax.jit(rounded_moments.rounded)


@functools.partial(jax.jit, static_argnums=(0, 2))
def noise(name, count, shape):
  return rounded_moments.noise(name, jnp.int32(count), shape)


def test_a_number_is_rounded_to_a_neighbour_and_on_average_to_itself():
  # Beside 1.0 bfloat16 has steps of 2^-7; a quarter of one is rounded up in a
  # quarter of the cases.
  x = jnp.full((50, 400), -(1 + 2.0**-9), jnp.float32)
  rounded = np.asarray(rounded_of(x, noise('w', 3, x.shape)), np.float32)
  assert {-1.0, -(1 + 2.0**-7)} == set(np.unique(rounded).tolist())
  up = (rounded != -1).mean()
  assert abs(up - 0.25) < 5 * (0.25 * 0.75 / x.size) ** 0.5
  # Each row and each column has this share, too: neighbours are independent.
  for axis in (0, 1):
    shares = (rounded != -1).mean(axis)
    assert shares.std() < 1.4 * (0.25 * 0.75 / x.shape[axis]) ** 0.5


def test_what_bfloat16_has_is_kept_and_so_is_what_is_not_finite():
  x = np.array([0.0, -2.5, 1e-30, np.inf, -np.inf, np.nan], np.float32)
  x[2] = np.asarray(jnp.bfloat16(x[2]), np.float32)
  x = np.append(x, np.array([0x7FFFFFFF], np.uint32).view(np.float32))
  most = jnp.full(x.shape, 0xFFFF, jnp.uint32)
  rounded = np.asarray(rounded_of(jnp.asarray(x), most), np.float32)
  np.testing.assert_array_equal(np.asarray(rounded, np.float32), x)


def test_first_updates_are_those_of_adam_but_for_rounding():
  params = random_tree(0)
  ours, adam = HALVES(weight_decay=0.0), optax.scale_by_adam(0.9, 0.98)
  ours = ours.preconditioner(AXES, None)
  state, other = ours.init(params), adam.init(params)
  for seed in (1, 2):
    grads = random_tree(seed)
    updates, state = jax.jit(ours.update)(grads, state)
    expected, other = adam.update(grads, other)
    tiny_models.assert_trees_close(updates, expected, atol=0.05)


def test_noise_differs_between_steps_names_and_elements():
  first = np.asarray(noise('a', 1, (30, 40)))
  for other in (noise('a', 2, (30, 40)), noise('b', 1, (30, 40))):
    assert (first == other).mean() < 0.01
  assert len(np.unique(first)) == first.size
  np.testing.assert_array_equal(first, noise('a', 1, (30, 40)))


def test_a_small_change_moves_the_second_moment_on_average():
  """A change of a thousandth would be lost in rounding to the nearest."""
  params = random_tree(0)
  grads = jax.tree.map(np.ones_like, params)
  adam = HALVES(b2=0.999).preconditioner(AXES, None)
  state = adam.init(params)
  # The moments are two arrays, as both may be donated.
  assert state.mu['w'] is not state.nu['w']
  # The second moment has its value after many steps with gradients of 0.9; now
  # gradients are 1.
  state = state._replace(nu=optax.tree.full_like(state.nu, 0.8125))
  update = jax.jit(adam.update)
  for _ in range(100):
    _, state = update(grads, state)
  nu = np.asarray(state.nu['layers']['experts'], np.float32)
  expected = 1 - 0.1875 * 0.999**100
  assert abs(nu.mean() - expected) < 5e-3
  assert jnp.bfloat16(0.999 * 0.8125 + 0.001) == jnp.bfloat16(0.8125)
  assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype('bfloat16')}
