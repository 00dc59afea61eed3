"""A user's own source, tokenizer and task are used if a config names them."""

import json
import sys

import pytest

from moe_jax.config import read_options, section_of
from moe_jax.data import DataOptions, load, tokenizers
from tests.data import own_kinds

MODULE = 'tests.data.own_kinds'


def section(**kinds):
  config = section_of(DataOptions)
  for name, kind in kinds.items():
    config[name].kind = f'{MODULE}:{kind}'
  config.seq_len = 4
  return config


def test_a_users_own_source_tokenizer_and_task(tmp_path):
  config = section(
    source='Counting', tokenizer='WordsOptions', task='Backwards'
  )
  config.source.custom = {'last': 3}
  config.task.custom = {'twice': True}
  config.cache_dir = str(tmp_path)
  options = read_options(DataOptions, config)
  assert options.source == own_kinds.Counting(3)
  assert read_options(DataOptions, section_of(options)) == options
  for _ in range(2):  # first fresh, then from the cache
    dataset = load(options)
    # The documents '1', '1 2' and '1 2 3', twice, are read from the end: 3 2 1
    # 2 1 1.
    row = dataset.splits['train'][0]
    assert dataset.tokenizer.decode(row['tokens']) == '3 2 1 2'
    assert dataset.tokenizer.decode(row['targets']) == '2 1 2 1'
    assert len(dataset.splits['train']) == 3  # 11 predictions, 4 in a row
  description = dataset.describe()
  assert 'data: counting to 3, 6 documents' in description
  assert '\ntask: backwards\n' in description and 'V=3' in description


def test_each_alone_beside_ours(tmp_path):
  config = section(source='Counting')
  config.cache_dir = str(tmp_path)
  dataset = load(read_options(DataOptions, config))
  assert dataset.splits['train'][0]['tokens'].tolist() == [49, 256, 49, 32]
  config = section(source='Counting', tokenizer='WordsOptions')
  config.task.kind = 'prefix_lm'
  config.cache_dir = str(tmp_path)
  dataset = load(read_options(DataOptions, config))
  assert dataset.vocab_size == 4  # three words and an end of text


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'last': 0}, 'source.custom.last=0 must be at least 1'),
    ({'lst': 2}, "'source.custom.lst'; did you mean 'source.custom.last'"),
  ],
)
def test_its_options_are_checked(changes, message):
  config = section(source='Counting')
  config.source.custom = changes
  with pytest.raises(ValueError, match=message):
    read_options(DataOptions, config)


@pytest.mark.parametrize(
  ('kinds', 'message'),
  [
    ({'source': 'Words'}, 'does not extend .*SourceOptions'),
    ({'tokenizer': 'Words'}, 'does not extend .*TokenizerOptions'),
    ({'task': 'Gone'}, "has no 'Gone'"),
  ],
)
def test_what_is_no_such_kind_is_refused(kinds, message):
  with pytest.raises(ValueError, match=message):
    read_options(DataOptions, section(**kinds))


def test_a_file_never_imports_a_users_tokenizer(tmp_path, monkeypatch):
  path = tmp_path / 'tokenizer.json'
  own_kinds.Words('ab').save(path)
  assert json.loads(path.read_text())['kind'] == f'{MODULE}:Words'
  assert tokenizers.load(path).decode([1, 0]) == 'b a'
  (tmp_path / 'never_read.py').write_text('raise RuntimeError("imported")\n')
  monkeypatch.syspath_prepend(tmp_path)
  path.write_text(path.read_text().replace(MODULE, 'never_read'))
  with pytest.raises(ValueError, match="unknown tokenizer kind 'never_read:Wo"):
    tokenizers.load(path)
  assert 'never_read' not in sys.modules
