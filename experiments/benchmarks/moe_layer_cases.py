"""The arrays of `bench_moe_layer`, and its programs bound to them.

Routing is real: expert choices are drawn first, and then tokens are made that
the layer's own router sends to these experts.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import moe_layer_programs as programs
from experiments.benchmarks.timing import Compilation, Program, compile_ahead
from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.shapes import Array

ROUTINGS = ('uniform', 'zipf')


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


def make_tokens(
  rng: np.random.Generator, choices: np.ndarray, centres: np.ndarray
) -> np.ndarray:
  """Tokens, float32 [N, M], that a router of kernel `centres.T` sends as drawn.

  A token is the weighted sum of its chosen experts' centres plus a little
  noise; the first choice has the largest weight.
  """
  N, K = choices.shape
  weights = 4.0 - np.arange(K) / K
  x = np.einsum('K,NKM->NM', weights, centres[choices])
  noise = rng.normal(0, 0.05, (N, centres.shape[1]))
  return (x + noise).astype(np.float32)


def make_centres(rng: np.random.Generator, E: int, M: int) -> np.ndarray:
  """Orthonormal vectors, one for each expert, float [E, M].

  Raises:
    ValueError: There are more experts than dimensions.
  """
  if E > M:
    raise InputError(f'num_experts={E} > width={M}: no orthogonal centres')
  return np.linalg.qr(rng.normal(size=(M, E)))[0].T


@dataclasses.dataclass(frozen=True)
class Layer:
  """The parameters that all cases with the same E share.

  Attributes:
    sizes: Sizes of the layer (N, M, F) and its dtype.
    num_experts: Number of experts E.
    params: Parameters of `MoE`: the router's and the experts' kernels.
    dense: Parameters of the dense `FeedForward`, those of the first expert.
    centres: Transpose of the router's kernel, [E, M].
  """

  sizes: programs.Sizes
  num_experts: int
  params: Any
  dense: Any
  centres: np.ndarray

  @classmethod
  def draw(cls, sizes: programs.Sizes, E: int) -> 'Layer':
    """Draws kernels; those of experts have a standard deviation of M^-0.5."""
    rng = np.random.default_rng(0)
    M, F = sizes.width, sizes.hidden
    shapes = {name: (E, M, F) for name in sizes.kernel_names}
    shapes['w_out'] = (E, F, M)
    experts = {
      name: jnp.asarray(
        rng.standard_normal(shape, np.float32) / np.sqrt(M), sizes.dtype
      )
      for name, shape in shapes.items()
    }
    centres = make_centres(rng, E, M)
    router = {'w': jnp.asarray(centres.T, jnp.float32)}
    return cls(
      sizes,
      E,
      params={'router': router, 'experts': experts},
      dense={name: kernel[0] for name, kernel in experts.items()},
      centres=centres,
    )


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
    """Draws choices and makes tokens that the layer's router sends so."""
    s, E = layer.sizes, layer.num_experts
    rng = np.random.default_rng(1)
    choices = draw_choices(rng, routing, s.num_tokens, E, K)
    x = make_tokens(rng, choices, layer.centres)

    def normal(n):
      return jnp.asarray(rng.standard_normal((n, s.width), np.float32), s.dtype)

    return cls(
      x=jnp.asarray(x, s.dtype)[None],
      dy=normal(s.num_tokens)[None],
      load=np.bincount(choices.reshape(-1), minlength=E),
      rows=normal(K * s.num_tokens),
      d_rows=normal(K * s.num_tokens),
    )


def compile_cases(
  layer: Layer, K: int, backward: bool, ragged: bool
) -> dict[str, Compilation]:
  """Compiles every program for one E, K and pass; all routings share them.

  Args:
    layer: Parameters of the layer.
    K: Number of selected experts.
    backward: Whether the gradient is computed too.
    ragged: Whether `lax.ragged_dot` is compiled too.

  Raises:
    ValueError: E does not divide the assignments, as equal groups need.
  """
  s, E = layer.sizes, layer.num_experts
  if K * s.num_tokens % E:
    raise InputError(f'num_experts={E} does not divide {K} * {s.num_tokens}')
  x = Inputs.draw(layer, 'uniform', K)
  compiled_cases = {
    name: compile_ahead(
      programs.layer_function(programs.moe_layer(s, E, K, name), backward),
      layer.params,
      x.x,
      x.dy,
    )
    for name in programs.LAYERS
  }
  for name, function in programs.dense_functions(s).items():
    compiled_cases[name] = compile_ahead(
      programs.with_gradient(function, backward), layer.dense, x.x[0], x.dy[0]
    )
  group_sizes = jnp.zeros(E, jnp.int32)
  for name, function in programs.bare_functions(s).items():
    if name != programs.RAGGED or ragged:
      compiled_cases[name] = compile_ahead(
        programs.with_gradient(function, backward),
        layer.params['experts'],
        x.rows,
        x.d_rows,
        group_sizes,
      )
  return compiled_cases


def bind(
  layer: Layer, compilations: dict[str, Compilation], inputs: Inputs
) -> Iterator[tuple[str, Program]]:
  """Binds the programs to one routing's arrays; yields (case, program).

  Raises:
    ValueError: The layer's router does not choose as the draw did.
  """
  E = layer.num_experts
  load = jnp.asarray(inputs.load, jnp.int32)
  equal = jnp.full(E, inputs.load.sum() // E, jnp.int32)
  for name, compilation in compilations.items():
    if name in programs.LAYERS:
      program = compilation.on(layer.params, inputs.x, inputs.dy)
      _check_load(program.run()[1].stats.load, inputs.load)
      yield name, program
    elif name in (programs.DENSE, programs.PLAIN_DENSE):
      yield name, compilation.on(layer.dense, inputs.x[0], inputs.dy[0])
    else:
      arrays = layer.params['experts'], inputs.rows, inputs.d_rows
      if name in programs.GROUPED:
        yield name + programs.EQUAL, compilation.on(*arrays, equal)
      sizes = equal if name in programs.BATCHED else load
      yield name, compilation.on(*arrays, sizes)


def _check_load(load: Array, drawn: np.ndarray) -> None:
  load = np.asarray(load)
  if not np.array_equal(load, drawn):
    raise InputError(
      f'the router gave experts {load.tolist()} assignments, not the '
      f'{drawn.tolist()} that were drawn'
    )
