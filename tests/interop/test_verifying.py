"""Findings and needs of `verify`; `test_parity.py` has the rest."""

import json
import shutil

import numpy as np
import pytest

from moe_jax.interop import verifying
from tests.interop import oracle
from tests.interop.test_parity import LONGROPE

SMALL = dict(
  num_layers=1,
  num_sparse_encoder_layers=1,
  num_decoder_layers=1,
  num_sparse_decoder_layers=1,
)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  folder = tmp_path_factory.mktemp('switch')
  model = oracle.make('switch_transformers', **SMALL)
  return folder, oracle.write(model, folder)


def verify(pair, tmp_path, drop=(), **changes):
  folder, expected = pair
  changed = {**expected, **changes}
  path = tmp_path / 'expected.npz'
  np.savez(path, **{k: v for k, v in changed.items() if k not in drop})
  return verifying.verify(folder, path)


def test_a_logit_that_is_off(pair, tmp_path):
  logits = pair[1]['logits'].copy()
  logits[1, 2, 3] += 2e-4
  verdict = verify(pair, tmp_path, logits=logits)
  assert not verdict.good and verdict.first_difference is None
  assert 1.9e-4 < verdict.largest_difference < 2.1e-4
  assert verdict.num_positions == 21


def test_a_token_that_differs(pair, tmp_path):
  greedy = pair[1]['greedy'].copy()
  our_token = int(greedy[2, 4])
  greedy[2, 4] = greedy[1, 6] = 52
  verdict = verify(pair, tmp_path, greedy=greedy)
  assert not verdict.good and verdict.largest_difference <= verifying.BOUND
  # In the three rows three positions agree before the first difference.
  assert verdict.first_difference == (2, 4, our_token, 52)
  assert verdict.num_equal_tokens == 9


@pytest.mark.slow
def test_what_is_masked_is_not_compared_and_no_number_agrees(pair, tmp_path):
  mask = np.ones((oracle.B, oracle.T), np.int64)
  mask[:, -1] = 0
  logits = pair[1]['logits'].copy()
  logits[:, -1] = np.nan
  verdict = verify(pair, tmp_path, logits=logits, decoder_attention_mask=mask)
  assert verdict.good and verdict.num_positions == 18
  logits[0, 0, 0] = np.nan
  verdict = verify(pair, tmp_path, logits=logits)
  assert verdict.largest_difference == float('inf') and not verdict.good


@pytest.mark.parametrize(
  ('drop', 'changes', 'message'),
  [
    (('logits', 'greedy'), {}, r"\['logits', 'greedy'\] are missing; need"),
    (
      (),
      dict(logits=np.zeros((3, 7, 52)), attention_mask=np.ones((3, 10))),
      r'mask is \[3, 10\](.|\n)*logits is ',
    ),
    ((), dict(greedy=np.ones((3, 9))), 'does not begin with the decoder.s sta'),
  ],
)
def test_what_does_not_fit(drop, changes, message, pair, tmp_path):
  with pytest.raises(ValueError, match=message):
    verify(pair, tmp_path, drop, **changes)


def test_a_greedy_row_that_becomes_long_is_refused(tmp_path):
  # Beyond 12 positions LongRoPE turns the keys in the cache otherwise.
  scaling = LONGROPE | dict(original_max_position_embeddings=12)
  oracle.make('phimoe', rope_parameters=scaling).save_pretrained(tmp_path)
  arrays = dict(
    input_ids=np.ones((2, 9), int),
    attention_mask=np.arange(9) < np.array([[8], [9]]),
    logits=np.zeros((2, 9, 53)),
  )
  for length, message in (
    (13, "'greedy' does not begin"),
    (14, 'reads 13 tokens, 8 of them at once, and crosses original_len=12'),
  ):
    greedy = np.zeros((1, length), int)
    with pytest.raises(ValueError, match=message):
      verify((tmp_path, arrays), tmp_path, greedy=greedy)


def test_options_of_generation_that_are_not_reproduced(pair, tmp_path):
  folder, expected = pair
  shutil.copytree(folder, tmp_path / 'beams')
  path = tmp_path / 'beams' / 'generation_config.json'
  path.write_text(json.dumps(dict(num_beams=4, repetition_penalty=1.5)))
  with pytest.raises(ValueError, match=r'num_beams=4\n  repetition_penalty'):
    verify((tmp_path / 'beams', expected), tmp_path)
