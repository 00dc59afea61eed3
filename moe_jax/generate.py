"""Continues or answers prompts with the model that a run has trained.

    python -m moe_jax.generate --workdir=runs/tiny --prompt='def ' \
      --temperature=0.8

The text is printed token by token. With temperature 0, the default, each token
is the likeliest one, so that small models repeat themselves; with 0.8 tokens
are drawn. On a terminal, or with --echo, the prompt is printed before the text.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from moe_jax import cli, generation
from moe_jax.analysis import traces
from moe_jax.analysis.recording import make_header, records_of
from moe_jax.config import SEEDS
from moe_jax.data.plain_files import read_text
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.devices import keep_freed_memory, keep_programs
from moe_jax.errors import InputError
from moe_jax.generation import read_again, trained_run
from moe_jax.interop import rollouts
from moe_jax.models import check_generates
from moe_jax.models.recorded import recording
from moe_jax.training import trained

_DIM = '\x1b[2m{}\x1b[0m'  # the codes of a terminal


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = cli.parser('moe_jax.generate', __doc__)
  add = parser.add_argument
  add('--workdir', required=True, help='folder of the run')
  checkpoints = parser.add_mutually_exclusive_group()
  checkpoints.add_argument(
    '--step',
    type=cli.NOT_NEGATIVE,
    help='step of the checkpoint; else the newest good',
  )
  checkpoints.add_argument(
    '--best', action='store_true', help="the run's best checkpoint"
  )
  prompts = parser.add_mutually_exclusive_group(required=True)
  prompts.add_argument('--prompt', help='text to continue or to answer')
  prompts.add_argument('--prompts_file', help='file with a prompt in each line')
  add('--chat', action='store_true', help="treat prompts as a user's turns")
  add('--task', default='', help='task of the prompts, if routers go by it')
  add('--source_language', default='', help="prompts': eng_Latn (NLLB)")
  add('--target_language', default='', help="answers': fra_Latn (NLLB)")
  number, likeliest = cli.number, 'draw among the likeliest'
  for name, kind, default, text in (
    ('num_tokens', cli.POSITIVE, 256, 'most new tokens a row'),
    ('temperature', number(float, minimum=0), 0.0, '0: the likeliest token'),
    ('top_k', cli.NOT_NEGATIVE, 0, f'{likeliest} k; 0: all'),
    ('top_p', cli.SHARE, 1.0, f'{likeliest} that sum to p'),
    ('num_beams', cli.POSITIVE, 1, 'above 1: beam search'),
    ('length_penalty', number(float), 1.0, "beam search's exponent"),
  ):
    add(f'--{name}', type=kind, default=default, help=text)
  seed, text = number(int, minimum=0, below=SEEDS), 'seed of the drawn tokens'
  add('--seed', type=seed, help=f'{text} (default: 0)')
  text = 'token that ends a row, besides the end of text; repeatable'
  add('--stop', action='append', default=[], help=text)
  add(
    '--echo',
    action=argparse.BooleanOptionalAction,
    help='print the prompt before its continuation or answer; by default where '
    'the output is a terminal, so that a pipe gets the new text alone',
  )
  add('--trace', help='new folder for the choices of experts of every token')
  text = 'new .npz file for tokens and their experts, as inference servers'
  add('--rollouts', help=f'{text} return them (moe_jax.interop.rollouts)')
  cli.add_allow_module(parser)
  cli.add_traceback(parser)
  options = parser.parse_args(argv)
  if options.chat and options.source_language:
    parser.error('--chat with --source_language: a turn of a chat has none')
  if options.seed is not None and not options.temperature:
    parser.error(
      f'--seed={options.seed} has no effect with --temperature=0, which draws '
      'no tokens; give a temperature such as 0.8'
    )
  return options


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; errors are reported in a few lines."""
  options = parse(argv)
  logging.set_verbosity(logging.WARNING)
  keep_freed_memory()
  if problem := keep_programs():
    cli.complain(problem)
  with cli.reported(options.traceback):
    run(options)


def run(options: argparse.Namespace) -> None:
  """Loads the run and prints the text that it generates."""
  numbered = _prompts(options)
  texts = list(numbered.values())
  if options.trace:
    traces.check_new(options.trace)
  step = trained.best_step(options.workdir) if options.best else options.step
  loaded = generation.load(options.workdir, step, allow=options.allow_module)
  check_generates(loaded.model)
  for step, reason in loaded.skipped:
    cli.complain(f'passed over the checkpoint of step {step}: {reason}')
  if loaded.model.stacks.forced_balance:
    cli.complain(f'WARNING: {loaded.model.stacks.forced_balance}')
  prompts, num_tokens = _fitted(loaded, texts, options)
  model, variables = generation.prepare(
    loaded.model,
    loaded.variables,
    batch_size=len(texts) * options.num_beams,
    window=trained_run.window(
      loaded.options.data,
      loaded.model,
      imported=trained_run.is_imported(loaded.folder),
    ),
  )
  if options.rollouts:
    rollouts.check_new(options.rollouts, model)
  arguments = _arguments(loaded, options, len(prompts))
  stream, on_terminal = None, sys.stdout.isatty()
  echo = on_terminal if options.echo is None else options.echo
  if echo and len(texts) == 1:
    _show(_DIM.format(texts[0]) if on_terminal else texts[0])
    if model.has_encoder or options.chat:
      _show('\n')
  if len(texts) == 1 and options.num_beams == 1:
    context = () if model.has_encoder else prompts[0]
    stream = generation.TextStream(loaded.tokenizer, context)
    arguments['on_token'] = lambda _, tokens: _show(stream.add(int(tokens[0])))
  generated = generation.generate(
    model, variables, prompts, num_tokens=num_tokens, **arguments
  )
  if options.trace or options.rollouts:
    batch, choices = read_again.choices(
      model, variables, prompts, generated.rows, recording,
      start_id=arguments.get('start_id'), task_ids=arguments['task_ids'],
    )  # fmt: skip
    named = 'generate', loaded.step, 0
    records = [*records_of(model, *named, batch, choices)]
    if options.trace:
      _trace(options.trace, loaded, model, len(prompts), records)
    if options.rollouts:
      read = [np.append(*pair) for pair in zip(prompts, generated.rows)]
      texts = rollouts.from_record(model, records[0], read)
      rollouts.save(options.rollouts, texts)
  if stream is not None:
    _show(stream.end() + '\n')
    return
  for (number, text), ids in zip(numbered.items(), generated.rows):
    if len(texts) > 1:
      _show(f'[{number}] {text}\n')
    _show(trained_run.decode(loaded.tokenizer, ids) + '\n')


def _prompts(options: argparse.Namespace) -> dict[int, str]:
  """The prompt of the options, or those of their file by line number, from 1.

  Empty lines are left out.
  """
  if options.prompts_file is None:
    return {1: options.prompt}
  text = read_text(pathlib.Path(options.prompts_file))
  prompts = {n: line for n, line in enumerate(text.splitlines(), 1) if line}
  if not prompts:
    raise InputError(f'{options.prompts_file} has no prompts, one a line')
  return prompts


def _fitted(loaded, texts, options) -> tuple[list[np.ndarray], int]:
  """Token ids of the prompts `texts`, and the number of new tokens of a row.

  Both are cut to fit the loaded model, of which a line is printed.
  """
  encoded = [_encode(loaded, text, options) for text in texts]
  for text, ids in zip(texts, encoded):
    if not len(ids):
      raise InputError(f'prompt {text!r} has no tokens; give it some text')
  requested = options.num_tokens
  fitted = [trained_run.fit(loaded.model, ids, requested) for ids in encoded]
  num_tokens = min(n for _, n in fitted)
  prompts = [ids for ids, _ in fitted]
  num_cut = sum(map(len, encoded)) - sum(map(len, prompts))
  if num_cut or num_tokens < requested:
    cli.complain(
      f'learned positions have room for {num_tokens} new tokens of '
      f'{requested}; {num_cut} tokens of prompts are left out'
    )
  return prompts, num_tokens


def _encode(loaded, text: str, options) -> np.ndarray:
  tokenizer = loaded.tokenizer
  language = options.source_language
  if options.chat or language:
    _needs(tokenizer, 'encode_chat', '--chat or --source_language')
  if options.chat:
    return tokenizer.encode_chat([{'role': 'user', 'content': text}])
  keywords = {'language': language} if language else {}
  return trained_run.encode(
    loaded.options.data.task,
    tokenizer,
    text,
    imported=trained_run.is_imported(loaded.folder),
    **keywords,
  )


def _arguments(
  loaded, options: argparse.Namespace, num_prompts: int
) -> dict[str, Any]:
  """The keyword arguments of `generation.generate` that flags decide.

  `loaded` is the trained run; the task of --task is given for each prompt.
  """
  tokenizer = loaded.tokenizer
  ids = trained_run.special_ids(loaded.model, tokenizer)
  stops = [_token(tokenizer, text) for text in options.stop]
  ids['stop_ids'] = (*ids['stop_ids'], *stops)
  if options.target_language:
    _needs(tokenizer, 'token_id', '--target_language')
    ids['forced_ids'] = (tokenizer.token_id(options.target_language),)
  names = ('temperature', 'top_k', 'top_p', 'num_beams', 'length_penalty')
  return {
    **ids,
    **{name: getattr(options, name) for name in names},
    'seed': options.seed or 0,
    'task_ids': trained_run.task_ids(
      loaded.model,
      loaded.options.data,
      [options.task] * num_prompts,
      '--task',
    ),
  }


def _trace(folder: str, loaded, model, size: int, records) -> None:
  """Writes a trace of the choices of experts for prompts and new tokens.

  `loaded` is the trained run, `model` its model for decoding, and `size` the
  number of prompts; `records` come from `records_of`.
  """
  note = 'text that was generated, for which experts have room for all tokens'
  if model.stacks.capacity_binds:
    note = 'text that was generated, with the capacity of the checkpoint'
  described = model, loaded.options.model, loaded.options.data, loaded.tokenizer
  header = make_header(*described, batch_size=size, note=note)
  traces.write(folder, header, records)
  cli.complain(f'choices of experts: {folder}')


def _token(tokenizer: Tokenizer, text: str) -> int:
  ids = tokenizer.encode(text)
  if len(ids) != 1:
    names = [tokenizer.token_name(i) for i in ids]
    raise InputError(
      f'--stop={text!r} is not one token but {len(ids)}: {names}'
    )
  return int(ids[0])


def _needs(tokenizer: Tokenizer, method: str, flag: str) -> None:
  if not hasattr(tokenizer, method):
    raise InputError(
      f'{flag}: tokenizer {tokenizer.identity} came with no model, and so has '
      'neither a chat template nor languages'
    )


def _show(text: str) -> None:
  print(text, end='', flush=True)


if __name__ == '__main__':
  main()
