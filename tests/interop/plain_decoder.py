"""Plain numpy loops of decoders that transformers has no class for.

They are the definition that imported checkpoints are compared with: one token,
head and expert at a time, in float64, on the tensors as the files hold them.
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax import interop
from moe_jax.interop import checkpoint_folder
from moe_jax.interop.verifying import verify

B, T, N = 2, 9, 7


def silu(x):
  return x / (1 + np.exp(-x))


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def normed(x, scale, epsilon):
  return x / np.sqrt((x**2).mean() + epsilon) * scale


def turned(x, position, theta):
  """A query or key whose two halves are turned by its position."""
  half = len(x) // 2
  y = np.empty_like(x)
  for i in range(half):
    angle = position * theta ** (-2 * i / len(x))
    a, b = x[i], x[half + i]
    y[i] = a * np.cos(angle) - b * np.sin(angle)
    y[half + i] = b * np.cos(angle) + a * np.sin(angle)
  return y


def attention(rows, w, prefix, *, heads, kv_heads, theta, scale):
  """The attention of one sequence's rows [T, M]."""

  def projected(row, name):
    y = w[f'{prefix}.{name}_proj.weight'] @ row
    return y + w.get(f'{prefix}.{name}_proj.bias', 0)

  D = w[f'{prefix}.q_proj.weight'].shape[0] // heads
  queries, keys, values = (
    [projected(row, name).reshape(-1, D) for row in rows] for name in 'qkv'
  )
  outputs = []
  for t in range(len(rows)):
    head_outputs = []
    for h in range(heads):
      n = h * kv_heads // heads  # the key that several queries share
      query = turned(queries[t][h], t, theta)
      scores = [query @ turned(keys[s][n], s, theta) for s in range(t + 1)]
      weights = softmax(np.array(scores) * scale)
      head_outputs.append(sum(weights[s] * values[s][n] for s in range(t + 1)))
    outputs.append(projected(np.concatenate(head_outputs), 'o'))
  return np.array(outputs)


def logits(config, w, batch, feed_forward, *, theta, scale):
  """The logits [B, T, V] of a batch of token ids.

  Args:
    config: The content of config.json.
    w: The tensors by name.
    batch: The token ids [B, T].
    feed_forward: The function (rows of the whole batch, layer) that returns
      what a layer adds to the residual after attention.
    theta: The base of rotary positions.
    scale: The factor of the scores of attention.
  """
  c = config
  heads = c['num_attention_heads']
  kv_heads = c.get('num_key_value_heads') or heads
  sizes = dict(heads=heads, kv_heads=kv_heads, theta=theta, scale=scale)
  x = w['model.embed_tokens.weight'][np.asarray(batch)]  # [B, T, M]
  for i in range(c['num_hidden_layers']):
    layer = f'model.layers.{i}'
    for b in range(len(x)):
      scale_in = w[f'{layer}.input_layernorm.weight']
      h = [normed(row, scale_in, c['rms_norm_eps']) for row in x[b]]
      x[b] += attention(h, w, f'{layer}.self_attn', **sizes)
    rows = x.reshape(-1, x.shape[-1])
    x = (rows + feed_forward(rows, i)).reshape(x.shape)
  head = 'model.embed_tokens' if c['tie_word_embeddings'] else 'lm_head'
  last, kernel = w['model.norm.weight'], w[f'{head}.weight']
  rows = x.reshape(-1, x.shape[-1])
  logits = [kernel @ normed(row, last, c['rms_norm_eps']) for row in rows]
  return np.array(logits).reshape(*x.shape[:2], -1)


def each_name(cases, fast):
  """Parametrises a test by the names of cases, all but one of them slow."""
  return pytest.mark.parametrize(
    'name',
    [pytest.param(n, marks=[pytest.mark.slow] * (n != fast)) for n in cases],
  )


def draw(shapes, seed):
  """Random tensors whose greedy tokens vary, float32."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in shapes.items():
    tensor = rng.normal(size=shape)
    if name.endswith('norm.weight'):
      tensor = 1 + 0.2 * tensor
    elif 'embed' in name or name.endswith('bias'):
      tensor *= 0.3  # else a token would lead to itself
    else:
      tensor *= 2 / np.sqrt(shape[-2 if 'experts.w' in name else -1])
    tensors[name] = tensor.astype(np.float32)
  return tensors


def common_shapes(c, head_width):
  """The shapes of embeddings, norms and attention."""
  M, V = c['hidden_size'], c['vocab_size']
  H = c['num_attention_heads']
  kv = c.get('num_key_value_heads') or H
  shapes = {'model.embed_tokens.weight': (V, M), 'model.norm.weight': (M,)}
  if not c['tie_word_embeddings']:
    shapes['lm_head.weight'] = (V, M)
  for i in range(c['num_hidden_layers']):
    layer = f'model.layers.{i}'
    for name in ('input_layernorm', 'post_attention_layernorm'):
      shapes[f'{layer}.{name}.weight'] = (M,)
    for name, n in (('q', H), ('k', kv), ('v', kv)):
      path = f'{layer}.self_attn.{name}_proj'
      shapes[f'{path}.weight'] = (n * head_width, M)
      if c.get('attention_bias'):
        shapes[f'{path}.bias'] = (n * head_width,)
    shapes[f'{layer}.self_attn.o_proj.weight'] = (M, H * head_width)
    if c.get('attention_bias'):
      shapes[f'{layer}.self_attn.o_proj.bias'] = (M,)
  return shapes


def write(folder, config, tensors):
  """Writes a checkpoint."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  save_file(tensors, folder / 'model.safetensors')


def read(folder):
  """All tensors of a checkpoint."""
  tensors = {}
  for path in folder.glob('*.safetensors'):
    tensors |= load_file(path)
  return tensors


def expect(folder, compute, vocab_size):
  """Writes `expected.npz` for `verify`; returns its arrays.

  Args:
    folder: The folder.
    compute: The function (token ids, number of tokens that a row reads at once,
      the others being generated) that returns logits.
    vocab_size: The number of token ids.
  """
  ids = np.random.default_rng(0).integers(0, vocab_size, (B, T))
  greedy = ids[:1]
  for _ in range(N):
    best = compute(greedy, T)[:, -1].argmax(-1)
    greedy = np.concatenate([greedy, best[:, None]], axis=1)
  expected = dict(
    input_ids=ids,
    attention_mask=np.ones_like(ids),
    logits=compute(ids, T).astype(np.float32),
    greedy=greedy,
  )
  np.savez(folder / 'expected.npz', **expected)
  return expected


def check(folder, config, tensors, compute, fast=False):
  """Compares an imported checkpoint with loops, and its exported copy with it.

  Args:
    folder: An empty folder.
    config: The content of config.json.
    tensors: The tensors by name, float32.
    compute: The function (tensors, token ids, number of tokens that a row reads
      at once) that returns logits.
    fast: Whether only the logits of prompts in a cache are compared.
  """
  source, exported = folder / 'theirs', folder / 'ours'
  write(source, config, tensors)
  wide = {name: x.astype(np.float64) for name, x in tensors.items()}
  loops = functools.partial(compute, wide)
  expected = expect(source, loops, config['vocab_size'])
  # Outputs must vary, or any model would agree.
  assert len(np.unique(expected['greedy'][0, T:])) >= 3
  assert expected['logits'].std() > 0.1
  options, model, variables = interop.load(source)
  if fast:
    decode = jax.jit(functools.partial(model.apply, method='decode'))
    ids = expected['input_ids'].astype(np.int32)
    mask = np.ones(ids.shape, bool)
    logits, _ = decode(variables, ids, mask, model.make_cache(B, T))
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=5e-5)
  else:
    verdict = verify(source, source / 'expected.npz')
    assert verdict.largest_difference < 5e-5, verdict.describe()
    assert verdict.first_difference is None, verdict.describe()
    assert verdict.num_equal_tokens == N
  # Exported again, the model has the same weights and options.
  interop.save(options, variables, exported, shard_bytes=2**13)
  assert len([*exported.glob('*.safetensors')]) >= 2
  exported_tensors = read(exported)
  assert exported_tensors.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(exported_tensors[name], value, err_msg=name)
  assert checkpoint_folder.open_checkpoint(exported).options == options
