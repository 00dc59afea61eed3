"""The programs that `bench_moe_layer` times, and the arrays that they get.

They are sparse layers, dense layers and bare matrix products of equal shapes.
Routing is real: expert choices are drawn first, and then tokens are made that
the layer's own router sends to these experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import roofline, timing
from moe_jax import kernels, layers
from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import ACTIVATIONS, FfnOptions, MoE, MoeOptions, Shared
from moe_jax.layers.routers import TokenChoice
from moe_jax.routing.capacity import All, PerAssignment
from moe_jax.shapes import Array

ROUTINGS = ('uniform', 'zipf')
LAYERS = ('gather', 'sorted', 'dropless')
# The layers whose capacity factor of 1 drops choices.
DROPPING = LAYERS[:2]
DENSE, PLAIN_DENSE = 'dense', 'dense, plain jnp'
BATCHED = ('batched matmul', 'batched rows_matmul')
GROUPED = ('grouped_ffn', 'grouped_matmul')
RAGGED = 'ragged_dot'
EQUAL = ', equal groups'
OTHERS = (DENSE, PLAIN_DENSE, *BATCHED, *GROUPED, RAGGED)
# Names of the passes, by whether the gradient is computed.
PASSES = {False: 'forward', True: 'forward+backward'}
# The balance loss takes part in the gradient, as in training.
_BALANCE_WEIGHT = 0.01


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes that all settings of a table share.

  Attributes:
    num_tokens: Number of tokens N.
    width: Model width M.
    hidden: Hidden width F of one expert.
    activation: Activation of the experts.
    dtype: Type of parameters and activations.
  """

  num_tokens: int
  width: int
  hidden: int
  activation: str = 'relu'
  dtype: str = 'float32'

  @property
  def kernel_names(self) -> tuple[str, ...]:
    """Names of an expert's input kernels; the output kernel is 'w_out'."""
    gated = ACTIVATIONS[self.activation].gated
    return ('w_gate', 'w_in') if gated else ('w_in',)

  @property
  def shared(self) -> Shared:
    """The numeric types, which all layers share."""
    numerics = layers.Numerics(dtype=self.dtype, param_dtype=self.dtype)
    return Shared(numerics)

  def kernel_bytes(self, E: int) -> int:
    """Bytes of the kernels of E experts, which their gradients have too."""
    kernels = len(self.kernel_names) + 1
    size = E * kernels * self.width * self.hidden
    return size * jnp.dtype(self.dtype).itemsize

  def work(
    self, E: int, K: int | float, *, backward: bool, router: bool
  ) -> roofline.Work:
    """The least work of a layer of E experts, or with E=1 of a dense layer.

    With N tokens of M values and W values in all kernels, the forward pass
    reads kernels and tokens and writes the output, W + 2 N M values. The
    backward pass reads kernels, tokens and the gradient of the output, and
    writes the gradients of kernels and tokens, 2 W + 3 N M values. Rows of
    experts and hidden values are taken to stay in caches, and nothing is
    computed twice.

    Args:
      E: Number of experts, each with kernels of its own.
      K: Mean number of choices of a token that are served; 1 for a dense layer.
      backward: Whether the gradients of kernels and tokens are computed, too.
      router: Whether the kernel and the products of a router count.
    """
    N, M = self.num_tokens, self.width
    itemsize = jnp.dtype(self.dtype).itemsize
    kernel_bytes = self.kernel_bytes(E)
    flops = round(2 * N * K * self.kernel_bytes(1) / itemsize)
    if router:
      kernel_bytes += itemsize * M * E
      flops += 2 * N * M * E
    tokens = itemsize * N * M
    if backward:
      return roofline.Work(3 * flops, 3 * kernel_bytes + 5 * tokens)
    return roofline.Work(flops, kernel_bytes + 2 * tokens)


def moe_layer(
  sizes: Sizes, E: int, K: int, dispatch: str, **of_dispatch: str
) -> MoE:
  """A sparse layer; one of `DROPPING` has capacity factor 1."""
  options = MoeOptions(
    num_experts=E,
    num_selected=K,
    router=TokenChoice(gates='raw' if K == 1 else 'renormalized'),
    capacity=PerAssignment(factor=1.0) if dispatch in DROPPING else All(),
    expert=layers.FeedForwardExpert(sizes.hidden, sizes.activation, 0.0),
    dispatch=layers.DISPATCHES.builtin[dispatch](**of_dispatch),
  )
  return MoE(options, sizes.shared)


def layer_function(module: MoE, backward: bool) -> Callable[..., Any]:
  """The layer as a function (params, x, dy, given=None) -> (y, aux).

  With `backward` it returns the gradients of params and x too; `given` are
  choices that are imposed on the router.
  """

  def run(params, x, dy, given=None):
    def forward(params, x):
      y, aux = module.apply({'params': params}, x, given=given)
      return (y, aux.balance_loss), aux

    if not backward:
      (y, _), aux = forward(params, x)
      return y, aux
    (y, _), pull, aux = jax.vjp(forward, params, x, has_aux=True)
    return y, aux, pull((dy, _BALANCE_WEIGHT / aux.stats.tokens))

  return run


def with_gradient(
  function: Callable[..., Array], backward: bool
) -> Callable[..., Any]:
  """A function (params, x, dy, ...) -> y, from one that does not take dy.

  With `backward` it returns the gradients of params and x too.
  """

  def run(params, x, dy, *more):
    if not backward:
      return function(params, x, *more)
    y, pull = jax.vjp(lambda p, x: function(p, x, *more), params, x)
    return y, pull(dy)

  return run


def other_functions(sizes: Sizes) -> dict[str, Callable[..., Array]]:
  """The dense layers and the bare products, by name.

  Dense layers, `FeedForward` and the same in plain jnp, are functions (params,
  x) -> y; bare products (experts' kernels, rows, group sizes) -> rows have no
  routing.
  """
  ffn = FfnOptions(sizes.hidden, sizes.activation)
  module = layers.FeedForward(ffn, sizes.shared)
  hidden = ACTIVATIONS[sizes.activation].hidden

  def two(product, w, x, *more):
    firsts = (product(x, w[name], *more) for name in sizes.kernel_names)
    return product(hidden(*firsts), w['w_out'], *more)

  def batched(product, w, x, group_sizes):
    groups = x.reshape(group_sizes.size, -1, x.shape[-1])
    return two(product, w, groups).reshape(x.shape)

  def grouped_ffn(w, x, group_sizes):
    firsts = tuple(w[name] for name in sizes.kernel_names)
    return kernels.grouped_ffn(x, firsts, w['w_out'], group_sizes, hidden)

  return {
    DENSE: lambda params, x: module.apply({'params': params}, x),
    PLAIN_DENSE: functools.partial(two, jnp.matmul),
    BATCHED[0]: functools.partial(batched, jnp.matmul),
    BATCHED[1]: functools.partial(batched, rows_matmul),
    GROUPED[0]: grouped_ffn,
    GROUPED[1]: functools.partial(two, kernels.grouped_matmul),
    RAGGED: functools.partial(two, jax.lax.ragged_dot),
  }


def draw_choices(
  rng: np.random.Generator, routing: str, N: int, E: int, K: int
) -> np.ndarray:
  """Draws K different experts for each token, int [N, K].

  Expert e is drawn with equal probability under 'uniform' routing and in
  proportion to 1 / (e + 1) under 'zipf'.

  Raises:
    ValueError: The routing is unknown.
  """
  if routing not in ROUTINGS:
    raise unknown('routing', routing, ROUTINGS)
  p = np.ones(E) if routing == 'uniform' else 1 / np.arange(1.0, E + 1)
  # The K largest of log p + Gumbel noise are a draw without replacement.
  noisy = np.log(p)[None] + rng.gumbel(size=(N, E))
  return np.argsort(-noisy, axis=1)[:, :K]


@dataclasses.dataclass(frozen=True)
class Layer:
  """The parameters that all cases with the same number of experts share.

  Attributes:
    sizes: Sizes of the layer (N, M, F) and its dtype.
    params: Parameters of `MoE`: the router's and the experts' kernels. Dense
      layers have the kernels of the first expert.
    centres: Transpose of the router's kernel: a vector of each expert, all
      orthonormal, float [E, M].
  """

  sizes: Sizes
  params: Any
  centres: np.ndarray

  @classmethod
  def draw(cls, sizes: Sizes, E: int) -> 'Layer':
    """Draws kernels; those of experts have a standard deviation of M^-0.5.

    Raises:
      ValueError: There are more experts than dimensions, so that the centres
        cannot be orthogonal.
    """
    rng = np.random.default_rng(0)
    M, F = sizes.width, sizes.hidden
    if E > M:
      raise InputError(f'num_experts={E} > width={M}: no orthogonal centres')
    shapes = {name: (E, M, F) for name in sizes.kernel_names}
    shapes['w_out'] = (E, F, M)
    experts = {}
    for name, shape in shapes.items():
      kernel = rng.standard_normal(shape, np.float32) / np.sqrt(M)
      experts[name] = jnp.asarray(kernel, sizes.dtype)
    centres = np.linalg.qr(rng.normal(size=(M, E)))[0].T
    router = {'w': jnp.asarray(centres.T, jnp.float32)}
    return cls(sizes, {'router': router, 'experts': experts}, centres)


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The arrays that programs are run on, for one routing.

  Attributes:
    x: Tokens, [1, N, M].
    dy: Gradient of the layer's output, [1, N, M].
    load: Number of assignments of each expert, int [E].
    rows: Input of the bare products, a row for each assignment, [K N, M].
    d_rows: Gradient of the bare products' output, [K N, M].
  """

  x: Array
  dy: Array
  load: np.ndarray
  rows: Array
  d_rows: Array

  @classmethod
  def draw(cls, layer: Layer, routing: str, K: int) -> 'Inputs':
    """Draws choices and makes tokens that the layer's router sends so.

    A token is the weighted sum of its chosen experts' centres plus a little
    noise; the first choice has the largest weight.
    """
    s, E = layer.sizes, len(layer.centres)
    rng, N = np.random.default_rng(1), s.num_tokens
    choices = draw_choices(rng, routing, N, E, K)
    weights = 4.0 - np.arange(K) / K
    x = np.einsum('K,NKM->NM', weights, layer.centres[choices])
    x = (x + rng.normal(0, 0.05, (N, s.width))).astype(np.float32)

    def normal(n):
      return jnp.asarray(rng.standard_normal((n, s.width), np.float32), s.dtype)

    return cls(
      x=jnp.asarray(x, s.dtype)[None],
      dy=normal(N)[None],
      load=np.bincount(choices.reshape(-1), minlength=E),
      rows=normal(K * N),
      d_rows=normal(K * N),
    )


def arguments(name: str, layer: Layer, inputs: Inputs) -> tuple[Any, ...]:
  """The arrays that a case's program is called on."""
  experts = layer.params['experts']
  if name in LAYERS:
    return layer.params, inputs.x, inputs.dy
  if name in (DENSE, PLAIN_DENSE):
    first = {name: kernels[0] for name, kernels in experts.items()}
    return first, inputs.x[0], inputs.dy[0]
  load = inputs.load
  if name in BATCHED or name.endswith(EQUAL):
    load = np.full(len(load), load.sum() // len(load))
  return experts, inputs.rows, inputs.d_rows, jnp.asarray(load, jnp.int32)


Compiled = dict[str, tuple[Callable[..., Any], Mapping[str, float]]]


def compile_cases(
  layer: Layer, K: int, backward: bool, names: Sequence[str]
) -> Compiled:
  """Compiles programs for one E, K and pass; all routings share them.

  Args:
    layer: Parameters of the layer.
    K: Number of selected experts.
    backward: Whether the gradient is computed too.
    names: Names of the programs, from `LAYERS` and `OTHERS`.

  Raises:
    ValueError: E does not divide the assignments, as equal groups need.
  """
  s, E = layer.sizes, len(layer.centres)
  if K * s.num_tokens % E:
    raise InputError(f'num_experts={E} does not divide {K} * {s.num_tokens}')
  functions = {
    name: layer_function(moe_layer(s, E, K, name), backward) for name in LAYERS
  }
  for name, function in other_functions(s).items():
    functions[name] = with_gradient(function, backward)
  inputs = Inputs.draw(layer, 'uniform', K)
  compiled = {}
  for name in names:
    arrays = arguments(name, layer, inputs)
    compiled[name] = timing.compiled(jax.jit(functions[name]), *arrays)
  equal = {name + EQUAL: compiled[name] for name in GROUPED if name in names}
  return compiled | equal


def bind(
  layer: Layer, compiled: Compiled, inputs: Inputs, K: int, backward: bool
) -> dict[str, timing.Program]:
  """Compiled functions, of `compile_cases`, as programs on their arrays.

  Raises:
    ValueError: The layer's router does not choose as the draw did.
  """

  def program(name):
    function, numbers = compiled[name]
    arrays = arguments(name, layer, inputs)
    served = served_share(name, inputs.load)
    is_dense = name in (DENSE, PLAIN_DENSE)
    counts = (1, 1) if is_dense else (len(layer.centres), K * served)
    passes = dict(backward=backward, router=name in LAYERS)
    return timing.Program(
      lambda: jax.block_until_ready(function(*arrays)),
      layer.sizes.work(*counts, **passes),
      {'served': served, **numbers},
    )

  programs = {name: program(name) for name in compiled}
  for name in LAYERS:
    load = np.asarray(programs[name].run()[1].stats.load)
    if not np.array_equal(load, inputs.load):
      raise InputError(
        f'the router gave experts {load.tolist()} assignments, not the '
        f'{inputs.load.tolist()} that were drawn'
      )
  return programs


def served_share(name: str, load: np.ndarray) -> float:
  """Share of all choices that a case's program serves.

  Layers of `DROPPING` have capacity factor 1 and drop what exceeds it; the
  others serve every choice.

  Args:
    name: Name of the case.
    load: Number of choices that each expert has, int [E].
  """
  if name not in DROPPING:
    return 1.0
  capacity = -(-load.sum() // len(load))
  return float(np.minimum(load, capacity).sum() / load.sum())
