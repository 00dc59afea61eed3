"""Prompts of questions, by hand, in bytes and in tokens of words."""

import json

import numpy as np
import tokenizers as hf

from moe_jax.data import Item, LmTask, Seq2SeqTask, tokenizers
from moe_jax.data.layouts import DecoderLayout, EncoderDecoderLayout
from moe_jax.data.tokenizers.extra_ids import extend
from moe_jax.evaluation.prompts import Asker

EOS = 256
SUM = Item('1+1', ('1', '2', '33'), 1)
SHOTS = [Item('2+2', ('4', '5'), 0), Item('3+3', ('5', '6'), 1)]


def asker(seq_len):
  return Asker(LmTask(), tokenizers.Bytes(), DecoderLayout(seq_len), '=')


def pairs_asker(layout, tokenizer=None):
  """The prompts of a run on pairs."""
  tokenizer = extend(tokenizer or tokenizers.Bytes(), end_inputs=True)
  return Asker(Seq2SeqTask(), tokenizer, layout, '=')


def texts(encoded):
  """Pairs (prompt, answer) as text, with '$' for the end of text."""

  def text(ids):
    return ''.join('$' if i == EOS else chr(i) for i in ids)

  return [(text(e.inputs), text(e.targets)) for e in encoded.examples]


def test_a_language_model_goes_on_from_the_prompt():
  encoded = asker(30)(SUM, SHOTS)
  prompt = '2+2=4\n\n3+3=6\n\n1+1='
  assert texts(encoded) == [(prompt, '1'), (prompt, '2'), (prompt, '33')]
  assert encoded[1:3] == (2, False)


def test_pairs_are_inputs_and_targets_that_end():
  expected = [('3+3=6\n\n1+1$', a) for a in ('1$', '2$', '33$')]
  for layout in (DecoderLayout(40), EncoderDecoderLayout(20, 5, EOS)):
    assert texts(pairs_asker(layout)(SUM, SHOTS[1:])) == expected


def test_examples_without_room_are_left_out_the_first_ones_first():
  # Two examples of 7 bytes and the prompt of 4 are 18 tokens. The answer '33'
  # has 2, of which the last is never an input: a row of 19 has room for all.
  assert asker(19)(SUM, SHOTS).num_shots == 2
  encoded = asker(18)(SUM, SHOTS)
  assert encoded.num_shots == 1 and not encoded.is_cut
  assert texts(encoded)[2] == ('3+3=6\n\n1+1=', '33')
  # An encoder of 10 has room for the prompt and its end of text only, one of 11
  # also for an example of 7.
  for room, num_shots in ((10, 0), (11, 1)):
    layout = EncoderDecoderLayout(room, 5, EOS)
    assert pairs_asker(layout)(SUM, SHOTS).num_shots == num_shots


def test_an_example_does_not_take_the_room_of_an_answer():
  # The example of 7 bytes and the prompt of 4 are half of a row, to which
  # inputs may be cut; the answer of 15 has the other half and 4 tokens more.
  long_item = SUM._replace(answers=('1', '2' * 15))
  encoded = asker(21)(long_item, SHOTS[1:])
  assert texts(encoded)[1] == ('1+1=', '2' * 15)
  assert encoded[1:3] == (0, False)
  assert asker(25)(long_item, SHOTS[1:])[1:3] == (1, False)
  # A decoder of 5 cuts the answer with and without the example before it.
  layout = EncoderDecoderLayout(20, 5, EOS)
  assert pairs_asker(layout)(long_item, SHOTS[1:])[1:3] == (1, True)


def test_a_prompt_that_is_too_long_keeps_what_matters():
  long_item = Item('abcdefgh', ('x', 'yz'), 0)
  encoded = asker(6)(long_item, SHOTS)
  # If the answer continues the prompt, a cut prompt keeps its end: 7 tokens
  # less those of the answer.
  assert texts(encoded) == [('defgh=', 'x'), ('efgh=', 'yz')]
  assert encoded[1:3] == (0, True)
  # An encoder's prompt keeps its beginning and gets an end of text, as in
  # training; answers lose their end.
  encoded = pairs_asker(EncoderDecoderLayout(5, 2, EOS))(long_item, SHOTS)
  assert texts(encoded) == [('abcd$', 'x$'), ('abcd$', 'yz')]
  assert encoded.is_cut


def test_inputs_are_cut_as_in_training():
  ids, layout = np.array([1, 2, 3, EOS]), DecoderLayout(9)
  tokenizer = pairs_asker(layout).tokenizer
  for keep_end, expected in ((False, [1, 2, EOS]), (True, [2, 3, EOS])):
    ask = Asker(Seq2SeqTask(keep_end=keep_end), tokenizer, layout, '')
    assert ask.cut_inputs(ids, 3).tolist() == expected
    assert ask.cut_inputs(ids, 4).tolist() == ids.tolist()
  assert asker(9).cut_inputs(ids[:3], 2).tolist() == [1, 2]


def test_words_that_begin_with_a_space_are_the_answers():
  vocabulary = {t: i for i, t in enumerate(['q', 'y', 'n', 'Ġ', 'Ġy', 'Ġn'])}
  model = hf.models.BPE(vocabulary, [('Ġ', 'y'), ('Ġ', 'n')])
  words = hf.Tokenizer(model)
  words.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer = tokenizers.Json(json.dumps(json.loads(words.to_str())))
  ask = Asker(LmTask(), tokenizer, DecoderLayout(9), ' ')
  encoded = ask(Item('q', ('y', 'n'), 0), [])
  # The space before an answer belongs to the token of the answer.
  assert [e.inputs.tolist() for e in encoded.examples] == [[0], [0]]
  assert [e.targets.tolist() for e in encoded.examples] == [[4], [5]]
