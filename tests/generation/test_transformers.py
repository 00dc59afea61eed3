"""Beam search gives transformers' tokens, from one checkpoint.

Greedy tokens of every family are in `tests/interop/test_parity.py`.
"""

from typing import NamedTuple

import numpy as np
import pytest

from moe_jax import generation, interop, models

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.slow

V, PAD, START = 43, 0, 2
# Prompts have different lengths, and none is one to which we pad.
PROMPTS = [[7, 3, 19, 11, 23], [5, 29], [13, 37, 17]]
NEW = 13


def mixtral():
  return transformers.MixtralForCausalLM(
    transformers.MixtralConfig(
      vocab_size=V, hidden_size=24, intermediate_size=20, num_hidden_layers=3,
      num_attention_heads=4, num_key_value_heads=2, head_dim=6,
      num_local_experts=5, num_experts_per_tok=2, sliding_window=7,
      tie_word_embeddings=False, initializer_range=0.3,
      bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
    )
  )  # fmt: skip


def nllb():
  """NLLB with slots for 0.4 of a step's tokens, for which rows compete."""
  return transformers.NllbMoeForConditionalGeneration(
    transformers.NllbMoeConfig(
      vocab_size=V, d_model=24, encoder_layers=2, decoder_layers=2,
      encoder_attention_heads=4, decoder_attention_heads=3,
      encoder_ffn_dim=20, decoder_ffn_dim=28, num_experts=3,
      encoder_sparse_step=2, decoder_sparse_step=2, init_std=0.3,
      eos_token_id=None, pad_token_id=1, decoder_start_token_id=START,
      bos_token_id=None, moe_eval_capacity_token_fraction=0.4,
    )
  )  # fmt: skip


# With these seeds the greedy tokens of models repeat themselves least.
MAKERS = {'mixtral': (mixtral, 3), 'nllb': (nllb, 0)}


class Pair(NamedTuple):
  """A random model of transformers and ours with its weights."""

  their_model: torch.nn.Module
  model: models.Model
  variables: dict
  options: dict
  stop: int | None

  @property
  def stop_ids(self):
    return () if self.stop is None else (self.stop,)


@pytest.fixture(scope='module', params=MAKERS)
def pair(request, tmp_path_factory):
  make, seed = MAKERS[request.param]
  their_model = make().eval()
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, weights in their_model.named_parameters():
      if weights.ndim > 1:
        small = 'shared' in name or 'embed' in name
        weights.normal_(0, 0.05 if small else 0.5)
  folder = tmp_path_factory.mktemp(request.param)
  their_model.save_pretrained(folder)
  model, variables = generation.prepare(*interop.load(folder)[1:])
  options = {'start_id': START} if their_model.config.is_encoder_decoder else {}
  endless = their_tokens(their_model, *padded(their_model))
  # Models must not always give the same answer.
  assert len(set().union(*endless)) > 5
  # The stop token is one that a row reaches halfway. Where rows compete for
  # slots, padding behind an ended row competes too in transformers; so no row
  # ends there.
  stop = None if make is nllb else endless[0][NEW // 2]
  return Pair(their_model, model, variables, options, stop)


def padded(their_model):
  """Prompts as tensors, padded at the start, or for an encoder at the end."""
  front = not their_model.config.is_encoder_decoder
  length = max(map(len, PROMPTS))
  rows, mask = [], []
  for row in PROMPTS:
    fill = [their_model.config.pad_token_id] * (length - len(row))
    rows.append(fill + row if front else row + fill)
    flags = [0] * len(fill), [1] * len(row)
    mask.append(flags[0] + flags[1] if front else flags[1] + flags[0])
  return torch.tensor(rows), torch.tensor(mask)


def their_tokens(their_model, ids, mask):
  """New tokens of each row, without an end."""
  options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
  with torch.no_grad():
    sequences = their_model.generate(ids, attention_mask=mask, **options)
  prompt_len = 1 if their_model.config.is_encoder_decoder else ids.shape[1]
  return [row[prompt_len:].tolist() for row in sequences]


def until(stop, row):
  return row[: row.index(stop) + 1] if stop in row else row


def test_beams_are_theirs(pair):
  length_penalty = -0.7
  ids, mask = padded(pair.their_model)
  with torch.no_grad():
    their_beams = pair.their_model.generate(
      ids,
      attention_mask=mask,
      max_new_tokens=NEW,
      do_sample=False,
      eos_token_id=pair.stop,
      num_beams=4,
      num_return_sequences=3,
      length_penalty=length_penalty,
      return_dict_in_generate=True,
      output_scores=True,
    )
  prompt_len = 1 if pair.their_model.config.is_encoder_decoder else ids.shape[1]
  expected = [
    until(pair.stop, row[prompt_len:].tolist()) for row in their_beams.sequences
  ]
  beams = generation.beam_search(
    pair.model,
    pair.variables,
    PROMPTS,
    num_beams=4,
    num_return=3,
    num_tokens=NEW,
    length_penalty=length_penalty,
    stop_ids=pair.stop_ids,
    **pair.options,
  )
  new_tokens = [
    row[:n].tolist()
    for rows, lengths in zip(beams.tokens, beams.lengths)
    for row, n in zip(rows, lengths)
  ]
  assert new_tokens == expected
  np.testing.assert_allclose(
    beams.scores.reshape(-1), their_beams.sequences_scores, rtol=2e-4
  )
