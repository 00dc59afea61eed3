"""A run that begins with another has its tokenizer, and learns other text."""

import shutil

import pytest

from moe_jax import data, finetuning, generate, run_config
from moe_jax.analysis import cost
from moe_jax.compression import calibration, whole_run
from moe_jax.config import layered, merge
from moe_jax.configs import base
from moe_jax.data import tokenizers
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training import setup, trained
from tests.finetuning.test_start import set_up, train
from tests.generation import folders
from tests.training import tiny
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401

LETTERS = tokenizers.Chars('abc \n')


def texts(folder, line):
  """The pattern of a corpus of two files, one for each split."""
  folder.mkdir()
  for name in 'xy':
    (folder / f'{name}.txt').write_text(f'{line}\n' * 40)
  return {'source': {'kind': 'files', 'files': {'pattern': f'{folder}/*.txt'}}}


def config_from(folder, source, **overrides):
  return tiny.config(
    total_steps=1,
    init_from={'workdir': str(folder)},
    data=source,
    sample={'prompt': 'ab', 'num_tokens': 4},
    **overrides,
  )


@pytest.fixture
def letters(tmp_path):
  """The folder of a run on characters, of which its corpus had five."""
  folders.write(tmp_path / 'letters', tokenizer=LETTERS)
  return tmp_path / 'letters'


@pytest.mark.slow
def test_other_text_is_learned(letters, tmp_path, capsys):
  sample = {'num_tokens': 0, 'prompt': base.get_config().sample.prompt}
  config = merge(
    config_from(letters, texts(tmp_path / 'other', 'a cab'), evals={}),
    {'sample': sample, 'checkpoint': {'keep_best': False}},
  )
  assert cost.with_own_vocabulary(run_config.read(config)).model.vocab_size == 5
  workdir = tmp_path / 'run'
  train(config, workdir)
  assert 'all copied' in capsys.readouterr().out
  assert tokenizers.load(workdir / 'tokenizer.json').characters == '\n abc'
  # The run needs neither the other, nor a guess, to be read and continued.
  shutil.rmtree(letters)
  longer_config = merge(config, {'total_steps': 2})
  setup.begin(set_up(longer_config, workdir, resume=True), finetuning.initial)
  assert 'going on from the checkpoint of step 1' in capsys.readouterr().out
  generate.main(['--workdir', str(workdir), '--prompt', 'ab', '--num_tokens=3'])
  assert set(capsys.readouterr().out) <= set('\n abc')
  # Whoever loads its data has its tokens: 'b' of five letters, not of four.
  run = whole_run.read(workdir)
  rows = calibration.batches(run, 1)[0]['tokens']
  assert set(rows.reshape(-1).tolist()) <= {0, 1, 2, 3, 4}
  assert data.load(run.options.data).tokenizer.identity == LETTERS.identity


def test_a_run_goes_on_with_its_own_where_the_file_is_gone(tmp_path):
  file = tmp_path / 'letters.json'
  LETTERS.save(file)
  config = merge(
    tiny.config(data=texts(tmp_path / 'text', 'a cab'), sample={'prompt': 'a'}),
    {'data': {'tokenizer': {'kind': 'file', 'file': {'path': str(file)}}}},
  )
  folder = tmp_path / 'run'
  first = set_up(config, folder)
  workdir_lib.claim(folder, config)
  first.dataset.tokenizer.save(folder / workdir_lib.TOKENIZER)
  file.unlink()
  resumed = set_up(config, folder)
  assert resumed.dataset.digest == first.dataset.digest


def test_a_config_may_choose_and_then_has_to_fit(letters, tmp_path):
  config = config_from(letters, texts(tmp_path / 'other', 'a cab'))
  config = merge(config, {'init_from': {'keep_tokenizer': False}})
  run = set_up(config, tmp_path / 'run')
  with pytest.raises(
    ValueError, match=r'tokens of chars:.* of bytes; to take its tokenizer'
  ):
    setup.begin(run, finetuning.initial)
  file_tokenizer = {'kind': 'file', 'file': {'path': str(letters)}}
  config = merge(config, {'data': {'tokenizer': file_tokenizer}})
  run = set_up(config, tmp_path / 'run')
  assert 'all copied' in finetuning.initial(run)[1]


def test_the_task_ends_inputs_anew(letters, tmp_path):
  # A run on pairs had an EOS after inputs; a language model has none.
  folders.write(
    tmp_path / 'pairs',
    tokenizer=tokenizers.Extended(LETTERS, ['<eos>'], end_inputs=True),
    data={'task': {'kind': 'prefix_lm'}},
  )
  config = config_from(tmp_path / 'pairs', texts(tmp_path / 'other', 'a cab'))
  run = set_up(config, tmp_path / 'run')
  assert run.dataset.tokenizer.encode_inputs('ab').tolist() == [2, 3]
  assert (run.dataset.vocab_size, run.dataset.tokenizer.eos_id) == (6, 5)
  assert 'all copied' in finetuning.initial(run)[1]
  # The run itself adds its EOS to the same five letters once more, so that its
  # documents stay what they were.
  described = trained.read(tmp_path / 'pairs')
  assert described.data.tokenizer.known_vocab_size() == 5


def test_a_model_made_of_such_a_run_keeps_it_too(letters, tmp_path):
  text = texts(tmp_path / 'other', 'x yz')  # of as many characters
  tuned = tmp_path / 'tuned'
  overrides = {'tokenizer': {'kind': 'chars'}, **text}
  source = {'workdir': str(letters)}
  (params,) = folders.write(
    tuned, tokenizer=LETTERS, data=overrides, init_from=source
  ).values()
  made = trained.derive(tuned, tmp_path / 'made', params)
  config = run_config.from_file(made / 'config.json')
  config = merge(config, {'data': texts(tmp_path / 'more', 'ba ab')})
  run = set_up(config, made, resume=True)
  assert run.dataset.tokenizer.identity == LETTERS.identity
  # Tokens of other characters would be learned by embeddings of these.
  config = layered(run_config.RunConfig, config, {'data': overrides})
  run = set_up(config, made, resume=True)
  with pytest.raises(ValueError, match=r'of chars:.*, the data is of chars:'):
    setup.begin(run)
  assert tokenizers.load(made / 'tokenizer.json').identity == LETTERS.identity
