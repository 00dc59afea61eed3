"""OpenMoE's checkpoints equal plain loops of the published code."""

import dataclasses
import functools
import re

import numpy as np
import pytest

from moe_jax import cli, generation, interop, run_config
from moe_jax.data.plain_files import read_json
from moe_jax.finetuning.meaning import difference
from moe_jax.interop import checkpoint_folder, saving
from moe_jax.interop.quirks import EvenSlots
from moe_jax.routing.capacity import All
from tests.interop import folders
from tests.interop import plain_decoder as plain

V = 41
BASE = dict(
  model_type='llama', architectures=['OpenMoeForCausalLM'], vocab_size=V,
  hidden_size=12, intermediate_size=7, num_hidden_layers=2,
  num_attention_heads=2, num_key_value_heads=2, head_dim=8, hidden_act='swiglu',
  num_experts=5, moe_layer_interval=2, router_topk=2,
  router_capacity_factor_eval=2.0, router_min_capacity=2, rms_norm_eps=1e-6,
  tie_word_embeddings=False,
)  # fmt: skip
FAST = 'slots run out'
CASES = {
  FAST: dict(router_capacity_factor_eval=0.8),
  'grouped keys, one expert a token, all sparse, tied, odd capacity': dict(
    num_attention_heads=6, rms_norm_eps=1e-2, head_dim=4, router_topk=1,
    moe_layer_interval=1, tie_word_embeddings=True,
    router_capacity_factor_eval=0.3, router_min_capacity=3,
  ),
}  # fmt: skip


def is_sparse(c, i):
  return (i + 1) % c['moe_layer_interval'] == 0


def shapes_of(c):
  M, F, E = c['hidden_size'], c['intermediate_size'], c['num_experts']
  shapes = plain.common_shapes(c, c['head_dim'])

  def ffn(path):
    shapes[f'{path}.gate_proj.weight'] = (2 * F, M)
    shapes[f'{path}.up_proj.weight'] = (F, M)
    shapes[f'{path}.down_proj.weight'] = (M, F)

  for i in range(c['num_hidden_layers']):
    layer = f'model.layers.{i}'
    if not is_sparse(c, i):
      ffn(f'{layer}.mlp')
      continue
    shapes[f'{layer}.mlp.gate_weight'] = (E, M)
    shapes[f'{layer}.mlp.experts.wi_gate'] = (E, M, 2 * F)
    shapes[f'{layer}.mlp.experts.wi_up'] = (E, M, F)
    shapes[f'{layer}.mlp.experts.wo'] = (E, F, M)
    shapes[f'{layer}.pre_extra_mlp_layernorm.weight'] = (M,)
    ffn(f'{layer}.extra_mlp')
  return shapes


def doubly_gated(gate, up, down, h):
  """A feed-forward whose kernels are those of PyTorch's linear layers."""
  linear, gated = np.split(gate @ h, 2)
  return down @ (linear * plain.silu(gated) * (up @ h))


def slots_of(c, tokens):
  """The slots of an expert for that number of tokens."""
  share = c['router_topk'] * c['router_capacity_factor_eval'] * tokens
  slots = int(share / c['num_experts'])
  if slots % 2:
    slots += 1
  return max(slots, c['router_min_capacity'])


def served(c, probs):
  """The pairs (token, expert) that have a slot, and the number of drops.

  Args:
    c: The config.
    probs: The probabilities of experts for each token of the batch.
  """
  order = [np.argsort(-p)[: c['router_topk']] for p in probs]
  load, assignments, dropped = np.zeros(c['num_experts'], int), [], 0
  for k in range(c['router_topk']):  # first choices first
    for token, chosen in enumerate(order):
      if load[chosen[k]] < slots_of(c, len(probs)):
        assignments.append((token, chosen[k]))
      else:
        dropped += 1
      load[chosen[k]] += 1
  return assignments, dropped


def compute(c, w, batch, num_read, drops=None):
  """The logits of the published code.

  Args:
    c: The config.
    w: The tensors.
    batch: The token ids [B, T].
    read: The number of tokens that each row reads at once; those after them
      are generated, which takes a single row.
    drops: A list to which the number of drops of each call of experts is added.
  """

  def dense(path, h):
    kernels = (w[f'{path}.{n}_proj.weight'] for n in ('gate', 'up', 'down'))
    return doubly_gated(*kernels, h)

  def norm(row, path):
    return plain.normed(row, w[f'{path}.weight'], c['rms_norm_eps'])

  def sparse(layer, hidden):
    """The outputs of experts for tokens that compete for slots."""
    gate, experts = w[f'{layer}.gate_weight'], f'{layer}.experts'
    probs = [plain.softmax(gate @ h) for h in hidden]
    y = np.zeros_like(hidden)
    assignments, dropped = served(c, probs)
    for token, e in assignments:
      kernels = (w[f'{experts}.{n}'][e].T for n in ('wi_gate', 'wi_up', 'wo'))
      y[token] += probs[token][e] * doubly_gated(*kernels, hidden[token])
    if drops is not None:
      drops.append(dropped)
    return y

  def feed_forward(rows, i):
    layer = f'model.layers.{i}'
    path = f'{layer}.post_attention_layernorm'
    hidden = np.array([norm(row, path) for row in rows])
    if not is_sparse(c, i):
      return np.array([dense(f'{layer}.mlp', h) for h in hidden])
    first = num_read * len(batch)
    singles = [hidden[k : k + 1] for k in range(first, len(hidden))]
    groups = [hidden[:first], *singles]
    y = np.concatenate([sparse(f'{layer}.mlp', group) for group in groups])
    extra = []
    for row in rows + y:
      h = norm(row, f'{layer}.pre_extra_mlp_layernorm')
      extra.append(dense(f'{layer}.extra_mlp', h))
    return y + np.array(extra)

  return plain.logits(c, w, batch, feed_forward, theta=10_000.0, scale=1.0)


@functools.cache
def checkpoint(name):
  """The config and the tensors of a case."""
  config = BASE | CASES[name]
  return config, plain.draw(shapes_of(config), seed=len(name))


@plain.each_name(CASES, FAST)
def test_logits_tokens_and_weights(name, tmp_path):
  config, tensors = checkpoint(name)
  drops = []
  loops = functools.partial(compute, config, drops=drops)
  plain.check(tmp_path, config, tensors, loops, fast=name == FAST)
  if config['router_capacity_factor_eval'] < 2:
    assert sum(drops) > 2
  assert read_json(tmp_path / 'ours' / 'config.json')['model_type'] == 'llama'


@pytest.mark.slow
def test_generation_drops_tokens_of_prompts(tmp_path):
  # The last token of a prompt is read by itself; the others compete.
  config, tensors = checkpoint(FAST)
  plain.write(tmp_path / 'theirs', config, tensors)
  _, model, variables = interop.load(tmp_path / 'theirs')
  ids = np.random.default_rng(0).integers(0, V, (1, plain.T))
  generated = generation.generate(model, variables, ids[0], num_tokens=plain.N)
  drops = []
  for token in generated.tokens[0]:
    logits = compute(config, tensors, ids, plain.T - 1, drops)
    assert token == logits[0, -1].argmax()
    ids = np.append(ids, [[token]], axis=1)
  assert drops[0] > 2


def test_the_published_config_is_that_of_our_config_but_for_slots():
  checkpoint = folders.published('openmoe')
  imported, router = checkpoint.options, checkpoint.options.moe.router
  our_options = run_config.read(cli.load_config('moe_jax:openmoe_8b')).model
  names = difference(imported, our_options)
  differences = {name for name in names if 'moe.capacity.' not in name}
  assert differences == {'moe.group_size', 'moe.router.slot_priority'}
  assert imported.moe.capacity == EvenSlots(2.0, 4)
  assert imported.moe.capacity.keeps_in_generation(single=True)
  assert (router.balance_weight, router.z_weight) == (0.02, 0.0001)
  assert imported.moe.layer_reduce == our_options.moe.layer_reduce
  assert sorted(note.split('=')[0] for note in checkpoint.notes) == [
    'label_smoothing',
    'router_capacity_factor_train',
    'z_loss_factor',
  ]
  # The exported config has the keys of the import, but for those that
  # transformers has renamed.
  published = checkpoint.config
  written = saving.describe(imported, checkpoint.architecture, published)
  renamed = {'rope_scaling', 'rope_theta', 'torch_dtype'}
  expected = {k: v for k, v in published.items() if k not in renamed}
  assert expected == {key: written[key] for key in expected}


def test_llama_without_experts_is_no_openmoe():
  config = BASE | dict(architectures=['LlamaForCausalLM'])
  with pytest.raises(ValueError, match="'llama of class OpenMoeForCausalLM'"):
    checkpoint_folder.from_config(config)
  # Older configs have no model_type.
  for older in ({'model_type': None}, {'model_type': 'openmoe'}):
    found = checkpoint_folder.architecture_of(BASE | older)
    assert found.model_type == 'openmoe'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(capacity=All()), 'its capacity is All, not EvenSlots'),
    (dict(layers='0'), "layers '0' of 2 are not one in every n"),
    (dict(extra_ffn=False), 'moe.extra_ffn: False, not True'),
  ],
)
def test_other_models_are_not_written(change, message):
  options = checkpoint_folder.from_config(BASE)
  moe = dataclasses.replace(options.moe, **change)
  other = dataclasses.replace(options, moe=moe)
  with pytest.raises(ValueError, match=re.escape(message)):
    saving.describe(other, interop.ARCHITECTURES['openmoe'], {})
