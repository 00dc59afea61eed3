"""Does any combination of mesh, exchange and savings change a training step?

    python -m experiments.combinations --count=100

Draws values of ten factors, with a preference for pairs of values that were not
together before, and takes a step of a tiny sparse decoder on a mesh of fake
devices. Loss, sums of statistics, each leaf of the gradient, the clipped update
and the balancing bias must be those of a plain step on one device. What the
options refuse is counted apart. `--seed` decides the draws, and `--only` takes
the combination of a printed line again. `--plant` puts a bug into the library
that the script has to find.
"""

import collections
import functools
import itertools
import multiprocessing
import random
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from moe_jax import cli, models, partitioning, run_config
from moe_jax.config import ConfigDict
from moe_jax.configs import base
from moe_jax.errors import InputError
from moe_jax.models import trees
from moe_jax.parallel import exchange
from moe_jax.routing import Routing
from moe_jax.training import losses, step

DEVICES = 8
B, T, V = 16, 24, 8198
CLIP = 0.01  # far below the norm of the gradient
_EXCHANGE = 'model.moe.dispatch.{}.exchange.kind'
_ROUTER = 'model.moe.router.'
Values = Mapping[str, Any]
# Values of each factor, by name: what they change of the config.
FACTORS: dict[str, dict[str, Values]] = {
  'mesh': {
    ' '.join(f'{k}={v}' for k, v in sizes.items()): {
      f'mesh.{name}': size for name, size in sizes.items()
    }
    for sizes in (
      dict(data=4),
      dict(fsdp=4),
      dict(expert=4),
      dict(data=2, tensor=2),
      dict(data=2, expert=4),
      dict(fsdp=2, expert=2),
      dict(expert=2, tensor=4),
      dict(data=2, fsdp=2, expert=2),
      dict(fsdp=2, expert=2, tensor=2),
    )
  },
  'dispatch': {
    kind: {'model.moe.dispatch.kind': kind}
    for kind in ('gather', 'einsum', 'dropless', 'sorted')
  },
  'exchange': {
    'default': {},
    'ring': {_EXCHANGE: 'ring'},
    'all_gather': {_EXCHANGE: 'all_gather'},
  },
  'shadowed': {
    'none': {},
    'three': {
      'model.moe.dispatch.{}.shadowing.experts': 3,
      'model.moe.dispatch.{}.shadowing.gigabytes': 1e-6,
    },
  },
  'router': {
    'top-2': {f'{_ROUTER}token_choice.gates': 'renormalized'},
    'top-1': {'model.moe.num_selected': 1},
    'biased': {
      f'{_ROUTER}token_choice.gates': 'sigmoid_renormalized',
      f'{_ROUTER}token_choice.balance_bias_rate': 0.01,
      f'{_ROUTER}token_choice.global_balance_weight': 0.1,
    },
    'choice-major': {
      f'{_ROUTER}token_choice.gates': 'renormalized',
      f'{_ROUTER}token_choice.slot_priority': 'choice_major',
    },
    # No expert is drawn by chance, as slices draw others than a whole batch.
    'sparse_mixer': {
      f'{_ROUTER}kind': 'sparse_mixer',
      f'{_ROUTER}sparse_mixer.threshold': 0.0,
    },
    **{kind: {f'{_ROUTER}kind': kind} for kind in ('expert_choice', 'hash')},
  },
  'room': {
    'tight': {'model.moe.capacity.per_token.factor': 1.0},
    'all': {'model.moe.capacity.kind': 'all'},
  },
  'slices': {
    'one': {},
    'two': {'microbatches': 2},
    'two at once': {'microbatches': 2, 'exchange_once': True},
  },
  'remat': {
    name: {'model.remat': name}
    for name in ('none', 'full', 'dots', 'save=rows,hidden')
  },
  'layers': {
    'loop': {},
    'unrolled': {'model.scan_layers': False},
  },
  'loss': {
    'whole': {},
    'blocks': {'model.embedding.block_mb': 1},
    'with z-loss': {'logits_z_weight': 0.1},
  },
}
# Factors that decide the numbers, so that the plain step has them, too.
_KEPT = ('router', 'room', 'loss')
# The fault of a combination whose process the compiler ends.
ENDED = 'the compiler ended the process'
Drawn = tuple[str, ...]  # the name of a value of each factor, in their order


def draw(rng: random.Random, tried: set[tuple]) -> Drawn:
  """The one of 30 random combinations with the most pairs that are new."""
  drawn = [
    tuple(rng.choice([*values]) for values in FACTORS.values())
    for _ in range(30)
  ]
  return max(drawn, key=lambda one: len(pairs(one) - tried))


def pairs(drawn: Drawn) -> set[tuple]:
  """The pairs of values of two factors that a combination has."""
  return {*itertools.combinations(enumerate(drawn), 2)}


def options_of(drawn: Drawn, plain: bool = False) -> run_config.RunConfig:
  """The options of a combination, or of its plain step on one device.

  Raises:
    ValueError: The options do not go together.
  """
  config = base.get_config()
  config.batch_size, config.data.seq_len = B, T
  model, moe = config.model, config.model.moe
  model.num_layers, model.width, model.vocab_size = 2, 16, V
  model.attention.num_heads, model.ffn.hidden = 4, 24
  moe.layers, moe.num_experts, moe.num_selected = 'all', 8, 2
  moe.allow_future_leak, config.mesh.data = True, 1
  moe.capacity.kind = 'per_token'
  kind = 'gather' if plain else dict(zip(FACTORS, drawn))['dispatch']
  changes: dict[str, Any] = {}
  for (factor, values), name in zip(FACTORS.items(), drawn, strict=True):
    if not plain or factor in _KEPT:
      changes |= {k.format(kind): v for k, v in values[name].items()}
  if plain:
    changes.pop('model.embedding.block_mb', None)
  return run_config.read(config_with(config, changes))


def config_with(config: ConfigDict, changes: Values) -> ConfigDict:
  """The config with other values, by their dotted names."""
  for key, value in changes.items():
    *sections, name = key.split('.')
    section = functools.reduce(lambda c, part: c[part], sections, config)
    section[name] = value
  return config


def batch() -> dict[str, np.ndarray]:
  """Rows of two documents each, some of which end in padding."""
  rng = np.random.default_rng(0)
  segment_ids = np.ones((B, T), np.int32)
  segment_ids[:, 9:], segment_ids[::3, 20:] = 2, 0
  return {
    'tokens': rng.integers(0, V, (B, T), np.int32),
    'targets': rng.integers(0, V, (B, T), np.int32),
    'segment_ids': segment_ids,
    'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    'loss_weights': (segment_ids > 0).astype(np.float32),
  }


def kept_gradient() -> optax.GradientTransformation:
  """An optimizer that changes nothing and keeps the gradient as its state."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (updates, updates),
  )


@functools.cache
def first_params(model: models.Model) -> Any:
  """The initial parameters on the host; a mesh or remat changes none."""
  params = models.init_params(model, jax.random.key(0))
  return jax.device_get(nn.meta.unbox(params))


def take_step(options: run_config.RunConfig, plain: Any) -> dict[str, Any]:
  """The results of one step by name, on the host.

  Args:
    options: The options.
    plain: The model whose initial parameters are taken.
  """
  mesh = options.mesh.make(jax.devices()[: _size(options)])
  rules = options.sharding.rules
  model = options.model.build(rules)
  optimizer = optax.chain(
    kept_gradient(), optax.clip_by_global_norm(CLIP), optax.scale(-1.0)
  )
  shapes, axes, _ = models.describe(model)
  params = partitioning.tree_shardings(mesh, rules, axes, shapes)
  state_of = functools.partial(_state, model, optimizer)
  state = jax.device_get(state_of(first_params(plain)))
  whole = partitioning.sharding(mesh, rules, ())
  shardings = jax.tree.map(lambda _: whole, state)
  opt_state = params, *shardings.opt_state[1:]
  shardings = shardings.replace(params=params, opt_state=opt_state)
  rows = partitioning.sharding(mesh, rules, ('batch', None), (B, T))
  weights = losses.loss_weights(model, options.logits_z_weight)
  run = functools.partial(
    step.train_step,
    grad_fn=step.make_grad_fn(
      model,
      weights,
      options.microbatches,
      local_axes=options.local_axes,
    ),
    optimizer=optimizer,
    rate=optax.constant_schedule(0.0),
    normalize=functools.partial(losses.normalizers, model),
    move_router_state=functools.partial(trees.move_router_state, model.stacks),
  )
  run = jax.jit(run, out_shardings=(shardings, None))
  new, metrics = jax.device_get(
    run(jax.device_put(state, shardings), jax.device_put(batch(), rows))
  )
  sums = metrics.sums
  return {
    'loss': metrics.loss,
    # Counts of rows that move between devices depend on the mesh.
    'sums': sums._replace(aux=sums.aux._replace(exchange=())),
    'gradient': new.opt_state[0],
    'update': jax.tree.map(np.subtract, new.params, state.params),
    'balancing bias': new.router_state,
  }


def _state(model, optimizer, params) -> step.TrainState:
  zero = jnp.zeros((), jnp.int32)
  router_state = trees.init_router_state(model)
  seed = zero.astype(jnp.uint32)
  return step.TrainState(
    zero, seed, params, optimizer.init(params), router_state
  )


def _size(options: run_config.RunConfig) -> int:
  sizes = [getattr(options.mesh, name) for name in partitioning.MESH_AXES]
  return int(np.prod(sizes))


# Relative and absolute tolerance of each result.
TOLERANCE = {
  'loss': (1e-5, 0),
  'sums': (1e-4, 1e-4),
  'gradient': (1e-3, 2e-5),
  'update': (1e-3, 1e-6),
  'balancing bias': (0, 1e-7),
}


def differences(result: Values, expected: Values) -> list[str]:
  """The names of leaves that are not equal within the tolerance."""
  wrong = []
  for name, (rtol, atol) in TOLERANCE.items():
    leaves = jax.tree_util.tree_leaves_with_path(result[name])
    others = jax.tree.leaves(expected[name])
    for (path, leaf), other in zip(leaves, others, strict=True):
      if not np.allclose(leaf, other, rtol, atol):
        most = np.abs(np.subtract(leaf, other)).max()
        wrong.append(f'{name}{jax.tree_util.keystr(path)}: {most:.2e}')
  return wrong


def plant(bug: str) -> None:
  """Puts a bug into the library that only some combinations meet."""
  if bug == 'ring':  # rows return in the direction in which they came
    right = exchange.permuted
    exchange.permuted = lambda *args, to_experts, **kwargs: right(
      *args, to_experts=True, **kwargs
    )
  elif bug == 'experts':  # a choice of the last expert of a device is lost
    right = Routing.of_experts

    def of_experts(self: Routing, number, num_experts):
      last = jnp.where(number == num_experts - 1, num_experts, number)
      return right(self, last, num_experts)

    Routing.of_experts = of_experts
  elif bug == 'slices':  # each slice is divided by its own weights
    right = losses.total_loss

    def total_loss(sums, divisors, weights):
      own = divisors._replace(weight=jnp.maximum(sums.weight, 1e-9))
      return right(sums, own, weights)

    losses.total_loss = total_loss


@functools.cache
def plain_step(drawn: Drawn) -> dict[str, Any]:
  """The results of a combination's plain step by name, on the host."""
  options = options_of(drawn, plain=True)
  return take_step(options, options.model.build())


def compare(drawn: Drawn) -> tuple[bool, list[str]]:
  """Whether a combination ran, and what is wrong with it, or why it did not."""
  try:
    options, plain = options_of(drawn), options_of(drawn, plain=True)
    mesh = options.mesh.make(jax.devices()[: _size(options)])
    options.check_rows(options.sharding.row_parts(mesh))
    result = take_step(options, plain.model.build())
  except (InputError, NotImplementedError) as error:
    return False, [str(error).splitlines()[0]]
  except jax.errors.JaxRuntimeError as error:
    return True, [str(error).splitlines()[0]]
  # Combinations that differ in other factors share a plain step.
  kept = tuple(
    name if factor in _KEPT else next(iter(FACTORS[factor]))
    for factor, name in zip(FACTORS, drawn, strict=True)
  )
  return True, differences(result, plain_step(kept))


def _begin(bug: str | None) -> None:
  jax.config.update('jax_num_cpu_devices', DEVICES)
  # Tiny models compile for longer than they run.
  jax.config.update('jax_disable_most_optimizations', True)
  if bug:
    plant(bug)


def compared(drawn: Drawn, pool: futures.Executor) -> tuple[bool, list[str]]:
  """The result of `compare` in another process, which may end on the way."""
  try:
    return pool.submit(compare, drawn).result()
  except BrokenProcessPool:
    return True, [ENDED]


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Draws and compares combinations; ends with status 1 where some differ."""
  parser = cli.parser('experiments.combinations', __doc__)
  add = parser.add_argument
  add('--count', type=cli.POSITIVE, default=100, help='that have to run')
  add('--seed', type=cli.NOT_NEGATIVE, default=0, help='of the draws')
  add('--only', help='the values of one combination, with commas')
  add('--plant', choices=('ring', 'experts', 'slices'), help='a bug to find')
  options = parser.parse_args(argv)

  def new_pool():
    context = multiprocessing.get_context('spawn')
    return futures.ProcessPoolExecutor(1, context, _begin, (options.plant,))

  covered, tried = set(), set()  # pairs of values that ran, and that were drawn
  refused: collections.Counter[str] = collections.Counter()
  ran, wrong, start, pool = 0, 0, time.monotonic(), new_pool()
  rng, count = random.Random(options.seed), 1 if options.only else options.count
  while ran < count:
    drawn = tuple((options.only or '').split(', '))
    if not options.only:
      drawn = draw(rng, tried)
    tried |= pairs(drawn)
    has_run, found = compared(drawn, pool)
    if not has_run:
      refused[found[0]] += 1
      count -= bool(options.only)
      continue
    if found == [ENDED]:
      pool = new_pool()
    ran, covered = ran + 1, covered | pairs(drawn)
    wrong += bool(found)
    verdict = f'WRONG: {"; ".join(found[:4])}' if found else 'equal'
    print(f'{", ".join(drawn)}: {verdict}', flush=True)
  pool.shutdown()
  print(f'refused by the options: {refused.total()}')
  for reason, number in refused.most_common():
    print(f'  {number} times: {reason}')
  sizes = [len(values) for values in FACTORS.values()]
  total = sum(a * b for a, b in itertools.combinations(sizes, 2))
  print(
    f'{ran} combinations ran in {(time.monotonic() - start) / 60:.0f} minutes, '
    f'with {len(covered)} of {total} pairs of values; {wrong} differ'
  )
  if wrong:
    sys.exit(1)


if __name__ == '__main__':
  main()
