"""A mixture-of-experts language model in one file, from text to a sample.

    python colab/one_file_moe.py

It reads Python's own library as bytes, trains a decoder whose every second
feed-forward is a mixture of experts (Switch, https://arxiv.org/abs/2101.03961),
and writes a sample, and in `routing.html` which expert took each byte. It is
made to be copied. `one_file_sharded.py` splits it over devices.

Letters: B sequences of T tokens; G groups of S tokens, which are routed by
themselves; E experts, of which a token chooses K, with C slots each; M the
width of the model, F that of an expert, H heads of width D, V bytes.
"""

import dataclasses
import functools
import html
import math
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of the model and of its training."""

  vocab_size: int = 256  # V
  num_layers: int = 4  # every second one is sparse
  width: int = 128  # M
  num_heads: int = 4  # H
  hidden: int = 512  # F
  num_experts: int = 8  # E
  num_selected: int = 1  # K
  capacity_factor: float = 1.25  # slots for each choice of a token
  group_size: int = 256  # S, the tokens that share an expert's slots
  balance_weight: float = 0.01
  z_weight: float = 0.001
  batch_size: int = 16  # B
  seq_len: int = 128  # T
  total_steps: int = 800
  warmup_steps: int = 100
  learning_rate: float = 3e-3


class MoE(nn.Module):
  """Sends each token to K of E experts, and adds up their gated outputs."""

  config: Config

  @nn.compact
  def __call__(self, x):
    """Returns the output [B, T, M], and losses and choices by name."""
    c, (B, T, M) = self.config, x.shape
    E, K, F = c.num_experts, c.num_selected, c.hidden
    S = min(c.group_size, B * T)
    C = math.ceil(c.capacity_factor * K * S / E)
    x = split(x.reshape(-1, S, M), ('data', 'expert'))  # [G, S, M]

    # 1. The router: a linear layer, of whose logits each token takes K.
    logits = nn.Dense(E, use_bias=False, name='router')(x)
    probs = jax.nn.softmax(logits)
    _, expert = jax.lax.top_k(logits, K)  # [G, S, K]
    gate = jnp.take_along_axis(probs, expert, -1)
    if K > 1:  # With one expert, the gate alone teaches the router.
      gate = gate / gate.sum(-1, keepdims=True)

    # 2. Slots. Choices queue in the order of the text, so that no later token
    # matters. A choice of a full expert is dropped: the residual carries on.
    chosen = jax.nn.one_hot(expert.reshape(-1, S * K), E, dtype=jnp.int32)
    slot = ((jnp.cumsum(chosen, 1) - 1) * chosen).sum(-1).reshape(-1, S, K)
    kept = slot < C
    place = jnp.where(kept, expert * C + slot, E * C).reshape(-1, S * K)

    # 3. There: each place gets the row of its token; empty places have token S,
    # which is zeros. Over devices this is an all-to-all.
    nobody = jnp.full(E * C + 1, S)
    token = jax.vmap(lambda p: nobody.at[p].set(jnp.arange(S * K) // K))(place)
    rows = split(take(x, token[:, :-1]).reshape(-1, E, C, M), 'data', 'expert')

    # 4. Each expert is a feed-forward of its own.
    init = nn.initializers.lecun_normal(batch_axis=0)
    w_in = self.param('w_in', init, (E, M, F))
    w_out = self.param('w_out', init, (E, F, M))
    h = nn.gelu(jnp.einsum('GECM,EMF->GECF', rows, w_in), approximate=False)
    y = split(jnp.einsum('GECF,EFM->GECM', h, w_out), 'data', 'expert')

    # 5. And back: each token adds up what its experts made of it.
    y = split(y, ('data', 'expert')).reshape(-1, E * C, M)
    y = take(y, place).reshape(-1, S, K, M) * gate[..., None]

    # The balance loss (Eq. 4 of Switch) is 1 where loads are even; the z-loss
    # (Eq. 5 of ST-MoE, https://arxiv.org/abs/2202.08906) keeps logits small.
    load = chosen.mean(1)  # [G, E], shares of choices, without a gradient
    return y.sum(2).reshape(B, T, M), {
      'balance': E * (load * probs.mean(1)).sum(-1).mean(),
      'z': (jax.nn.logsumexp(logits, -1) ** 2).mean(),
      'load': load.mean(0),
      'dropped': 1 - kept.mean(),
      'expert': expert.reshape(B, T, K),
      'kept': kept.reshape(B, T, K),
    }


def take(x, index):
  """Rows of x [G, N, M] by index [G, R]; zeros for the index N."""
  x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
  return jnp.take_along_axis(x, index[..., None], 1)


def split(x, *axes):
  """States the axes of the mesh that x is split over, if there is a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


class Attention(nn.Module):
  """Causal attention with rotary positions."""

  config: Config

  @nn.compact
  def __call__(self, x):
    (B, T, M), H = x.shape, self.config.num_heads
    query, key, value = (
      nn.Dense(M, use_bias=False, name=name)(x).reshape(B, T, H, M // H)
      for name in ('query', 'key', 'value')
    )
    scores = jnp.einsum('BTHD,BSHD->BHTS', rotated(query), rotated(key))
    seen = jnp.tril(jnp.ones((T, T), bool))
    scores = jnp.where(seen, scores * (M // H) ** -0.5, -jnp.inf)
    y = jnp.einsum('BHTS,BSHD->BTHD', jax.nn.softmax(scores), value)
    return nn.Dense(M, use_bias=False, name='out')(y.reshape(B, T, M))


def rotated(x):
  """Queries or keys [B, T, H, D], each pair turned by its position."""
  T, D = x.shape[1], x.shape[-1]
  frequency = 10000.0 ** (-jnp.arange(0, D, 2) / D)
  angle = jnp.outer(jnp.arange(T), frequency)[:, None]  # [T, 1, D / 2]
  (a, b), sin, cos = jnp.split(x, 2, -1), jnp.sin(angle), jnp.cos(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class TwoLayers(nn.Module):
  """A dense layer and a sparse one, with a norm before each part."""

  config: Config

  @nn.compact
  def __call__(self, x, _):
    c = self.config
    x = x + Attention(c, name='attention_0')(nn.RMSNorm(name='norm_0')(x))
    h = nn.RMSNorm(name='norm_1')(x)
    h = nn.gelu(nn.Dense(c.hidden, use_bias=False, name='in')(h), False)
    x = x + nn.Dense(c.width, use_bias=False, name='out')(h)
    x = x + Attention(c, name='attention_1')(nn.RMSNorm(name='norm_2')(x))
    y, aux = MoE(c, name='moe')(nn.RMSNorm(name='norm_3')(x))
    return x + y, aux


class Decoder(nn.Module):
  """From bytes [B, T] to logits of the next byte [B, T, V]."""

  config: Config

  @nn.compact
  def __call__(self, tokens):
    """Returns the logits, and what the sparse layers return, [L / 2, ...]."""
    c, init = self.config, nn.initializers.normal(0.02)
    table = self.param('embedding', init, (c.vocab_size, c.width))
    axes = dict(variable_axes={'params': 0}, split_rngs={'params': True})
    layers = nn.scan(TwoLayers, length=c.num_layers // 2, **axes)
    x, aux = layers(c, name='layers')(table[tokens], None)
    return nn.RMSNorm(name='final_norm')(x) @ table.T, aux


def loss_fn(params, tokens, config):
  """The loss of tokens [B, T + 1], with the numbers that are logged."""
  logits, aux = Decoder(config).apply({'params': params}, tokens[:, :-1])
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
  balance, z = aux['balance'].sum(), aux['z'].sum()
  loss = nats.mean() + config.balance_weight * balance + config.z_weight * z
  return loss, {'nats': nats.mean(), **aux}


def optimizer_of(c):
  """AdamW on clipped gradients, with a warm-up and half a cosine."""

  def rate(step):
    rise = (step + 1) / c.warmup_steps
    share = (step - c.warmup_steps) / (c.total_steps - c.warmup_steps)
    fall = 0.55 + 0.45 * jnp.cos(jnp.pi * share)
    return c.learning_rate * jnp.where(rise > 1, fall, rise)

  # Kernels alone decay, which have three axes with that of layers.
  decays = functools.partial(jax.tree.map, lambda x: x.ndim > 2)
  adamw = optax.adamw(rate, b2=0.98, weight_decay=0.1, mask=decays)
  return optax.chain(optax.clip_by_global_norm(1.0), adamw)


@functools.partial(jax.jit, static_argnames='config')
def train_step(params, opt_state, tokens, config):
  """Returns the next parameters and optimizer state, and numbers to log."""
  gradient, numbers = jax.grad(loss_fn, has_aux=True)(params, tokens, config)
  updates, opt_state = optimizer_of(config).update(gradient, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, numbers


@functools.partial(jax.jit, static_argnames='config')
def evaluate(params, tokens, config):
  """Nats a byte, with room for twice the choices."""
  config = dataclasses.replace(config, capacity_factor=2.0)
  return loss_fn(params, tokens, config)[1]['nats']


@functools.partial(jax.jit, static_argnames=('config', 'length'))
def sample(params, prompt, key, config, length=300, temperature=0.8):
  """The prompt, int32 [N], and so many bytes that the model adds to it."""

  def add_byte(i, text):
    start = jnp.maximum(i - config.seq_len, 0)
    window = jax.lax.dynamic_slice(text, (start,), (config.seq_len,))
    logits, _ = Decoder(config).apply({'params': params}, window[None])
    logits, draw_key = logits[0, i - start - 1], jax.random.fold_in(key, i)
    return text.at[i].set(
      jax.random.categorical(draw_key, logits / temperature)
    )

  text = jnp.pad(prompt, (0, length))
  return jax.lax.fori_loop(len(prompt), len(text), add_byte, text)


def read_text():
  """The bytes of Python's library to train on, and those of every 10th file."""
  files = sorted(pathlib.Path(os.__file__).parent.glob('*.py'))
  held_out = b''.join(file.read_bytes() for file in files[::10])
  text = b''.join(f.read_bytes() for i, f in enumerate(files) if i % 10)
  return np.frombuffer(text, np.uint8), np.frombuffer(held_out, np.uint8)


def batch(text, config, seed):
  """Windows of the text that begin anywhere, int32 [B, T + 1]."""
  T, rng = config.seq_len, np.random.default_rng(seed)
  starts = rng.integers(len(text) - T, size=config.batch_size)
  return np.stack([text[s : s + T + 1] for s in starts]).astype(np.int32)


def draw(path, text, aux, num_experts):
  """Writes bytes [T] as HTML, each on the colour of its first expert.

  Each sparse layer has a paragraph; bytes that were dropped stand on white.
  """
  page, names = [], ('expert', 'kept')
  experts, kept = (np.asarray(aux[name])[:, 0, :, 0] for name in names)
  for (layer, i), expert in np.ndenumerate(experts):
    hue, light = 360 * expert // num_experts, 80 if kept[layer, i] else 100
    colour = f'<span style="background:hsl({hue},80%,{light}%)">'
    page.append(
      f'{"<hr>" * (i == 0)}{colour}{html.escape(chr(text[i]))}</span>'
    )
  pathlib.Path(path).write_text(f'<pre>{"".join(page)}</pre>')


def main(config):
  """Trains, evaluates, samples and draws; returns the parameters."""
  (text, held_out), start = read_text(), time.time()
  test = [batch(held_out, config, i) for i in range(16)]
  params = Decoder(config).init(jax.random.key(0), test[0][:, :-1])['params']
  opt_state = optimizer_of(config).init(params)
  print(f'{sum(x.size for x in jax.tree.leaves(params)):,} parameters')
  for step in range(config.total_steps):
    tokens = batch(text, config, step)
    params, opt_state, log = train_step(params, opt_state, tokens, config)
    if step % 100 == 0 or step == config.total_steps - 1:
      nats = np.mean([evaluate(params, x, config) for x in test])
      load = np.asarray(100 * log['load'][-1]).round().astype(int)
      print(
        f'step {step}: {log["nats"]:.3f} nats a byte, {nats:.3f} held out; '
        f'{100 * log["dropped"].mean():.1f} % dropped, the last loads in % '
        f'{load}; {time.time() - start:.0f} s'
      )
  prompt = jnp.array([*b'def '])
  written = sample(params, prompt, jax.random.key(1), config)
  print(bytes(written.tolist()).decode('latin1'))
  _, aux = Decoder(config).apply({'params': params}, test[0][:, :-1])
  draw('routing.html', test[0][0, :-1], aux, config.num_experts)
  return params


if __name__ == '__main__':
  main(Config())
