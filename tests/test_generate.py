"""The command `python -m moe_jax.generate`, called as a function."""

import sys

import pytest
import tokenizers as hf

from moe_jax import generate, generation
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers.json_tokenizer import SpecialTokens
from tests.generation import folders

HALVES = dict(
  data=dict(
    task=dict(kind='seq2seq'),
    source=dict(kind='python_stdlib_docstrings'),
    target_len=8,
  ),
  model=dict(kind='encoder_decoder', positions=dict(kind='relative')),
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The folder of a run of a decoder on bytes."""
  folder = tmp_path_factory.mktemp('run')
  folders.write(folder)
  return folder


def output_of(capsys, folder, *flags):
  """The text that the command prints to both streams."""
  generate.main([f'--workdir={folder}', '--num_tokens=9', *flags])
  return capsys.readouterr()


def error_of(capsys, *argv):
  with pytest.raises(SystemExit) as exit_error:
    generate.main(argv)
  assert exit_error.value.code == 1
  return capsys.readouterr().err


def expected(folder, prompts, **options):
  """The tokens that the function `generate` returns for the same arguments."""
  loaded = generation.load(folder)
  prompts = [list(prompt.encode()) for prompt in prompts]
  options = dict(num_tokens=9, stop_ids=[256]) | options
  return generation.generate(
    loaded.model, loaded.variables, prompts, **options
  ).rows


def test_one_prompt_is_streamed(run, capsys, monkeypatch):
  likely = expected(run, ['def '])[0]
  text, pieces, write = tokenizers.Bytes().decode(likely), [], sys.stdout.write
  monkeypatch.setattr(
    sys.stdout, 'write', lambda piece: pieces.append(piece) or write(piece)
  )
  assert output_of(capsys, run, '--prompt=def ').out == text + '\n'
  assert len(pieces) >= len(text)
  sampled = expected(run, ['def '], temperature=1.4, top_k=50, seed=6)[0]
  flags = '--temperature=1.4', '--top_k=50', '--seed=6'
  out = output_of(capsys, run, '--prompt=def ', *flags).out
  assert out == tokenizers.Bytes().decode(sampled) + '\n'
  assert (sampled != likely[: len(sampled)]).any()


def test_a_prompt_is_echoed_where_a_person_reads(run, capsys, monkeypatch):
  echoed = output_of(capsys, run, '--prompt=def ', '--echo').out
  assert echoed.startswith('def ')
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  shown = output_of(capsys, run, '--prompt=def ').out
  assert shown == echoed.replace('def ', '\x1b[2mdef \x1b[0m', 1)


@pytest.mark.slow
def test_prompts_of_a_file_are_one_batch_in_beams(run, capsys, tmp_path):
  path = tmp_path / 'prompts.txt'
  path.write_text('ab\n\nc d\n', encoding='utf-8')
  options = dict(num_beams=3, length_penalty=0.5)
  rows = expected(run, ['ab', 'c d'], **options)
  first, second = map(tokenizers.Bytes().decode, rows)
  flags = [f'--{name}={value}' for name, value in options.items()]
  out = output_of(capsys, run, f'--prompts_file={path}', *flags).out
  assert out == f'[1] ab\n{first}\n[3] c d\n{second}\n'  # prompts are lines


@pytest.mark.slow
def test_the_best_checkpoint_or_the_newest(tmp_path, capsys):
  folders.write(tmp_path, steps=(3, 5))
  best = output_of(capsys, tmp_path, '--prompt=ab', '--best').out
  assert best == output_of(capsys, tmp_path, '--prompt=ab', '--step=3').out
  newest = output_of(capsys, tmp_path, '--prompt=ab')
  assert best != newest.out and newest.err == ''
  folders.damage(tmp_path, 5)
  output = output_of(capsys, tmp_path, '--prompt=ab')
  assert 'passed over the checkpoint of step 5' in output.err
  assert output.out == best


@pytest.mark.slow
def test_a_stop_token_by_its_text(run, capsys):
  flags = '--temperature=2.0', '--seed=1', '--num_tokens=40'
  ascii_flags = [f'--stop={chr(i)}' for i in range(32, 127)]
  free = output_of(capsys, run, '--prompt=a', *flags).out
  out = output_of(capsys, run, '--prompt=a', *flags, *ascii_flags).out
  stop = next(i for i, c in enumerate(free) if ' ' <= c <= '~')
  assert out == free[: stop + 1] + '\n'


@pytest.mark.slow
def test_chats_and_languages_are_the_tokenizers(tmp_path, capsys):
  model = hf.Tokenizer(
    hf.models.WordLevel(
      {'<s>': 0, 'hi': 1, 'eng_Latn': 2, 'fra_Latn': 3, '<unk>': 4, 'you': 5},
      unk_token='<unk>',
    )
  )
  model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  model.add_special_tokens(['<s>', 'eng_Latn', 'fra_Latn'])
  model.post_processor = hf.processors.TemplateProcessing(
    single='eng_Latn $A', special_tokens=[('eng_Latn', 2)]
  )
  special = SpecialTokens(
    start=0, chat_template='you {{ messages[0].content }}'
  )
  tokenizer = tokenizers.Json(model.to_str(), special)
  folders.write(tmp_path, tokenizer=tokenizer, **HALVES)
  loaded = generation.load(tmp_path)

  def answer(ids, **options):
    options = dict(num_tokens=9, start_id=0) | options
    output = generation.generate(loaded.model, loaded.variables, ids, **options)
    return tokenizer.decode(output.rows[0][output.rows[0] < 6]) + '\n'

  cases = (
    ([], answer([2, 1])),
    (['--source_language=fra_Latn'], answer([3, 1])),
    (['--target_language=fra_Latn'], answer([2, 1], forced_ids=[3])),
    (['--chat'], answer([5, 1])),
  )
  for flags, text in cases:
    assert output_of(capsys, tmp_path, '--prompt=hi', *flags).out == text


@pytest.mark.slow
def test_learned_positions_shorten_the_text(tmp_path, capsys):
  # 24 positions hold a prompt of 4 and 21 new tokens, of which the last is
  # never read.
  folders.write(tmp_path, model=dict(positions=dict(kind='learned')))
  output = output_of(capsys, tmp_path, '--prompt=abcd', '--num_tokens=50')
  assert 'room for 21 new tokens of 50; 0 tokens of prompts' in output.err
  output = output_of(
    capsys, tmp_path, '--prompt=' + 'x' * 40, '--num_tokens=50'
  )
  assert 'room for 13 new tokens of 50; 28 tokens of prompts' in output.err


def test_mistakes_are_a_line(run, capsys, tmp_path):
  flag = f'--workdir={run}'
  empty = tmp_path / 'empty.txt'
  empty.write_text('\n')
  for argv, message in (
    ([flag, '--prompt='], "prompt '' has no tokens"),
    ([flag, f'--prompts_file={empty}'], 'has no prompts, one a line'),
    ([flag, '--prompt=a', '--chat'], '--chat or --source_language: tokenizer'),
    ([flag, '--prompt=a', '--target_language=x'], '--target_language: token'),
    ([flag, '--prompt=a', '--top_k=4'], 'need a temperature above 0'),
    ([flag, '--prompt=a', '--seed=0'], 'no effect with --temperature=0'),
    ([flag, '--prompt=a', '--step=4'], 'no checkpoint 4'),
    (
      [flag, '--prompt=a', '--stop=ab'],
      "moe_jax: --stop='ab' is not one token but 2: [\"'a'\", \"'b'\"]",
    ),
  ):
    error = error_of(capsys, *argv)
    assert message in error, error
    assert len(error.splitlines()) == 1
