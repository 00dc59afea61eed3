"""Does causal attention keep up with PyTorch's, forward and backward?

    python -m experiments.bench_attention --peer

Times every implementation that this machine has, interleaved, at the shapes of
the library's small configs and at longer rows, of one document each and of
three: a call, and the gradient of queries, keys and values. Each time is a
ratio to that of `einsum`, and, with `--peer`, to that of PyTorch's fused
attention, which runs in a process of its own. The limit is the time of the
seven products of all T x T scores at the machine's measured peak; causal blocks
compute about half of them. Writes `table.md`, `rows.csv` and `results.json` to
`results/bench_attention/<device>`.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing, torch_attention
from experiments.benchmarks.roofline import Peaks, measure_peaks
from experiments.benchmarks.torch_attention import Case
from experiments.benchmarks.turns import PAUSE, Runs, check_installed, turns
from experiments.study.tables import markdown_table
from moe_jax import cli
from moe_jax.devices import keep_freed_memory
from moe_jax.layers.attention.dot_product import attend

NAME = 'bench_attention'
PEER = 'PyTorch'
# B, T, H and D of `tiny_switch`, of `shakespeare_switch` and of the encoder in
# `bench_train_step --peer`, and of two longer rows.
SHAPES = (
  (16, 128, 4, 32),
  (12, 64, 4, 32),
  (8, 256, 4, 64),
  (4, 512, 8, 64),
  (2, 1024, 8, 64),
)
IMPLEMENTATIONS = {
  'cpu': ('einsum', 'blocks', 'xla'),
  'gpu': ('einsum', 'blocks', 'xla'),
  'tpu': ('einsum', 'blocks', 'xla', 'splash'),
}
_PRODUCTS = 7  # two forward, five backward; scores are computed twice


def program(implementation: str, case: Case) -> Callable[[], Any]:
  """The compiled call and its gradient, on random arrays."""
  shape, packed = case
  rng = np.random.default_rng(0)
  query, key, value, toward = (
    jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4)
  )
  ids = None
  if packed:
    B, T = shape[:2]
    ids = jnp.broadcast_to(jnp.arange(T) // -(-T // 3) + 1, (B, T))

  def forward_backward(query, key, value, ids, toward):
    f = functools.partial(attend, implementation=implementation)
    y, pull = jax.vjp(lambda *x: f(*x, ids), query, key, value)
    return y, pull(toward)

  arguments = query, key, value, ids, toward
  return timing.compile_ahead(forward_backward, *arguments).on(*arguments).run


def measure(
  case: Case, peer: Runs, seconds: float, peaks: Peaks
) -> list[dict[str, Any]]:
  """Times all implementations of one case; one row for each."""
  names = IMPLEMENTATIONS[jax.default_backend()]
  runs = {name: program(name, case) for name in names}
  if peer:
    runs |= {PEER: peer[case], PAUSE: peer[PAUSE]}
  times, rounds = timing.with_probes(runs, peaks, seconds=seconds)
  times.pop(PAUSE, None)
  (B, T, H, D), packed = case
  flops = _PRODUCTS * 2 * B * H * T * T * D
  limits = [flops / peaks.flops_per_second for peaks in rounds]
  rows = []
  for name, durations in times.items():
    row = {
      'shape': f'B={B} T={T} H={H} D={D}',
      'documents': 3 if packed else 1,
      'implementation': name,
      'rounds': len(durations),
      'ms': 1e3 * timing.Spread.of(durations).median,
      'limit_ms': 1e3 * timing.Spread.of(limits).median,
    }
    for other in ('einsum', PEER):
      if other in times:
        ratio = timing.ratio(durations, times[other])
        row |= {
          f'per_{other.lower()}': ratio.median,
          f'per_{other.lower()}_low': ratio.low,
          f'per_{other.lower()}_high': ratio.high,
        }
    rows.append(row)
  return rows


def report(rows: Sequence[dict[str, Any]], peaks: Peaks) -> str:
  """The table and the meaning of its columns, in Markdown."""
  facts = timing.facts()

  def spread(row, name):
    keys = (f'{name}_low', name, f'{name}_high')
    return (
      f'{timing.Spread(*(row[k] for k in keys)):.2f}' if name in row else ''
    )

  lines = [
    {
      'shape': row['shape'],
      'documents in a row': str(row['documents']),
      'implementation': row['implementation'],
      'ms': f'{row["ms"]:.2f}',
      'over einsum': spread(row, 'per_einsum'),
      f'over {PEER}': spread(row, f'per_{PEER.lower()}'),
      'limit, ms': f'{row["limit_ms"]:.2f}',
    }
    for row in rows
  ]
  return (
    '# Causal attention, forward and backward, float32\n\n'
    f'{facts["device"]} ({facts["cores"]} cores), {facts["date"]}, jax '
    f'{facts["jax"]}; {peaks.describe()}. Cases ran interleaved: medians, and '
    'medians of ratios within a round (quartiles in brackets). Limit: seven '
    'products of all scores at the peak of the same rounds.\n\n'
    f'{markdown_table(lines)}'
  )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(
    prog=f'python -m experiments.{NAME}', description=__doc__.split('\n')[0]
  )
  add = parser.add_argument
  add('--peer', action='store_true', help="time PyTorch's attention, too")
  add('--seconds', type=cli.SECONDS, default=4.0, help='time for each shape')
  timing.add_arguments(parser)
  return parser.parse_args(argv)


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures all shapes; writes the table."""
  options = parse(argv)
  keep_freed_memory()
  cases = [(shape, packed) for shape in SHAPES for packed in (False, True)]
  peaks = measure_peaks('float32', quick=options.rough_peaks)
  print(f'{timing.device_name()}; {peaks.describe()}', flush=True)
  rows = []
  with contextlib.ExitStack() as stack:
    peer: Runs = {}
    if options.peer:
      check_installed('torch')
      programs = functools.partial(torch_attention.programs, cases)
      peer = stack.enter_context(turns(programs))
    for case in cases:
      rows += measure(case, peer, options.seconds, peaks)
  text = report(rows, peaks)
  metadata = {'peaks': dataclasses.asdict(peaks)}
  folder = timing.write(options.output, NAME, text, rows, metadata)
  print(f'\n{text}\nwritten: {folder}')


if __name__ == '__main__':
  main()
