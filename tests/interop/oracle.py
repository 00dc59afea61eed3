"""Small transformers models with random weights, and their outputs."""

import pathlib

import numpy as np
import pytest

from moe_jax.interop import ARCHITECTURES

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

B, S, T, N = 3, 11, 7, 9

CLASSES = {
  model_type: getattr(transformers, architecture.classes[0])
  for model_type, architecture in ARCHITECTURES.items()
  if not architecture.needs_code
}
_DECODER = dict(
  vocab_size=53, hidden_size=24, intermediate_size=20, num_hidden_layers=3,
  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
_CHOSEN = dict(_DECODER, num_experts_per_tok=3)
_DEEPSEEK = dict(
  _DECODER, num_key_value_heads=None, n_routed_experts=6, num_experts_per_tok=3,
  moe_intermediate_size=12, first_k_dense_replace=1, q_lora_rank=None,
  kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
)  # fmt: skip
BASE = {
  'gpt_oss': dict(
    _CHOSEN, num_local_experts=6, head_dim=8, sliding_window=4,
    eos_token_id=None,
  ),
  'granitemoe': dict(
    _CHOSEN, num_local_experts=6, embedding_multiplier=3.0,
    attention_multiplier=0.3, eos_token_id=None, residual_multiplier=0.4,
    logits_scaling=2.0,
  ),
  'deepseek_v2': dict(_DEEPSEEK, n_shared_experts=2),
  'deepseek_v3': dict(
    _DEEPSEEK, n_routed_experts=8, n_group=4, topk_group=2, q_lora_rank=14,
  ),
  'mixtral': dict(_DECODER, num_local_experts=5),
  # Its ids would be masked when tokens are generated.
  'olmoe': dict(_CHOSEN, num_experts=6, pad_token_id=None, eos_token_id=None),
  'phimoe': dict(_DECODER, num_local_experts=6),
  'qwen2_moe': dict(
    _CHOSEN, num_experts=6, moe_intermediate_size=12,
    shared_expert_intermediate_size=28,
  ),
  'qwen3_moe': dict(
    _CHOSEN, num_experts=6, moe_intermediate_size=12, head_dim=8,
  ),
  'nllb-moe': dict(
    vocab_size=53, d_model=24, encoder_layers=4, decoder_layers=2,
    encoder_attention_heads=3, decoder_attention_heads=2, encoder_ffn_dim=20,
    decoder_ffn_dim=28, num_experts=5, encoder_sparse_step=2,
    decoder_sparse_step=2,
  ),
  'switch_transformers': dict(
    vocab_size=53, d_model=24, d_kv=6, d_ff=20, num_heads=3, num_layers=4,
    num_sparse_encoder_layers=2, num_decoder_layers=2,
    num_sparse_decoder_layers=1, num_experts=5, expert_capacity=2,
    decoder_start_token_id=0,
  ),
}  # fmt: skip


# Parameters are multiplied by these factors, by a part of their name; the first
# match counts. With them a token does not lead to itself, though embeddings are
# tied, and logits differ.
LOUD = {
  **{name: {'': 8.0} for name in CLASSES},
  'nllb-moe': {'shared': 6.0, 'fc': 48.0, '': 16.0},
  'switch_transformers': {
    'shared': 1.0, 'lm_head': 0.1, 'Attention.q': 2.0, 'Attention.k': 2.0,
    '': 3.0,
  },
}  # fmt: skip

# With these seeds the greedy tokens of models repeat themselves least.
FIRST_SEED = {'nllb-moe': 1}


def make(kind: str, seed: int = 0, **options):
  """Makes a model of a kind whose greedy tokens vary."""
  torch.manual_seed(seed + FIRST_SEED.get(kind, 0))
  cls = CLASSES[kind]
  model = cls(cls.config_class(**{**BASE[kind], **options})).eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      if name.endswith('bias') or 'norm' in name:
        value += 0.2 * torch.randn_like(value)  # else all would start equal
      else:
        factors = LOUD[kind]
        value *= next(f for part, f in factors.items() if part in name)
    for name, value in model.named_buffers():
      if name.endswith('e_score_correction_bias'):
        value += 0.2 * torch.randn_like(value)  # as scores differ by less
  return model


def inputs(
  model, seed: int = 0, pad_left: bool = False
) -> dict[str, np.ndarray]:
  """Token ids and masks of rows of different lengths; the first is full.

  Some ids of padding are not masked: NLLB counts positions by ids.
  """
  rng = np.random.default_rng(seed)
  V, pad = model.config.vocab_size, model.config.pad_token_id
  pad = 0 if pad is None else pad
  low = 3  # special ids are below 3
  ids = rng.integers(low, V, (B, S))
  mask = np.arange(S) < np.array([[S], [S - 4], [S - 1]])
  if pad_left:
    mask = mask[:, ::-1]
  ids = np.where(mask, ids, pad)
  ids[0, 5] = pad
  batch = dict(input_ids=ids, attention_mask=mask.astype(np.int64))
  if model.config.is_encoder_decoder:
    start = model.generation_config.decoder_start_token_id
    decoder = rng.integers(low, V, (B, T))
    decoder[:, 0], decoder[1, 3] = start, pad
    batch['decoder_input_ids'] = decoder
  return batch


def logits(model, batch: dict[str, np.ndarray]) -> np.ndarray:
  """Logits of transformers' model, float32 [B, T, V]."""
  with torch.no_grad():
    output = model(**{k: torch.tensor(v) for k, v in batch.items()})
  return output.logits.numpy()


def greedy(model, batch: dict[str, np.ndarray]) -> np.ndarray:
  """Greedy tokens of transformers' model; a decoder continues the first row.

  Where an encoder-decoder generates a token in the first row only, and not at
  once, it becomes the end of text: other rows then continue beside that row's
  padding.
  """
  ids, mask = (torch.tensor(batch[k]) for k in ('input_ids', 'attention_mask'))
  if not model.config.is_encoder_decoder:
    prompt = ids[:1, mask[0].bool()]
    return model.generate(prompt, do_sample=False, max_new_tokens=N).numpy()
  options = dict(attention_mask=mask, do_sample=False, max_length=N)
  model.generation_config.eos_token_id = None
  endless = model.generate(ids, **options).numpy()
  first_row, other_rows = endless[0], endless[1:]
  end_tokens = [
    x for x in first_row[3:-2] if x not in first_row[:3] and x not in other_rows
  ]
  if not end_tokens:
    return endless
  model.generation_config.eos_token_id = int(end_tokens[0])
  return model.generate(ids, **options).numpy()


def our_inputs(
  batch: dict[str, np.ndarray], unnumbered_id: int | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """The inputs of our model for those of transformers', and a mask of text."""

  def stream(prefix, ids, mask):
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    if unnumbered_id is not None:
      positions = np.maximum(np.cumsum(ids != unnumbered_id, 1) - 1, 0)
    values = dict(tokens=ids, segment_ids=mask, positions=positions)
    return {prefix + name: x.astype(np.int32) for name, x in values.items()}

  ids, mask = batch['input_ids'], batch['attention_mask']
  if (decoder := batch.get('decoder_input_ids')) is None:
    return stream('', ids, mask), mask
  ones = np.ones_like(decoder)
  return stream('encoder_', ids, mask) | stream('', decoder, ones), ones


def check_same_weights(model, folder: pathlib.Path):
  """Checks that a folder has a model's weights; returns the model in it."""
  reloaded, info = type(model).from_pretrained(folder, output_loading_info=True)
  assert not any(info.values())
  old, new = model.state_dict(), reloaded.state_dict()
  assert old.keys() == new.keys()
  if not model.config.tie_word_embeddings and model.config.is_encoder_decoder:
    # This weight is not used, so that an export writes zeros.
    for weights in (old, new):
      weights.pop(next(key for key in weights if 'shared' in key)).zero_()
  assert all(torch.equal(old[key], new[key].to(old[key])) for key in old)
  return reloaded.eval()


def write(
  model, folder: pathlib.Path, batch: dict[str, np.ndarray] | None = None
):
  """Writes the checkpoint and `expected.npz`; returns the latter's arrays."""
  batch = inputs(model) if batch is None else batch
  expected = batch | {'logits': logits(model, batch)}
  expected['greedy'] = greedy(model, batch)
  model.save_pretrained(folder)
  np.savez(folder / 'expected.npz', **expected)
  return expected
