"""How fast are tokens generated, against transformers on the same checkpoint?

    python -m experiments.bench_generation

Writes a random Mixtral as a Hugging Face checkpoint, loads it in transformers
and with `moe_jax.interop`, and times greedy `generate` of both, interleaved,
at several batch sizes. A timed call includes reading the prompts and fetching
the tokens. Every implementation of experts that transformers offers and this
device can run is timed; the table gives ratios to the default one and to the
fastest, and the tokens must be the same. The matrix products of such a
generation alone are timed beside them, since they are the limit of all.
Writes `table.md`, `rows.csv` and `results.json` to
`results/bench_generation/<device>`.
"""

import argparse
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks import decoding_products, timing
from experiments.benchmarks.roofline import Peaks, measure_peaks
from experiments.study.tables import markdown_table
from moe_jax import cli, generation, interop
from moe_jax.devices import keep_freed_memory

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


def measure(
  theirs: Any,
  ours: Sequence[Any],
  sizes: Mapping[str, int],
  *,
  batch_size: int,
  prompt_len: int,
  num_tokens: int,
  seconds: float,
) -> list[dict[str, Any]]:
  """Times all cases of one batch size, interleaved; one row for each."""
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
  cases[LIMIT] = decoding_products.products(
    sizes, batch_size, prompt_len, num_tokens
  )
  cases[LIMIT]()  # compiles
  times = timing.interleave(cases, seconds=seconds)
  fastest = min(peers, key=lambda name: np.median(times[name]))
  rows = []
  for name, durations in times.items():
    duration = timing.Spread.of(durations)
    to_default = timing.ratio(times[default], durations)
    to_fastest = timing.ratio(times[fastest], durations)
    over_limit = timing.ratio(durations, times[LIMIT])
    rows.append(
      {
        'case': name,
        'batch': batch_size,
        'rounds': len(durations),
        'ms': 1e3 * duration.median,
        'tokens_per_second': batch_size * num_tokens / duration.median,
        'per_default': to_default.median,
        'per_default_low': to_default.low,
        'per_default_high': to_default.high,
        'fastest_peer': fastest,
        'per_fastest': to_fastest.median,
        'per_fastest_low': to_fastest.low,
        'per_fastest_high': to_fastest.high,
        'over_limit': over_limit.median,
        'over_limit_low': over_limit.low,
        'over_limit_high': over_limit.high,
        'same_tokens': same_tokens.get(name),
      }
    )
  return rows


def report(
  rows: Sequence[Mapping[str, Any]],
  sizes: Mapping[str, int],
  prompt_len: int,
  num_tokens: int,
  peaks: Peaks,
) -> str:
  """The table and the meaning of its columns, in Markdown."""
  f = timing.facts()
  lines = []
  for row in rows:
    line = {
      'batch': str(row['batch']),
      'case': row['case'],
      'ms': f'{row["ms"]:.0f}',
      'tokens / s': f'{row["tokens_per_second"]:,.0f}',
    }
    for name, title in (
      ('per_default', f"speed / {THEIRS}' default"),
      ('per_fastest', 'speed / its fastest'),
      ('over_limit', f'time / {LIMIT}'),
    ):
      low, high = row[f'{name}_low'], row[f'{name}_high']
      line[title] = f'{row[name]:.2f} ({low:.2f}-{high:.2f})'
    same = row['same_tokens']
    lines.append(line | {'same tokens': '-' if same is None else f'{same:.1%}'})
  sizes_text = ', '.join(f'{name}={value}' for name, value in sizes.items())
  return (
    f'# Greedy generation from one Mixtral checkpoint\n\n{f["device"]} '
    f'({f["cores"]} cores), {f["date"]}, jax {f["jax"]}; {peaks.describe()}. '
    f'{sizes_text}; float32; prompts of {prompt_len} tokens, {num_tokens} new '
    'ones. Whole calls, after compilation, interleaved: medians, and medians '
    f'of ratios within a round (quartiles in brackets). {THEIRS} is named '
    'with what runs its experts. "Same tokens" is the share of tokens that '
    f'equal those of its default. {LIMIT.capitalize()}: the products of each '
    'step with every kernel that it needs, with as many experts as balanced '
    f'random choices would read.\n\n{markdown_table(lines)}'
  )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(
    prog=f'python -m experiments.{NAME}', description=__doc__.split('\n')[0]
  )
  add = parser.add_argument
  number = cli.POSITIVE
  add(
    '--batch_sizes',
    type=number,
    nargs='+',
    default=[1, 8],
    help='numbers of prompts of a call',
  )
  add('--prompt_len', type=number, default=32, help='tokens of a prompt')
  add('--num_tokens', type=number, default=64, help='tokens to generate')
  add(
    '--num_layers',
    type=number,
    default=SIZES['num_hidden_layers'],
    help='layers of the model',
  )
  add(
    '--seconds', type=cli.SECONDS, default=40.0, help='time for each batch size'
  )
  timing.add_arguments(parser)
  return parser.parse_args(argv)


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures every batch size and writes the table."""
  options = parse(argv)
  keep_freed_memory()
  sizes = {**SIZES, 'num_hidden_layers': options.num_layers}
  rows, peaks = [], measure_peaks('float32', quick=options.rough_peaks)
  with tempfile.TemporaryDirectory() as folder:
    theirs = transformers_model(sizes, pathlib.Path(folder))
    _, *ours = interop.load(folder)
  for batch_size in options.batch_sizes:
    rows += measure(
      theirs,
      ours,
      sizes,
      batch_size=batch_size,
      prompt_len=options.prompt_len,
      num_tokens=options.num_tokens,
      seconds=options.seconds,
    )
  text = report(rows, sizes, options.prompt_len, options.num_tokens, peaks)
  folder = timing.write(options.output, NAME, text, rows, {'sizes': sizes})
  print(f'\n{text}\nwritten: {folder}')


if __name__ == '__main__':
  main()
