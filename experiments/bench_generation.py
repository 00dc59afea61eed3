"""How fast are tokens generated, against transformers on the same checkpoint?

    python -m experiments.bench_generation

Writes a random Mixtral as a Hugging Face checkpoint, loads it in transformers
and with `moe_jax.interop`, and times greedy `generate` of both, interleaved,
at several batch sizes. A timed call includes reading the prompts and fetching
the tokens. Every implementation of experts that transformers offers and this
device can run is timed; the table gives ratios to the default one and to the
fastest, and the tokens must be the same. The matrix products of such a
generation alone are timed beside them, since they are the limit of all.
Writes `table.md` and `results.json` to `results/bench_generation/<device>`.
"""

import argparse
import functools
import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from moe_jax import cli, generation, interop
from moe_jax.shapes import Array, Float

NAME = 'bench_generation'
OURS, STREAMED = 'moe_jax', 'moe_jax, streamed'
THEIRS = 'transformers'
LIMIT = 'matrix products alone'
# Implementations of experts in transformers, the default first.
EXPERTS = ('grouped_mm', 'batched_mm', 'eager')
SIZES = dict(
  vocab_size=1024,
  hidden_size=256,
  intermediate_size=512,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  num_local_experts=8,
  num_experts_per_tok=2,
)


def transformers_model(sizes: Mapping[str, int], folder: pathlib.Path) -> Any:
  """Returns a Mixtral with random weights, also saved to the folder.

  It has no end-of-text token, so that every generation has the full length.

  Raises:
    SystemExit: transformers or torch is not installed.
  """
  try:
    import torch
    import transformers
  except ImportError as error:
    raise SystemExit(f"needs the 'experiments' extra: {error}") from error
  torch.manual_seed(0)
  config = transformers.MixtralConfig(
    **sizes,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
    # Large enough that tokens vary and no two logits nearly tie.
    initializer_range=0.1,
    tie_word_embeddings=False,
  )
  model = transformers.MixtralForCausalLM(config).eval()
  model.save_pretrained(folder)
  return model


def their_cases(
  model: Any, prompts: np.ndarray, num_tokens: int
) -> dict[str, Callable[[], np.ndarray]]:
  """transformers' cases: one for each implementation that works here."""
  import torch

  ids = torch.from_numpy(prompts).long()

  def run(experts):
    model.set_experts_implementation(experts)
    with torch.inference_mode():
      sequences = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
      )
    return sequences[:, ids.shape[1] :].numpy()

  cases = {}
  for experts in EXPERTS:
    try:
      run(experts)
    except (NotImplementedError, RuntimeError, ValueError) as error:
      print(f'{THEIRS}, {experts}: does not run here: {error}')
      continue
    cases[f'{THEIRS}, {experts}'] = functools.partial(run, experts)
  return cases


def our_cases(
  model: Any, variables: Any, prompts: np.ndarray, num_tokens: int
) -> dict[str, Callable[[], np.ndarray]]:
  """The cases of moe_jax: tokens at the end, and tokens one by one."""
  run = functools.partial(
    generation.generate, model, variables, list(prompts), num_tokens=num_tokens
  )
  return {
    OURS: lambda: run().tokens,
    STREAMED: lambda: run(on_token=lambda n, tokens: None).tokens,
  }


def read_experts(num_tokens: int, sizes: Mapping[str, int]) -> int:
  """Experts of a layer that tokens with balanced random choices read.

  Args:
    num_tokens: Tokens of a step.
    sizes: Sizes of a Mixtral, named as in its config.

  Returns:
    Their expected number, rounded.
  """
  E, K = sizes['num_local_experts'], sizes['num_experts_per_tok']
  return round(E * (1 - (1 - K / E) ** num_tokens))


def products(
  sizes: Mapping[str, int], batch_size: int, prompt_len: int, num_tokens: int
) -> Callable[[], jax.Array]:
  """The matrix products of a greedy generation, and nothing else, compiled.

  They are the products of reading prompts and of all steps after it. Their time
  is the limit of every implementation that multiplies by each kernel once a
  step: at few rows it is the time in which a machine reads the kernels.

  Args:
    sizes: Sizes of a Mixtral, named as in its config.
    batch_size: Number of prompts.
    prompt_len: Tokens of a prompt.
    num_tokens: Tokens to generate for each prompt; the first of them needs no
      step of its own.

  Returns:
    A function without arguments, which waits for the last product.
  """
  M, F = sizes['hidden_size'], sizes['intermediate_size']
  E = sizes['num_local_experts']
  width = M // sizes['num_attention_heads'] * sizes['num_key_value_heads']
  rng = np.random.default_rng(0)

  def kernel(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  head = kernel(M, sizes['vocab_size'])
  # The kernels of each layer, and those of each of its experts.
  layers = [
    (
      [kernel(M, n) for n in (M, width, width, M, E)],
      [[kernel(M, F), kernel(M, F), kernel(F, M)] for _ in range(E)],
    )
    for _ in range(sizes['num_hidden_layers'])
  ]
  served = read_experts(batch_size, sizes)
  share = sizes['num_experts_per_tok'] / sizes['num_local_experts']

  def through_layers(x, served, rows):
    """Multiplies x by every kernel, and its first rows by experts' kernels."""
    for kernels, experts in layers:
      for kernel in kernels:
        x = _changed(x, x @ kernel)
      for gate, up, down in experts[:served]:
        y = (x[:rows] @ gate + x[:rows] @ up) @ down
        x = x.at[:rows].set(_changed(x[:rows], y))
    return x

  @jax.jit
  def run(prompts, first):
    rows = math.ceil(len(prompts) * share)
    read = through_layers(prompts, E, rows)

    def step(_, x):
      x = through_layers(x, served, batch_size)
      return _changed(x, x @ head)

    # The steps wait for the prompts, as those of a generation do.
    first = _changed(first, read[:batch_size])
    return jax.lax.fori_loop(1, num_tokens, step, first)

  prompts = jnp.ones((batch_size * prompt_len, M))
  first = jnp.ones((batch_size, M))
  return lambda: jax.block_until_ready(run(prompts, first))


def _changed(
  x: Float[Array, 'R M'], product: Float[Array, 'R N']
) -> Float[Array, 'R M']:
  """x with so little of the product that it stays finite, yet waits for it."""
  return x + 1e-9 * product.mean(axis=1, keepdims=True)


def measure(
  theirs: Any,
  ours: Sequence[Any],
  sizes: Mapping[str, int],
  batch_size: int,
  options: argparse.Namespace,
) -> list[dict[str, Any]]:
  """Times all cases of one batch size, interleaved; one row for each.

  Args:
    theirs: transformers' model.
    ours: Our model and its variables.
    sizes: Sizes of both, named as in a Mixtral's config.
    batch_size: Number of prompts.
    options: The command line: lengths of prompts and texts, and the seconds.
  """
  prompt_len, num_tokens = options.prompt_len, options.num_tokens
  rng = np.random.default_rng(batch_size)
  shape = batch_size, prompt_len
  prompts = rng.integers(1, theirs.config.vocab_size, shape, np.int32)
  peers = their_cases(theirs, prompts, num_tokens)
  prepared = generation.prepare(*ours, batch_size=batch_size)
  cases = our_cases(*prepared, prompts, num_tokens) | peers
  tokens = {name: run() for name, run in cases.items()}
  default = next(iter(peers))
  same_tokens = {
    name: float((generated == tokens[default]).mean())
    for name, generated in tokens.items()
  }
  cases[LIMIT] = products(sizes, batch_size, prompt_len, num_tokens)
  cases[LIMIT]()  # compiles
  times = timing.interleave(cases, seconds=options.seconds)
  fastest = min(peers, key=lambda name: np.median(times[name]))
  rows = []
  for name, durations in times.items():
    duration = timing.Spread.of(durations).median
    rows.append(
      {
        'case': name,
        'batch': batch_size,
        'rounds': len(durations),
        'ms': 1e3 * duration,
        'tokens_per_second': batch_size * num_tokens / duration,
        'per_default': timing.ratio(times[default], durations),
        'fastest_peer': fastest,
        'per_fastest': timing.ratio(times[fastest], durations),
        'over_limit': timing.ratio(durations, times[LIMIT]),
        **({'same_tokens': same_tokens[name]} if name in same_tokens else {}),
      }
    )
  return rows


COLUMNS = {
  'batch': '{batch}',
  'case': '{case}',
  'ms': '{ms:.0f}',
  'tokens / s': '{tokens_per_second:,.0f}',
  f"speed / {THEIRS}' default": '{per_default:.2f}',
  'speed / its fastest': '{per_fastest:.2f}',
  f'time / {LIMIT}': '{over_limit:.2f}',
  'same tokens': '{same_tokens:.1%}',
}


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures every batch size and writes the table."""
  parser = timing.parser(NAME, __doc__)
  add, number = parser.add_argument, cli.POSITIVE
  text = 'numbers of prompts of a call'
  add('--batch_sizes', type=number, nargs='+', default=[1, 8], help=text)
  add('--prompt_len', type=number, default=32, help='tokens of a prompt')
  add('--num_tokens', type=number, default=64, help='tokens to generate')
  layers = SIZES['num_hidden_layers']
  add('--num_layers', type=number, default=layers, help='layers of the model')
  text = 'time for each batch size'
  add('--seconds', type=cli.SECONDS, default=40.0, help=text)
  options = parser.parse_args(argv)
  sizes = {**SIZES, 'num_hidden_layers': options.num_layers}
  rows, peaks = [], timing.measured_peaks(options)
  with tempfile.TemporaryDirectory() as folder:
    theirs = transformers_model(sizes, pathlib.Path(folder))
    _, *ours = interop.load(folder)
  for batch_size in options.batch_sizes:
    rows += measure(theirs, ours, sizes, batch_size, options)
  sizes_text = ', '.join(f'{name}={value}' for name, value in sizes.items())
  text = (
    '# Greedy generation from one Mixtral checkpoint\n\n'
    f'{timing.conditions(peaks)} {sizes_text}; float32; prompts of '
    f'{options.prompt_len} tokens, {options.num_tokens} new ones. Whole calls, '
    f'after compilation. {THEIRS} is named with what runs its experts. "Same '
    'tokens" is the share of tokens that equal those of its default. '
    f'{LIMIT.capitalize()}: the products of each step with every kernel that '
    'it needs, with as many experts as balanced random choices would read.'
    f'\n\n{timing.table(rows, COLUMNS)}'
  )
  timing.write(options.output, NAME, text, rows, {'sizes': sizes})


if __name__ == '__main__':
  main()
