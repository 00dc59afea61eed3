"""A `model` section in which no option is in force, for checkpoints to fill.

It has the keys of `configs/base.py`, which an installed package does not
carry; a test holds the two together.
"""

import copy
from collections.abc import Mapping
from typing import Any

import ml_collections

from moe_jax.config import flatten, merge

_MODEL = dict(
  kind='decoder',
  vocab_size=0,
  feature_shape=(),
  num_layers=1,
  num_encoder_layers=0,
  width=1,
  num_heads=1,
  encoder_heads=0,
  num_kv_heads=0,
  head_width=0,
  hidden=1,
  encoder_hidden=0,
  activation='relu',
  norm='rmsnorm',
  norm_epsilon=1e-6,
  norm_scale=True,
  positions='none',
  position_offset=0,
  relative_buckets=32,
  relative_max_distance=128,
  rope_theta=10000.0,
  attention='auto',
  attention_scale='head_width',
  sliding_window=0,
  max_len=0,
  use_bias=False,
  tie_embeddings=True,
  embedding_scale='none',
  logits_scale='none',
  dropout=0.0,
  dtype='float32',
  param_dtype='float32',
  scan_layers=True,
  remat='none',
  init=dict(kind='fan_in', scale=1.0, embedding_std=0.02),
  lstm=dict(hidden=0, forget_bias=1.0, unroll=1, twin_depth=1),
  moe=dict(
    num_experts=1,
    num_selected=1,
    branching=0,
    branches_selected=1,
    layers='none',
    encoder_layers='',
    hidden=0,
    activation='',
    extra_ffn=False,
    expert_dropout=-1.0,
    router='token_choice',
    hash_of='token',
    router_seed=0,
    gates='raw',
    slot_priority='token_major',
    encoder_slot_priority='',
    second_policy='all',
    second_threshold=0.2,
    jitter=0.0,
    router_bias=False,
    served_by='chosen',
    output_masking=0.0,
    route_padding=False,
    group_size=0,
    capacity_rule='all',
    capacity_factor=1.0,
    capacity_rounding='ceil',
    capacity_multiple=1,
    capacity_minimum=1,
    capacity_slots=0,
    dispatch='gather',
    grouped_matmul='auto',
    exchange='constraint',
    exchange_chunks=1,
    exchange_dtype='',
    balance_bias_rate=0.0,
    balance_choices='all',
    balance_weight=0.0,
    z_weight=0.0,
    importance_weight=0.0,
    load_weight=0.0,
    layer_reduce='sum',
    allow_future_leak=False,
  ),
  adaptive=dict(
    loss='competitive',
    num_experts=4,
    expert_hidden=0,
    gate_hidden=0,
    expert_output='softmax',
    init_scale=0.5,
  ),
  deep_moe=dict(
    num_experts=(4, 4),
    hidden=(100, 100),
    gate_hidden=(50, 50),
    margin=32.0,
    balance_steps=0,
  ),
)
# How a model is computed and started; a run's own config may choose.
FREE = (
  'attention',
  'init',
  'moe.exchange',
  'moe.exchange_chunks',
  'moe.exchange_dtype',
  'moe.grouped_matmul',
  'moe.layer_reduce',
  'remat',
  'scan_layers',
)
# The table of `configs/base.py`.
SHARDING = dict(
  batch='data,fsdp,expert',
  embed='fsdp',
  mlp='tensor',
  heads='tensor',
  kv_heads='',
  kv='',
  vocab='tensor',
  expert='expert',
  expert_mlp='tensor',
  expert_choice='',
  layers='',
  positions='',
  buckets='',
)


def section(settings: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The whole section, with `settings` merged in.

  Raises:
    ValueError: A key does not exist, or its value has another type.
  """
  return merge(ml_collections.ConfigDict(copy.deepcopy(_MODEL)), settings)


def overrides(model: ml_collections.ConfigDict) -> dict[str, Any]:
  """What a run's config takes from a section: all but `FREE`, nested."""
  nested: dict[str, Any] = {}
  for name, value in flatten(model).items():
    if name in FREE or name.split('.')[0] in FREE:
      continue
    *parents, key = name.split('.')
    place = nested
    for parent in parents:
      place = place.setdefault(parent, {})
    place[key] = value
  return nested
