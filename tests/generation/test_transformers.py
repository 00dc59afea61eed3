"""Greedy and beam search give transformers' tokens, from one checkpoint.

Greedy tokens of every family, by `verify`, are in `tests/interop`.
"""

import numpy as np
import pytest

from moe_jax import generation, interop
from tests.interop import oracle

torch = pytest.importorskip('torch')

# Prompts have different lengths, and none is one to which we pad.
PROMPTS = [[7, 3, 19, 11, 23], [5, 29], [13, 37, 17]]
NEW, START = 13, 2
MODELS = {
  'mixtral': dict(pad_token_id=0, sliding_window=7),
  # There are slots for 0.4 of a step's tokens, for which rows compete.
  'nllb-moe': dict(
    pad_token_id=1,
    decoder_start_token_id=START,
    moe_eval_capacity_token_fraction=0.4,
  ),
}


def padded(model):
  """Prompts as tensors, padded at the start, or for an encoder at the end."""
  side = 'right' if model.config.is_encoder_decoder else 'left'
  rows = torch.nn.utils.rnn.pad_sequence(
    [torch.tensor(prompt) for prompt in PROMPTS], True, -1, padding_side=side
  )
  mask = (rows >= 0).long()
  return torch.where(rows < 0, model.config.pad_token_id, rows), mask


@pytest.mark.slow
@pytest.mark.parametrize('kind', MODELS)
def test_tokens_and_beams_are_theirs(kind, tmp_path):
  options = dict(eos_token_id=None, bos_token_id=None, **MODELS[kind])
  # With this seed the greedy tokens of models repeat themselves least.
  their_model = oracle.make(kind, seed=7, **options)
  their_model.save_pretrained(tmp_path)
  model, variables = generation.prepare(*interop.load(tmp_path)[1:])
  ids, mask = padded(their_model)
  prompt_len = 1 if model.has_encoder else ids.shape[1]

  def generate(**options):
    with torch.no_grad():
      return their_model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options
      )

  endless = generate(eos_token_id=None)[:, prompt_len:].tolist()
  # Models must not always give the same answer.
  assert len(set().union(*endless)) > 5
  start = {'start_id': START} if model.has_encoder else {}
  args = model, variables, PROMPTS
  greedy = generation.generate(*args, num_tokens=NEW, **start)
  assert greedy.tokens.tolist() == endless
  # The stop token is one that a row reaches halfway. Where rows compete for
  # slots, padding behind an ended row competes too in transformers; so no row
  # ends there.
  stop = None if model.has_encoder else endless[0][NEW // 2]
  options = dict(num_beams=4, length_penalty=-0.7)
  their_beams = generate(
    eos_token_id=stop,
    num_return_sequences=3,
    return_dict_in_generate=True,
    output_scores=True,
    **options,
  )
  rows = [row[prompt_len:].tolist() for row in their_beams.sequences]
  expected = [r[: r.index(stop) + 1] if stop in r else r for r in rows]
  stop_ids = [] if stop is None else [stop]
  beams = generation.beam_search(
    *args, num_tokens=NEW, num_return=3, stop_ids=stop_ids, **options, **start
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
