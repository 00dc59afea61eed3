"""How fast is a sparse layer on this accelerator, at the sizes of known models?

    python -m experiments.bench_accelerator

Times `moe_jax.MoE`, dropless in bfloat16, forward and backward, with the
backends of `moe_jax.kernels`: our own for the platform, XLA's `ragged_dot`, and
tokamax where it is installed. The tables have the time of each, as a ratio to a
dense layer of equal FLOPs, its TFLOP/s and its share of the device's peak. A
case that fails has its reason in the table. It is made for ten minutes on one
GPU of 80 GB: nothing is compiled after eight. It imports layers and kernels
alone, which need jax, flax, optax, jaxtyping and ml_collections.
`--tiny` is for a trial on a CPU, where kernels of accelerators are interpreted.
Writes `table.md` and `results.json` to `results/bench_accelerator/<device>`.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import moe_layer, timing
from experiments.benchmarks.moe_layer import DENSE
from moe_jax import cli
from moe_jax.analysis import roofline
from moe_jax.errors import InputError
from moe_jax.kernels import BACKENDS
from moe_jax.routing import GivenChoices
from moe_jax.routing.given_choice_rule import OPEN
from moe_jax.shapes import Array

NAME = 'bench_accelerator'
DTYPE = 'bfloat16'
# Our backend of each platform; others have `blocks`.
OURS = {'gpu': 'pallas_gpu', 'tpu': 'megablox'}
# The largest relative difference between results of two backends: one has an
# error if they differ by more, as bfloat16 rounds by 0.4 % at most.
TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Model:
  """The sizes of a model's sparse layers.

  Attributes:
    width: Model width M.
    hidden: Hidden width F of an expert.
    experts: Number E of experts that the timed layer has.
    selected: Number K of selected experts.
    split: Number of devices between which the model's experts are split; the
      timed layer has the experts of one device, and as many choices as come to
      one device on average.
  """

  width: int
  hidden: int
  experts: int
  selected: int
  split: int = 1

  def tiny(self) -> 'Model':
    """Sizes for a CPU: E of 4 or 8, and K of 2."""
    experts = max(self.experts // 16, 4)
    return Model(self.width // 128, self.hidden // 128, experts, 2, self.split)


MODELS = {
  'Qwen3-30B-A3B': Model(2048, 768, 128, 8),
  'Mixtral-8x7B': Model(4096, 14_336, 8, 2),
  # 22 GB of kernels in all, and as much again for their gradients.
  'DeepSeek-V3': Model(7168, 2048, 32, 8, split=8),
  'gpt-oss-20b': Model(2880, 2880, 32, 4),
}


def draw_inputs(
  model: Model, centres: np.ndarray, num_tokens: int
) -> dict[str, tuple[Any, ...]]:
  """Draws tokens and choices for each routing.

  The router computes the choices under Zipf's routing, where expert e is chosen
  in proportion to 1 / (e + 1), and under even routing, where experts have equal
  loads. Replayed choices are those of Zipf's routing, imposed on the tokens of
  even routing.

  Args:
    model: Sizes of the layer.
    centres: Orthonormal vectors, the columns of the router's kernel, [E, M].
    num_tokens: Number N of tokens.

  Returns:
    For each routing the tokens [1, N, M], the gradient of the layer's output,
    the `GivenChoices` [1, N, K] and the number of choices of each expert, [E].
  """
  N, E, K = num_tokens, model.experts, model.selected
  zipf = moe_layer.draw_choices(np.random.default_rng(0), 'zipf', N, E, K)
  even = np.arange(N * K).reshape(N, K) % E
  keys = jax.random.split(jax.random.key(0), 3)

  @jax.jit
  def tokens(key, choices):
    # A token is the weighted sum of its experts' centres and a little noise.
    weights = jnp.zeros((N, E)).at[jnp.arange(N)[:, None], choices]
    x = weights.set(4 - jnp.arange(K) / K) @ jnp.asarray(centres, jnp.float32)
    return (x + jax.random.normal(key, x.shape) / 20).astype(DTYPE)[None]

  dy = jax.random.normal(keys[0], (1, N, model.width), DTYPE)
  x_zipf, x_even = tokens(keys[1], zipf), tokens(keys[2], even)
  open_choices = np.full((N, K), OPEN)

  def inputs(x, choices, given):
    given = GivenChoices(jnp.asarray(given, jnp.int32)[None])
    return x, dy, given, np.bincount(choices.reshape(-1), minlength=E)

  return {
    'Zipf': inputs(x_zipf, zipf, open_choices),
    'replayed': inputs(x_even, zipf, zipf),
    'even': inputs(x_even, even, open_choices),
  }


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw_kernels(
  sizes: moe_layer.Sizes, experts: tuple[int, ...]
) -> dict[str, Array]:
  """Draws the kernels [E, M, F] and [E, F, M]; without E if `experts` is ()."""
  shapes = dict.fromkeys(sizes.kernel_names, (sizes.width, sizes.hidden))
  shapes['w_out'] = sizes.hidden, sizes.width
  kernels = {}
  for i, (name, shape) in enumerate(shapes.items()):
    normal = jax.random.normal(jax.random.key(i), experts + shape, DTYPE)
    kernels[name] = normal * shape[0] ** -0.5
  return kernels


@jax.jit
def difference(a: Any, b: Any) -> Array:
  """The largest |a - b| / |b| of the arrays in two trees, norms of arrays."""

  def of_arrays(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

  return jnp.stack(jax.tree.leaves(jax.tree.map(of_arrays, a, b))).max()


def check(result: Any, load: np.ndarray, others: dict[str, Any]) -> None:
  """Raises ValueError unless the result of a sparse layer is right.

  Args:
    result: The output, the `MoeAux` and the gradients of the layer.
    load: Number of choices of each expert that was drawn, [E].
    others: Results of the backend that ran first, by its name; or none.
  """
  y, aux, gradients = result
  if not np.array_equal(aux.stats.load, load):
    raise InputError('the router did not choose the experts that were drawn')
  for name, (other, _, others_gradients) in others.items():
    off = float(difference((y, gradients), (other, others_gradients)))
    if not off < TOLERANCE:
      raise InputError(f'results differ from those of {name} by {off:.1%}')


def attempt(
  errors: dict[Any, str], case: Any, function: Callable[..., Any], *args: Any
) -> Any:
  """function(*args), or None if it raises: then its error stands in `errors`.

  An error of one case leaves other cases as they are; Ctrl-C does not.
  """
  try:
    return function(*args)
  except Exception as error:
    texts = [f'{type(error).__name__}: {error}'.strip()]
    if isinstance(error, ExceptionGroup):
      texts += map(str, error.exceptions)
    errors[case] = '; '.join(texts)[:2000]
    print(f'{case} failed: {errors[case]}', flush=True)
    return None


def measure(
  name: str, model: Model, options: argparse.Namespace, peak: float, stop: float
) -> list[dict[str, Any]]:
  """Times the dense layer, and each backend under each routing.

  Args:
    name: Name of the model.
    model: Sizes of the model's layer.
    options: The command line.
    peak: FLOPs per second that products of the device can reach.
    stop: Time of `time.perf_counter` after which nothing more is compiled.

  Returns:
    A row for each case: either its times or its `error`.
  """
  N, M, E, K = options.tokens, model.width, model.experts, model.selected
  sizes = moe_layer.Sizes(N, M, model.hidden, 'swiglu', DTYPE)
  wide = dataclasses.replace(sizes, hidden=K * model.hidden)
  centres = np.linalg.qr(np.random.default_rng(2).normal(size=(M, E)))[0].T
  inputs = draw_inputs(model, centres, N)
  router = {'w': jnp.asarray(centres.T, jnp.float32)}
  params = {'router': router, 'experts': draw_kernels(sizes, (E,))}
  x, dy, _, _ = inputs['even']
  arrays = {'': (draw_kernels(wide, ()), x[0], dy[0])}
  arrays |= {routing: (params, *drawn[:3]) for routing, drawn in inputs.items()}
  dense = moe_layer.other_functions(wide)[DENSE]
  layers: dict[str, Callable] = {DENSE: moe_layer.with_gradient(dense, True)}
  for backend in options.backends:
    module = moe_layer.moe_layer(sizes, E, K, 'dropless', backend=backend)
    layers[backend] = moe_layer.layer_function(module, True)
  errors, compiled, runs = {}, {}, {}

  def compile_layer(case, routing):
    if time.perf_counter() > stop:
      raise InputError(f'not begun, as {options.minutes:g} minutes are over')
    return timing.compiled(jax.jit(layers[case]), *arrays[routing])

  def start(case, routing, others):
    program, of_routing = compiled[case][0], arrays[routing]

    def run():
      return jax.block_until_ready(program(*of_routing))

    result = run()
    if routing:
      check(result, inputs[routing][3], others)
      others.update({} if others else {case: result})
    runs[case, routing] = run

  for routing in arrays:
    others = {}
    for case in options.backends if routing else [DENSE]:
      if case not in compiled:
        compiled[case] = attempt(errors, case, compile_layer, case, routing)
      if compiled[case]:
        attempt(errors, (case, routing), start, case, routing, others)
  del others  # gradients of all kernels
  rounds = dict(seconds=options.seconds, least=3)
  interleave = functools.partial(timing.interleave, runs, **rounds)
  times = runs and attempt(errors, 'rounds', interleave)
  flops = sizes.work(E, K, backward=True, router=False).flops
  rows = []
  for routing in arrays:
    for case in options.backends if routing else [DENSE]:
      cell = case, routing
      row: dict[str, Any] = dict(model=name, tokens=N, M=M, F=model.hidden)
      row |= dict(E=E, K=K, split=model.split, flops=flops)
      row |= dict(case=case, routing=routing)
      if routing:
        load = inputs[routing][3]
        row['load'] = float(load.max() / load.mean())
      if times and cell in times:
        row |= {**compiled[case][1], **speed(times, cell, flops, peak)}
      else:
        reasons = (errors.get(key) for key in (cell, case, 'rounds'))
        row['error'] = next(filter(None, reasons))
      rows.append(row)
  return rows


def speed(
  times: Mapping[Any, Sequence[float]], cell: Any, flops: int, peak: float
) -> dict[str, Any]:
  """Milliseconds, TFLOP/s, share of the peak, and ratio to the dense layer.

  The ratio is left out where the dense layer failed.

  Args:
    times: Seconds of each cell in each round.
    cell: The cell, one of `times`.
    flops: FLOPs of its products, two for a multiply-add.
    peak: FLOPs per second that products of the device can reach.
  """
  ms = timing.milliseconds(times[cell])
  rate = 1e3 * flops / ms.median
  row = dict(ms=ms, tflops=rate / 1e12, share=rate / peak)
  if (dense := times.get((DENSE, ''))) is not None:
    row['per_dense'] = timing.ratio(times[cell], dense)
  return row


def _experts(row):
  E, split = row['E'], row['split']
  return f'{E} of {split * E}' if split > 1 else f'{E}'


def _reason(row):
  """The beginning of the first line of the error, as a cell of a table."""
  first = row['error'].splitlines()[0].replace('|', '/')
  return first if len(first) <= 120 else first[:117] + '...'


COLUMNS: Mapping[str, timing.Cell] = {
  'model': '{model}',
  'M': '{M}',
  'F': '{F}',
  'E': _experts,
  'K': '{K}',
  'routing': '{routing}',
  'largest load / mean': '{load:.1f}',
  'products': '{case}',
  'ms': '{ms.median:.2f}',
  '/ dense': '{per_dense:.2f}',
  'TFLOP/s': '{tflops:.3g}',
  'of the peak': '{share:.1%}',
  'temporary GiB': lambda row: f'{row["temp_bytes"] / 2**30:.1f}',
  'failure': _reason,
}


def report(
  rows: Sequence[timing.Row], num_tokens: int, peak: roofline.Peak
) -> str:
  """The table and the meaning of its columns, in Markdown."""
  return (
    '# One sparse layer on an accelerator\n\n'
    f'{timing.conditions()} The peak is {peak.flops_per_second / 1e12:.3g} '
    f'TFLOP/s, {peak.source}. {num_tokens:,} tokens, {DTYPE}, swiglu, forward '
    'and backward of parameters and tokens, router, losses and statistics '
    'included. Shared experts and biases are left out. Dense is a feed-forward '
    'of width K x F, which has the FLOPs of the K experts. TFLOP/s are those '
    'FLOPs, without the router, over the time. Where E is a part of all '
    'experts, the layer is that of one device of several, which gets as many '
    'choices as its own tokens make; exchanges between devices are left out. '
    'Replayed choices are those of Zipf, imposed on other tokens. The results '
    f'of all backends of a routing agree within {TOLERANCE:.0%}.\n\n'
    f'{timing.table(rows, COLUMNS)}'
  )


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures every model and writes the table."""
  parser = timing.parser(NAME, __doc__, peaks=False)
  add, ours = parser.add_argument, OURS.get(jax.default_backend(), 'blocks')
  backends = list(dict.fromkeys([ours, 'ragged_dot', 'tokamax']))
  text = 'small sizes, for a trial on a CPU'
  add('--tiny', action='store_true', help=text)
  text = 'models whose layers are timed'
  add('--models', nargs='+', choices=MODELS, default=[*MODELS], help=text)
  text = 'backends that are timed'
  add('--backends', nargs='+', choices=BACKENDS, default=backends, help=text)
  add('--tokens', type=cli.POSITIVE, help='tokens; default 16,384, or 48')
  text = 'about how long the rounds of a model take'
  add('--seconds', type=cli.SECONDS, default=10.0, help=text)
  text = 'time after which nothing more is compiled'
  add('--minutes', type=cli.SECONDS, default=8.0, help=text)
  options = parser.parse_args(argv)
  stop = time.perf_counter() + 60 * options.minutes
  options.tokens = options.tokens or (48 if options.tiny else 16_384)
  if jax.default_backend() == 'cpu' and not options.tiny:
    raise SystemExit(f"{NAME} needs an accelerator; --tiny is for a 'cpu'")
  peak = roofline.peak(DTYPE, jax.devices()[:1], quick=options.tiny)
  rows = []
  for name in options.models:
    model = MODELS[name].tiny() if options.tiny else MODELS[name]
    new = measure(name, model, options, peak.flops_per_second, stop)
    print(timing.table(new, COLUMNS), flush=True)
    rows += new
  metadata = {'peak': peak._asdict()}
  text = report(rows, options.tokens, peak)
  timing.write(options.output, NAME, text, rows, metadata)


if __name__ == '__main__':
  main()
