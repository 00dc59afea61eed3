"""The arrays that `bench_moe_layer`'s programs run on, and both together.

Routing is real: tokens are made so that the layer's own router sends them
where a draw says. Not here: the programs, or the timing.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import moe_layer_programs as programs
from experiments.benchmarks.timing import Compilation, Program, compile_ahead
from moe_jax.options import unknown
from moe_jax.shapes import Array

ROUTINGS = ('uniform', 'zipf')


def draw_choices(
  rng: np.random.Generator, routing: str, N: int, E: int, K: int
) -> np.ndarray:
  """int [N, K], K different experts a token: p_e uniform, or ~ 1 / (e + 1).

  Raises:
    ValueError: The routing is unknown.
  """
  if routing not in ROUTINGS:
    raise unknown('routing', routing, ROUTINGS)
  p = np.ones(E) if routing == 'uniform' else 1 / np.arange(1.0, E + 1)
  # The K largest of log p + Gumbel noise: drawn without putting back.
  noisy = np.log(p)[None] + rng.gumbel(size=(N, E))
  return np.argsort(-noisy, axis=1)[:, :K]


def make_tokens(
  rng: np.random.Generator, choices: np.ndarray, centres: np.ndarray
) -> np.ndarray:
  """float32 [N, M]: a router with kernel `centres.T` picks `choices`.

  A token is the sum of its experts' centres, the first choice weighing most,
  and a little noise.
  """
  N, K = choices.shape
  weights = 4.0 - np.arange(K) / K
  x = np.einsum('K,NKM->NM', weights, centres[choices])
  noise = rng.normal(0, 0.05, (N, centres.shape[1]))
  return (x + noise).astype(np.float32)


def make_centres(rng: np.random.Generator, E: int, M: int) -> np.ndarray:
  """float [E, M], orthonormal.

  Raises:
    ValueError: There are more experts than directions.
  """
  if E > M:
    raise ValueError(f'num_experts={E} > width={M}: no orthogonal centres')
  return np.linalg.qr(rng.normal(size=(M, E)))[0].T


@dataclasses.dataclass(frozen=True)
class Layer:
  """The kernels that all cases of one E share.

  Attributes:
    sizes: N, M, F.
    num_experts: E.
    params: Of `MoE`: the router's and the experts' kernels.
    dense: Of `FeedForward`.
    centres: [E, M], the router's kernel, transposed.
  """

  sizes: programs.Sizes
  num_experts: int
  params: Any
  dense: Any
  centres: np.ndarray

  @classmethod
  def draw(cls, sizes: programs.Sizes, E: int) -> 'Layer':
    """Random kernels; the experts' standard deviation is 1 / sqrt(M)."""
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
  """Arrays of one routing.

  Attributes:
    x, dy: [1, N, M], tokens and the output's gradient.
    load: int [E], assignments of each expert.
    rows, d_rows: [K N, M], as many rows as there are assignments.
  """

  x: Array
  dy: Array
  load: np.ndarray
  rows: Array
  d_rows: Array

  @classmethod
  def draw(cls, layer: Layer, routing: str, K: int) -> 'Inputs':
    """Tokens that the layer's router sends where the routing's draw says."""
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
  """Every program of one E, K and pass; the routings share them.

  Raises:
    ValueError: E does not divide the assignments, as equal groups need.
  """
  s, E = layer.sizes, layer.num_experts
  if K * s.num_tokens % E:
    raise ValueError(f'num_experts={E} does not divide {K} * {s.num_tokens}')
  x = Inputs.draw(layer, 'uniform', K)
  found = {
    name: compile_ahead(
      programs.layer_function(programs.moe_layer(s, E, K, name), backward),
      layer.params,
      x.x,
      x.dy,
    )
    for name in programs.LAYERS
  }
  for name, function in programs.dense_functions(s).items():
    found[name] = compile_ahead(
      programs.with_gradient(function, backward), layer.dense, x.x[0], x.dy[0]
    )
  group_sizes = jnp.zeros(E, jnp.int32)
  for name, function in programs.bare_functions(s).items():
    if name != programs.RAGGED or ragged:
      found[name] = compile_ahead(
        programs.with_gradient(function, backward),
        layer.params['experts'],
        x.rows,
        x.d_rows,
        group_sizes,
      )
  return found


def bind(
  layer: Layer, compilations: dict[str, Compilation], inputs: Inputs
) -> Iterator[tuple[str, Program]]:
  """(case, program) on one routing's arrays.

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


def _check_load(found: Array, drawn: np.ndarray) -> None:
  found = np.asarray(found)
  if not np.array_equal(found, drawn):
    raise ValueError(
      f'the router gave experts {found.tolist()} assignments, not the '
      f'{drawn.tolist()} that were drawn'
    )
