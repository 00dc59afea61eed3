"""The text of a trace: its tokens, their experts, and the section on a page."""

import numpy as np
import pytest

from moe_jax.analysis import route_texts, traces
from moe_jax.analysis.traces import Header, LayerChoices, LayerInfo, Record
from moe_jax.data import tokenizers

TOKENIZER = tokenizers.Bytes()
HEADER = Header(
  {1: LayerInfo(4, 1), 3: LayerInfo(4, 2, by_expert=True)},
  batch_size=2,
  seq_len=6,
  vocab_size=TOKENIZER.vocab_size,
  tokenizer=TOKENIZER.identity,
)


def record(step=0, batch=0, kind='valid', texts=('a<\u00e9\n', 'b\0')):
  """Rows of text, padded in front, with the experts 0, 1, 2, 3, 0 and so on."""
  tokens, documents = np.zeros((2, 2, 6), np.int32)
  for row, text in enumerate(texts):
    ids = TOKENIZER.encode(text)
    tokens[row, 6 - len(ids) :], documents[row, 6 - len(ids) :] = ids, 1
  positions = np.tile(np.arange(6, dtype=np.int32), (2, 1))
  expert = np.where(documents > 0, positions % 4, -1)[..., None]
  expert_pairs = np.concatenate([(expert + 1) % 4, expert], -1)
  gate = np.broadcast_to(np.array([0.25, 0.5], np.float32), expert_pairs.shape)
  layers = {
    1: LayerChoices(expert, np.ones(expert.shape, np.float32), expert >= 0),
    3: LayerChoices(expert_pairs, gate, expert_pairs >= 0),
  }
  return Record(kind, step, batch, tokens, positions, documents, layers)


def test_a_row_has_the_text_and_the_first_choice_of_its_real_tokens():
  row = route_texts.read_row(HEADER, record(), tokenizer=TOKENIZER)
  assert row.texts == ['a', '<', '', '\u00e9', '\n']
  assert row.experts[1].tolist() == [1, 2, 3, 0, 1]
  # If experts choose, the first choice is the one with the largest gate.
  assert row.experts[3].tolist() == [1, 2, 3, 0, 1]
  # A page cannot have the character of the number 0.
  row = route_texts.read_row(HEADER, record(), 1, tokenizer=TOKENIZER)
  assert row.texts == ['b', '\ufffd']
  row = route_texts.read_row(HEADER, record(), 1, tokenizer=None, most=1)
  assert row.texts == [f'{TOKENIZER.encode("b")[0]} ']


def test_the_section_has_the_last_step_and_escapes_its_text(tmp_path):
  later = record(1, texts=('<b>', ''))
  traces.write(tmp_path, HEADER, [record(), later, record(1, 1)])
  trace = traces.read(tmp_path)
  section = route_texts.section(trace, 'valid', range(9), TOKENIZER)
  assert list(section.texts) == ['Layer 1', 'Layer 3']
  text = section.texts['Layer 1']
  assert text.count('<pre') == 1 and text.count('<span') == 3
  assert '&lt;<sub>3</sub>' in text and '<b>' not in text
  assert "of 'valid' at step 1." in section.sentences[0]
  images = tokenizers.ClassNames(['cat'], (8, 8, 1))
  assert route_texts.section(trace, 'valid', range(9), images) is None


def test_a_section_is_short(tmp_path, monkeypatch):
  header = Header({1: LayerInfo(4, 1)}, 2, 400, vocab_size=300)
  shape = 2, 400, 1
  layers = {
    1: LayerChoices(np.zeros(shape, int), np.ones(shape), np.ones(shape, bool))
  }
  ones = np.ones((2, 400), np.int32)
  traces.write(
    tmp_path,
    header,
    [Record('train', 0, 0, ones, ones, ones, layers)],
  )
  section = route_texts.section(traces.read(tmp_path), 'train', range(9), None)
  assert section.texts['Layer 1'].count('<span') == 600


def test_the_tokenizer_is_that_of_the_run(tmp_path):
  trace = str(tmp_path / 'trace')
  tokenizer, reason = route_texts.find_tokenizer(trace, HEADER)
  assert tokenizer is None and 'there is no' in reason
  with pytest.raises(ValueError, match=r'there is no .*tokenizer\.json'):
    route_texts.find_tokenizer(trace, HEADER, str(tmp_path))
  TOKENIZER.save(tmp_path / 'tokenizer.json')
  tokenizer, reason = route_texts.find_tokenizer(trace, HEADER)
  assert tokenizer.identity == TOKENIZER.identity and not reason
  tokenizer, reason = route_texts.find_tokenizer(
    'elsewhere', HEADER, str(tmp_path)
  )
  assert tokenizer.identity == TOKENIZER.identity and not reason
  tokenizers.Chars(('a', 'b')).save(tmp_path / 'tokenizer.json')
  tokenizer, reason = route_texts.find_tokenizer(trace, HEADER)
  assert tokenizer is None and 'the trace is of bytes' in reason
