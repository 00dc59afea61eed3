"""Tokenizers of our own runs are read by transformers with the same ids."""

import json

import pytest
import transformers
from tokenizers import processors

from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import extra_ids
from moe_jax.data.tokenizers.json_tokenizer import SpecialTokens
from moe_jax.interop import export_run
from tests.data.tokenizers import models

TEXTS = [*models.TEXTS, '<eos> a', 'a<eos>b <extra_id_0>']
LETTERS = tokenizers.Chars(''.join(TEXTS))
MERGED = tokenizers.TrainedOptions('bpe', 300).fit(models.WORDS)


def with_eos(base, **options):
  return extra_ids.extend(base, end_inputs=True, **options)


@pytest.mark.parametrize(
  'tokenizer',
  [
    tokenizers.Bytes(),
    LETTERS,
    MERGED,
    with_eos(tokenizers.Bytes()),
    with_eos(LETTERS),
    with_eos(MERGED, num_sentinels=2, modes=('S',)),
  ],
  ids=lambda t: t.identity,
)
def test_ids_are_equal_there_and_back(tokenizer, tmp_path):
  export_run.write_tokenizer(tokenizer, tmp_path)
  hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  size_and_end = tokenizer.vocab_size, tokenizer.eos_id
  assert (len(hf_tokenizer), hf_tokenizer.eos_token_id) == size_and_end
  reread = tokenizers.read(tmp_path)
  assert (reread.vocab_size, reread.eos_id) == size_and_end
  for text in TEXTS:
    ids = tokenizer.encode_inputs(text).tolist()
    assert hf_tokenizer(text).input_ids == ids
    assert reread.encode(text).tolist() == tokenizer.encode(text).tolist()
    document = tokenizer.encode(text)
    assert hf_tokenizer.decode(document) == tokenizer.decode(document) == text


TEMPLATE = processors.TemplateProcessing
BEGIN = TEMPLATE(single='<s> $A', special_tokens=[('<s>', 0)])
BOTH = TEMPLATE(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)])
OTHER_END = processors.RobertaProcessing(('[SEP]', 2), ('<s>', 0))
BYTES = processors.ByteLevel()


@pytest.mark.parametrize('end_inputs', [True, False])
@pytest.mark.parametrize(
  ('own', 'begin', 'end'),
  [
    (None, [], []),
    (BYTES, [], []),
    (BEGIN, [0], []),
    (processors.Sequence([BYTES, BEGIN]), [0], []),
    (BOTH, [0], []),
    (OTHER_END, [0], [2]),
  ],
  ids=['none', 'bytes', 'begin', 'sequence', 'both', 'other'],
)
def test_inputs_end_as_the_task_ends_them(
  own, begin, end, end_inputs, tmp_path
):
  model = models.byte_level('<s>', '</s>', '[SEP]')
  if own is not None:
    model.post_processor = own
  base = tokenizers.Json(model.to_str(), SpecialTokens(bos=0, eos=(1,)))
  tokenizer = extra_ids.extend(base, end_inputs=end_inputs)
  line = export_run.write_tokenizer(tokenizer, tmp_path)
  hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert (' in an EOS' in line) == (end_inputs != (own is BOTH))
  for text in models.WORDS:
    ids = tokenizer.encode_inputs(text).tolist()
    assert hf_tokenizer(text).input_ids == ids
    expected = [*begin, *base.encode(text), *end, *[1] * end_inputs]
    assert ids == expected


def test_characters_by_hand(tmp_path):
  export_run.write_tokenizer(tokenizers.Chars('b a\n'), tmp_path)
  hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert hf_tokenizer('a b\n').input_ids == [2, 1, 3, 0]
  with pytest.raises(Exception, match='Missing'):
    hf_tokenizer('x')


def test_ids_that_are_not_the_next_are_left_out(tmp_path):
  # A model may have more rows than tokens; a task's ids come after the rows.
  padded = tokenizers.Json(MERGED.model.to_str(), SpecialTokens(vocab_size=512))
  tokenizer = with_eos(padded, num_sentinels=1)
  assert tokenizer.eos_id == 512
  line = export_run.write_tokenizer(tokenizer, tmp_path)
  assert 'without the ids that the task added' in line
  ids = tokenizers.read(tmp_path).encode('the')
  assert ids.tolist() == MERGED.encode('the').tolist()
  # The name of an id that is left out is left out, too.
  stored_config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert 'eos_token' not in stored_config


@pytest.mark.parametrize('base', [models.unigram(), models.bpe()])
def test_sentencepiece_goes_out_as_its_file(base, tmp_path):
  tokenizer = tokenizers.SentencePiece(base)
  assert 'tokenizer.model' in export_run.write_tokenizer(tokenizer, tmp_path)
  assert tokenizers.read(tmp_path).identity == tokenizer.identity
