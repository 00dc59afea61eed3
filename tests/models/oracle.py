"""The function of a decoder in numpy, one document at a time, in float64.

Covers rmsnorm, rotary or learned positions, grouped heads without bias, relu,
swiglu, and token choice without drops (gates renormalised). It leaves out
dropping, noise and losses.
"""

import numpy as np

from tests.models.tiny import leaves
from tests.reference import choose, relative_gates


def decode(c, params, tokens):
  """Maps a document of token ids [T] to (logits [T, V], choices by layer).

  Choices are {layer: expert_index [T, K]} of the sparse layers.
  """
  flat = {k: np.asarray(v, np.float64) for k, v in leaves(params).items()}
  layers = layers_of(flat)
  assert len(layers) == c.num_layers
  x = flat['embedding'][tokens]
  if c.positions.table_len:
    x = x + flat['position_embedding'][: len(tokens)]
  choices = {}
  for i, layer in enumerate(layers):
    h = norm(x, layer['attention_norm/scale'], c)
    x = x + attention(h, layer, c)
    h = norm(x, layer['ffn_norm/scale'], c)
    if 'moe/router/w' in layer:
      y, choices[i] = moe(h, layer, c)
    else:
      y = ffn(h, layer, 'ffn/', c)
    x = x + y
    if 'extra_ffn/w_in' in layer:
      h = norm(x, layer['extra_ffn_norm/scale'], c)
      x = x + ffn(h, layer, 'extra_ffn/', c)
  x = norm(x, flat['final_norm/scale'], c)
  return x @ (
    flat['embedding'].T if c.embedding.tie else flat['w_logits']
  ), choices


def layers_of(flat):
  """Each layer's parameters by name, in the order of the layers.

  They are stacked as 'layers_2/layer_1/...' [repeats, ...]: loop 2, second
  layer of its period. A single loop is named 'layers'.
  """
  loops = sorted({k.split('/')[0] for k in flat if k.startswith('layers')})
  layers = []
  for loop in loops:
    loop_params = {k: v for k, v in flat.items() if k.startswith(loop + '/')}
    repeats = len(next(iter(loop_params.values())))
    period = len({k.split('/')[1] for k in loop_params})
    for i in range(repeats * period):
      prefix = f'{loop}/layer_{i % period}/'
      layers.append(
        {
          k.removeprefix(prefix): v[i // period]
          for k, v in loop_params.items()
          if k.startswith(prefix)
        }
      )
  return layers


def norm(x, scale, c):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm.epsilon) * scale


def turn(x, theta):
  """Rotates x [T, H, D]: pair (d, d + D/2) as a complex number by its angle."""
  T, _, D = x.shape
  pairs = x[..., : D // 2] + 1j * x[..., D // 2 :]
  speed = theta ** (-2 * np.arange(D // 2) / D)
  pairs = pairs * np.exp(1j * np.arange(T)[:, None, None] * speed)
  return np.concatenate([pairs.real, pairs.imag], -1)


def attention(x, layer, c):
  query, key, value = (
    np.einsum('tm,mhd->thd', x, layer[f'attention/w_{name}'])
    for name in ('query', 'key', 'value')
  )
  if hasattr(c.positions, 'theta'):
    query, key = (turn(query, c.positions.theta), turn(key, c.positions.theta))
  y = np.zeros(x.shape)
  H, D = query.shape[1:]
  for h in range(H):
    n = h * key.shape[1] // H  # the key-value head that serves query head h
    for t in range(len(x)):
      score = key[: t + 1, n] @ query[t, h] / np.sqrt(D)
      weight = np.exp(score - score.max())
      head_output = weight @ value[: t + 1, n] / weight.sum()
      y[t] += head_output @ layer['attention/w_out'][h]
  return y


def ffn(x, weights, prefix, c, expert=...):
  h = x @ weights[f'{prefix}w_in'][expert]
  if c.ffn.activation == 'swiglu':
    gate = x @ weights[f'{prefix}w_gate'][expert]
    h = h * gate / (1 + np.exp(-gate))
  else:
    h = np.maximum(h, 0)
  return h @ weights[f'{prefix}w_out'][expert]


def moe(x, layer, c):
  logits = x @ layer['moe/router/w']
  expert_index = np.array([choose(row, c.moe.num_selected) for row in logits])
  y = np.zeros(x.shape)
  for t, experts in enumerate(expert_index):
    for gate, e in zip(relative_gates(logits[t], experts), experts):
      y[t] += gate * ffn(x[t], layer, 'moe/experts/', c, e)
  return y, expert_index
