"""What does the loss of a large vocabulary take, at once and by blocks?

    python -m experiments.bench_loss

Times the loss of a batch and its gradient, from the output of a model's last
block, for vocabularies of 32k, 128k and 256k: cross-entropy and the z-loss of
the logits, in blocks of tokens of at most 64 MiB of logits, beside all at once,
in turns. Writes peak memory, by the compiler's own count of temporary arrays,
and the largest difference of the two gradients, relative to the largest value,
to `results/bench_loss/<device>`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import timing
from experiments.benchmarks.roofline import Peaks, Work
from moe_jax import cli
from moe_jax.models.logits import Head, Logits, by_blocks

NAME = 'bench_loss'
B, T, M = 4, 256, 256
VOCAB_SIZES = (32 * 1024, 128 * 1024, 256 * 1024)
WHOLE, BLOCKS = 'all at once', 'by blocks'
BLOCK_MB = {WHOLE: 0, BLOCKS: 64}


@functools.partial(jax.jit, static_argnames='block_mb')
def gradients(x, kernel, rows, block_mb: int) -> Any:
  """The gradients of the mean loss with respect to x and the kernel."""

  def of_tokens(logits, rows):
    nats = optax.softmax_cross_entropy_with_integer_labels(
      logits, rows['targets']
    )
    return nats + 1e-4 * jax.nn.logsumexp(logits, axis=-1) ** 2

  def loss(x, kernel):
    head = Head(kernel, None, 1.0, block_mb, (), ())
    return by_blocks(of_tokens, Logits(x, head), rows).mean()

  return jax.grad(loss, (0, 1))(x, kernel)


def measure(V: int, seconds: float, peaks: Peaks) -> list[dict[str, Any]]:
  """Times both ways for one vocabulary; returns a row for each."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(B, T, M)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(M, V)) / M**0.5, jnp.float32)
  targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  arguments = x, kernel, {'targets': targets}
  # Three products; blocks compute the first of them twice.
  work = Work(3 * 2 * B * T * M * V, min_bytes=0)
  programs, memory, results = {}, {}, {}
  for name, block_mb in BLOCK_MB.items():
    compiled = gradients.lower(*arguments, block_mb).compile()
    memory[name] = compiled.memory_analysis().temp_size_in_bytes
    results[name] = jax.device_get(compiled(*arguments))
    run = functools.partial(
      lambda c: jax.block_until_ready(c(*arguments)), compiled
    )
    programs[name] = timing.Program(run, work)
  differences = [
    float(np.abs(a - b).max() / np.abs(a).max())
    for a, b in zip(results[WHOLE], results[BLOCKS], strict=True)
  ]
  times, rows = timing.measure(programs, peaks, {}, seconds=seconds)
  return [
    {
      'vocab_size': V,
      **row,
      'logits_mb': 4 * B * T * V / 2**20,
      'peak_mb': memory[name] / 2**20,
      'per_whole': timing.ratio(times[name], times[WHOLE]),
      'difference': max(differences) if name == BLOCKS else 0.0,
    }
    for name, row in rows.items()
  ]


COLUMNS = {
  'V': '{vocab_size}',
  'logits': '{case}',
  'all logits, MiB': '{logits_mb:.0f}',
  'peak, MiB': '{peak_mb:.0f}',
  'ms': '{ms.median:.0f}',
  f'over {WHOLE}': '{per_whole:.2f}',
  'difference of gradients': '{difference:.1e}',
}


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures all vocabularies; writes the table."""
  parser = timing.parser(NAME, __doc__)
  parser.add_argument(
    '--seconds', type=cli.SECONDS, default=30.0, help='time for each vocabulary'
  )
  options = parser.parse_args(argv)
  peaks, rows = timing.measured_peaks(options), []
  for V in VOCAB_SIZES:
    rows += measure(V, options.seconds, peaks)
  text = (
    f'# Loss and its gradient, {B} x {T} tokens of width {M}, float32\n\n'
    f'{timing.conditions(peaks)}\n\n{timing.table(rows, COLUMNS)}'
  )
  metadata = {'peaks': dataclasses.asdict(peaks)}
  timing.write(options.output, NAME, text, rows, metadata)


if __name__ == '__main__':
  main()
