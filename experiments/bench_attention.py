"""Does causal attention keep up with PyTorch's, forward and backward?

    python -m experiments.bench_attention --peer

Times every implementation that this machine has, interleaved, at the shapes of
the library's small configs and at longer rows, of one document each and of
three: a call, and the gradient of queries, keys and values. Each time is a
ratio to that of `einsum`, and, with `--peer`, to that of PyTorch's fused
attention, which runs in a process of its own. The limit is the time of the
seven products of all T x T scores at the machine's measured peak; causal blocks
compute about half of them. Writes `table.md` and `results.json` to
`results/bench_attention/<device>`.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from experiments.benchmarks.roofline import Peaks, Work
from experiments.benchmarks.turns import PAUSE, Runs, turns
from moe_jax import cli
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
# B, T, H and D of a case, and whether rows hold several documents.
Case = tuple[tuple[int, int, int, int], bool]
# Implementations on every platform, and those that one has besides.
IMPLEMENTATIONS = ('einsum', 'blocks', 'xla')
MORE_IMPLEMENTATIONS = {'tpu': ('splash',)}
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

  @jax.jit
  def forward_backward(query, key, value, ids, toward):
    f = functools.partial(attend, implementation=implementation)
    y, pull = jax.vjp(lambda *x: f(*x, ids), query, key, value)
    return y, pull(toward)

  arguments = query, key, value, ids, toward
  compiled, _ = timing.compiled(forward_backward, *arguments)
  return lambda: jax.block_until_ready(compiled(*arguments))


def programs(cases: Mapping[str, Case]) -> dict[str, Callable[[], None]]:
  """Functions that call PyTorch's fused attention and take its gradient."""
  return {name: _peer_program(*case) for name, case in cases.items()}


def _peer_program(shape, packed):
  import torch

  B, T, H, D = shape
  torch.manual_seed(0)
  query, key, value, toward = (torch.randn(B, T, H, D) for _ in range(4))
  inputs = [x.requires_grad_() for x in (query, key, value)]
  mask = None
  if packed:
    ids = torch.arange(T).expand(B, T) // (-(-T // 3))
    mask = ids[:, None, :, None] == ids[:, None, None, :]
    mask = mask & torch.ones(T, T, dtype=torch.bool).tril()
  fused = torch.nn.functional.scaled_dot_product_attention
  attention = functools.partial(fused, attn_mask=mask, is_causal=mask is None)

  def run():
    y = attention(*(x.transpose(1, 2) for x in inputs))
    torch.autograd.grad(y.transpose(1, 2), inputs, toward)

  return run


def measure(
  case: Case, peer: Runs, seconds: float, peaks: Peaks
) -> list[dict[str, Any]]:
  """Times all implementations of one case, and a peer's; one row for each."""
  names = (
    *IMPLEMENTATIONS,
    *MORE_IMPLEMENTATIONS.get(jax.default_backend(), ()),
  )
  runs = {name: program(name, case) for name in names} | dict(peer)
  (B, T, H, D), packed = case
  work = Work(_PRODUCTS * 2 * B * H * T * T * D, min_bytes=0)
  programs = {name: timing.Program(run, work) for name, run in runs.items()}
  pause = PAUSE if peer else {}
  times, rows = timing.measure(programs, peaks, pause, seconds=seconds)
  return [
    {
      'shape': f'B={B} T={T} H={H} D={D}',
      'documents': 3 if packed else 1,
      **row,
      **{
        f'per_{base.lower()}': timing.ratio(times[name], times[base])
        for base in ('einsum', PEER)
        if base in times
      },
    }
    for name, row in rows.items()
  ]


COLUMNS = {
  'shape': '{shape}',
  'documents in a row': '{documents}',
  'implementation': '{case}',
  'ms': '{ms.median:.2f}',
  'over einsum': '{per_einsum:.2f}',
  f'over {PEER}': '{per_pytorch:.2f}',
  'limit, ms': '{roofline_ms:.2f}',
}


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures all shapes; writes the table."""
  parser = timing.parser(NAME, __doc__)
  add = parser.add_argument
  add('--peer', action='store_true', help="time PyTorch's attention, too")
  add('--seconds', type=cli.SECONDS, default=4.0, help='time for each shape')
  options = parser.parse_args(argv)
  cases = {str(x): x for x in itertools.product(SHAPES, (False, True))}
  peaks, rows = timing.measured_peaks(options), []
  with contextlib.ExitStack() as stack:
    peers: Runs = {}
    if options.peer:
      arguments = {'cases': cases}
      peers = stack.enter_context(turns(__file__, arguments, ('torch',)))
    for name, case in cases.items():
      peer = {PEER: peers[name]} if peers else {}
      rows += measure(case, peer, options.seconds, peaks)
  text = (
    '# Causal attention, forward and backward, float32\n\n'
    f'{timing.conditions(peaks)} Limit: seven products of all scores at the '
    f'peak of the same rounds.\n\n{timing.table(rows, COLUMNS)}'
  )
  metadata = {'peaks': dataclasses.asdict(peaks)}
  timing.write(options.output, NAME, text, rows, metadata)


if __name__ == '__main__':
  main()
