"""Special tokens, prompts and conversations equal those of transformers."""

import numpy as np
import pytest
import tokenizers as hf
from transformers import PreTrainedTokenizerFast

from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import chat
from tests.data.tokenizers import models

SPECIAL = ['<pad>', '</s>', '<unk>', '<s>', 'eng_Latn', 'fra_Latn']
SENTINELS = ['<extra_id_2>', '<extra_id_1>', '<extra_id_0>']  # as in T5
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role not in ['user', 'assistant'] %}
{{ raise_exception('no role ' + m.role) }}
{% endif %}
[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}
{%- if loop.index0 == 6 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}[assistant]{{ stop | default('') }}{% endif %}"""
CHAT = [
  {'role': 'user', 'content': 'the cat'},
  {'role': 'assistant', 'content': 'a hat </s> of'},
  {'role': 'user', 'content': 'the end'},
]


def model():
  """A byte-level BPE model with the post-processor of NLLB."""
  tokenizer = models.byte_level(*SPECIAL, *SENTINELS, unknown='<unk>')
  ids = {name: tokenizer.token_to_id(name) for name in ('eng_Latn', '</s>')}
  tokenizer.post_processor = hf.processors.TemplateProcessing(
    single='eng_Latn $A </s>', special_tokens=list(ids.items())
  )
  return tokenizer


def open_tokenizer(path):
  return tokenizers.JsonOptions(str(path)).fit([])


@pytest.fixture(scope='module')
def theirs():
  names = dict(bos_token='<s>', eos_token='</s>', pad_token='<pad>')
  names |= dict(unk_token='<unk>', chat_template=TEMPLATE)
  return PreTrainedTokenizerFast(tokenizer_object=model(), **names)


@pytest.fixture(scope='module')
def folder(theirs, tmp_path_factory):
  """A folder with the tokenizer, written by transformers."""
  path = tmp_path_factory.mktemp('tokenizer')
  theirs.save_pretrained(path)
  return path


def test_prompts_are_those_of_transformers(folder, theirs):
  ours = open_tokenizer(folder)
  for text in ('the cat', '', 'a</s>b <extra_id_1> é'):
    assert ours.encode_inputs(text).tolist() == theirs(text).input_ids
  # A document is encoded unlike a prompt: no special token is added, and none
  # is read from its text.
  document = ours.encode('a</s>b')
  assert not set(document) & set(range(len(SPECIAL)))
  assert ours.decode(document) == 'a</s>b'


def test_special_tokens_by_hand(folder, tmp_path):
  tokenizer = open_tokenizer(folder)
  # All comes back from the folder of a run.
  tokenizer.save(tmp_path / 'tokenizer.json')
  for ours in (tokenizer, tokenizers.load(tmp_path / 'tokenizer.json')):
    assert (ours.pad_id, ours.eos_id, ours.bos_id) == (0, 1, 3)
    assert (ours.start_id, ours.forced_bos_id) == (1, None)
    assert ours.eos_ids == (1,)
    assert ours.sentinel_ids == (8, 7, 6)
    assert ours.token_id('fra_Latn') == 5
    assert ours.special == tokenizer.special
    assert ours.identity == tokenizer.identity
    assert [*ours.encode_chat(CHAT)] == [*tokenizer.encode_chat(CHAT)]
  with pytest.raises(ValueError, match="unknown token 'fra_Latin'; did you me"):
    tokenizer.token_id('fra_Latin')


def test_configs_come_before_names(folder, tmp_path):
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  (tmp_path / 'config.json').write_text(
    '{"eos_token_id": 9, "pad_token_id": 2, "decoder_start_token_id": 0, '
    '"vocab_size": 321}'
  )
  (tmp_path / 'generation_config.json').write_text(
    '{"eos_token_id": [7, 1], "pad_token_id": null, "forced_bos_token_id": 5}'
  )
  tokenizer = open_tokenizer(tmp_path)
  assert (tokenizer.eos_ids, tokenizer.eos_id) == ((7, 1), 7)
  assert (tokenizer.pad_id, tokenizer.bos_id) == (2, 3)
  assert (tokenizer.start_id, tokenizer.forced_bos_id) == (0, 5)
  # A model may have more rows than the tokenizer has tokens: their ids are
  # valid and have no text.
  assert tokenizer.vocab_size == 321
  assert tokenizer.decode([320, *tokenizer.encode('cat')]) == 'cat'
  assert tokenizer.token_name(320) == '<320>'


def test_the_file_alone_stays_what_it_was(folder):
  from_file = open_tokenizer(folder / 'tokenizer.json')
  assert from_file.eos_id == 1  # '</s>' is one of the well-known names
  assert (from_file.bos_id, from_file.pad_id) == (None, None)
  assert 'special' not in from_file.to_json()
  from_folder = open_tokenizer(folder)
  # Another end of text makes other data.
  assert from_file.identity != from_folder.identity
  with pytest.raises(ValueError, match='without a chat template'):
    from_file.encode_chat(CHAT)


@pytest.mark.parametrize('add_prompt', [True, False])
def test_conversations_are_those_of_transformers(folder, theirs, add_prompt):
  ours = open_tokenizer(folder)
  for variables in ({}, {'stop': '</s>'}):
    expected = theirs.apply_chat_template(
      CHAT, add_generation_prompt=add_prompt, return_dict=False, **variables
    )
    ids = ours.encode_chat(CHAT, add_generation_prompt=add_prompt, **variables)
    assert ids.dtype == np.int32
    assert ids.tolist() == expected
  with pytest.raises(ValueError, match='chat template: no role system'):
    ours.encode_chat([{'role': 'system', 'content': 'x'}])


def test_languages(folder, theirs):
  ours = open_tokenizer(folder)
  english = theirs('the cat').input_ids
  assert english[0] == 4
  french = ours.encode_inputs('the cat', language='fra_Latn')
  assert french.tolist() == [5, *english[1:]]
  # A language that the text itself names is kept; only the post-processor's is
  # replaced.
  spelled_ids = ours.encode_inputs('eng_Latn', language='fra_Latn').tolist()
  assert spelled_ids == [5, 4, 1]
  with pytest.raises(ValueError, match="unknown token 'fr'"):
    ours.encode_inputs('the cat', language='fr')
  bare = model()
  bare.post_processor = hf.processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 1)]
  )
  with pytest.raises(ValueError, match='adds no language code'):
    tokenizers.Json(bare.to_str()).encode_inputs('a', language='fra_Latn')


@pytest.mark.slow
def test_a_template_without_end_is_stopped():
  forever = '{% for a in range(99999) %}' * 3 + '{% endfor %}' * 3
  limits = chat.Limits(cpu_seconds=9, wall_seconds=0.2)
  with pytest.raises(ValueError, match=r'no answer in 0\.2 s'):
    chat.render(forever, [], names={}, limits=limits)
  assert chat.render('{{ 1 + 1 }}', [], names={}) == '2'


def test_values_that_are_not_of_json_are_refused():
  for value in (object(), {1, 2}, b'x', len):
    with pytest.raises(ValueError, match='have to be JSON values'):
      chat.render('x', [], names={}, tools=[value])


def test_a_text_that_cannot_be_encoded_is_named_among_others():
  model = hf.Tokenizer(hf.models.WordLevel({'a': 0, 'b': 1}))
  model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  tokenizer = tokenizers.Json(model.to_str())
  with pytest.raises(ValueError, match="cannot encode 'a strange text'"):
    tokenizer.encode_batch(['a b ' * 40, 'a strange text', 'b'])


def test_truncation_padding_and_unusual_names_of_an_end_are_ignored():
  model = models.byte_level('<stop>')
  model.enable_truncation(2)
  model.enable_padding(length=9)
  tokenizer = tokenizers.Json(model.to_str())
  assert tokenizer.decode(tokenizer.encode('a longer text')) == 'a longer text'
  assert tokenizer.eos_id is None


def test_names_of_tokens_by_hand():
  tokenizer = tokenizers.Json(models.byte_level('</s>').to_str())
  assert (tokenizer.eos_id, tokenizer.token_name(0)) == (0, '<eos>')
  (the_id,) = tokenizer.encode('the')  # the most frequent word is one token
  assert tokenizer.token_name(the_id) == "'the'"
  half_id = tokenizer.encode('é')[0]
  assert '\ufffd' not in tokenizer.token_name(half_id)
  # The name of the end of text makes another tokenizer.
  other = tokenizers.Json(models.byte_level('<eos>').to_str())
  assert (other.eos_id, other.vocab_size) == (0, tokenizer.vocab_size)
  assert other.identity != tokenizer.identity
