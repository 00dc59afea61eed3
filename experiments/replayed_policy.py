"""What does replay of a rollout's routing leave of the gap to its policy?

    python -m experiments.replayed_policy --preset=quick

In reinforcement learning a server draws texts in low precision, and a trainer
computes their probabilities anew in another one. Rounding moves logits of
routers, so that some tokens go to other experts than in the server, and the two
policies differ although their parameters do not. Rollout Routing Replay
(https://arxiv.org/abs/2510.11370) imposes the server's experts on the trainer,
whose own routers still make the gates. That is the question here; none of the
paper's numbers is printed.

Here: a four-layer byte-level decoder, top-8 of 64 experts, is trained on text
with all in float32. Then a policy gradient goes on with its parameters, on a
toy task: a rollout reads 16 bytes of validation text and draws 24 more, and its
reward is the share of these that are lower-case vowels, which is exact. Of each
prompt there are eight rollouts. A rollout's advantage is its reward less the
mean of its prompt, by the deviation of its prompt (GRPO), and the loss is minus
the mean of advantage times importance ratio, with one update for each batch of
rollouts. Rollouts are drawn token by token with a cache, in bfloat16 (routers
compute in float32 from what they are given). What is recorded are the very
logits and experts that the sampler drew with; nothing is read again. The loss
is computed by a whole pass in float32.

The KL divergence of a byte is exact, the sum over the vocabulary of the
sampler's probability times the difference of logarithms, the trainer's behind.
A ratio is the trainer's probability of a drawn byte by the sampler's. Flips are
choices of the sampler that the trainer does not make, of all tokens read. All
are taken before each update and averaged over updates. The two arms begin with
equal parameters, prompts and keys, and then each goes its own way; no claim is
about rewards. In a control, rollouts are drawn in float32.

Sizes were chosen by trials of 300 steps and up to eight updates with another
seed. Then 20 updates were run with the seeds that are reported, and cut to
eight when their results were known, so that one choice in a hundred flips. So
the comparisons here are no guesses, and count as checks; they were written
before those runs. The quick preset decides nothing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.study import byte_models, command, parts, routing
from experiments.study.parts import Arm, Column, Figure, Preset, Row, percent
from experiments.study.study import Study
from moe_jax.models import Model
from moe_jax.models.base import REPLAYED
from moe_jax.models.recorded import Choices, recording
from moe_jax.routing.given_choice_rule import OPEN
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

PLAIN, REPLAY, EXACT = 'not replayed', 'replayed', 'float32 rollouts'
# The sampler's type, and whether its experts are replayed, by the row's name.
CASES = {
  PLAIN: ('bfloat16', False),
  REPLAY: ('bfloat16', True),
  EXACT: ('float32', False),
}
PROMPTS, GROUP, READ, DRAWN = 8, 8, 16, 24
UPDATES, OPTIMIZER = 8, optax.adam(1e-3)
REWARDED = np.isin(np.arange(257), [*b'aeiou'])
# Names of the other arm's numbers that are divided by, and of the quotients.
LEFT = {'kl': 'kl_left', 'spread': 'spread_left'}
FLIPS, KL_LEFT, SPREAD_LEFT = 'flips', 'KL left', 'spread left'
COLUMNS = [
  Column('KL', 'routing/*/kl', '1e-6 nats/byte', 2, lambda x: 1e6 * x),
  percent(KL_LEFT, 'routing/*/kl_left', digits=3, bounds=parts.POSITIVE),
  percent('ratio spread', 'routing/*/spread', digits=3, bounds=parts.POSITIVE),
  percent(SPREAD_LEFT, 'routing/*/spread_left', bounds=parts.POSITIVE),
  percent('largest change', 'routing/*/largest', bounds=parts.POSITIVE),
  percent(FLIPS, 'routing/*/flips', digits=2),
  percent('first reward', 'routing/*/first_reward'),
  percent('last reward', 'routing/*/last_reward'),
]


def config(steps: int):
  """The config of the model whose training a policy gradient goes on with."""
  config = byte_models.decoder(
    steps,
    num_layers=4,
    num_experts=64,
    num_selected=8,
    expert_hidden=32,
    drops=False,
  )
  config.model.moe.router.token_choice.gates = 'renormalized'
  return config


def experts_of(model: Model, choices: Choices) -> jax.Array:
  """The experts [B, T, L, K] that tokens chose in the L sparse layers."""
  layers = [choices[layer].expert for layer in model.stacks.sparse_layers]
  return jnp.stack(layers, 2)


@functools.partial(jax.jit, static_argnames='model')
def rollouts(
  model: Model, variables: Any, prompts: jax.Array, key: jax.Array
) -> routing.Batch:
  """Draws DRAWN bytes after prompts [B, READ], token by token with a cache.

  Returns:
    A batch as in training, in which drawn bytes alone have a loss weight, with
    the sampler's log probabilities 'sampled' [B, T, V] and its experts
    'experts' [B, T, L, K].
  """
  B, T = len(prompts), READ + DRAWN - 1
  model, variables = model.for_decoding(variables, batch_size=B)
  is_real = jnp.ones((B, 1), bool)

  def step(carry, place):
    cache, token = carry
    (logits, cache), choices = recording(
      model, variables, token[:, None], is_real, cache, method='decode'
    )
    sampled = jax.nn.log_softmax(logits[:, 0])
    drawn = jax.random.categorical(jax.random.fold_in(key, place), sampled)
    read = prompts[:, jnp.minimum(place + 1, READ - 1)]
    target = jnp.where(place + 1 < READ, read, drawn).astype(token.dtype)
    experts = experts_of(model, choices)[:, 0]
    return (cache, target), (token, target, sampled, experts)

  carry = model.make_cache(B, T), prompts[:, 0]
  _, steps = jax.lax.scan(step, carry, jnp.arange(T))
  names = 'tokens', 'targets', 'sampled', 'experts'
  batch = {n: jnp.moveaxis(x, 0, 1) for n, x in zip(names, steps, strict=True)}
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  return batch | {
    'positions': positions,
    'segment_ids': jnp.ones((B, T), jnp.int32),
    'loss_weights': (positions >= READ - 1).astype(jnp.float32),
  }


def rewards_and_advantages(batch: routing.Batch) -> tuple[jax.Array, jax.Array]:
  """The share of drawn bytes that are rewarded [B], and its advantage [B]."""
  drawn = batch['targets'][:, READ - 1 :]
  rewards = jnp.asarray(REWARDED)[drawn].mean(1)
  grouped = rewards.reshape(-1, GROUP)
  mean, deviation = (f(grouped, 1, keepdims=True) for f in (jnp.mean, jnp.std))
  return rewards, ((grouped - mean) / (deviation + 1e-4)).ravel()


@functools.partial(jax.jit, static_argnames='model')
def updated(
  model: Model,
  replays: bool,
  variables: Any,
  opt_state: Any,
  batch: routing.Batch,
) -> tuple[Any, Any, dict[str, jax.Array]]:
  """Takes one step of the policy gradient; see the text above for measures."""
  experts, weights = batch['experts'], batch['loss_weights']
  rewards, advantages = rewards_and_advantages(batch)
  imposed = jnp.where(replays, experts, OPEN).astype(experts.dtype)
  choices = dict(zip(REPLAYED, (imposed, imposed != OPEN), strict=True))
  inputs = model.inputs({**batch, **choices})

  def loss(params):
    (logits, _), own = recording(
      model, {**variables, 'params': params}, **inputs
    )
    log_probs = jax.nn.log_softmax(logits)
    gap = log_probs - batch['sampled']
    targets = batch['targets'][..., None]
    ratio = jnp.exp(jnp.take_along_axis(gap, targets, -1)[..., 0])
    gain = (advantages[:, None] * ratio * weights).sum() / weights.sum()
    return -gain, (gap, ratio, experts_of(model, own))

  grad = jax.grad(loss, has_aux=True)
  grads, (gap, ratio, own) = grad(variables['params'])
  updates, opt_state = OPTIMIZER.update(grads, opt_state)
  params = optax.apply_updates(variables['params'], updates)
  kept = (experts[..., None] == own[..., None, :]).any(-1)
  kl = -(jnp.exp(batch['sampled']) * gap).sum(-1)
  change = jnp.where(weights > 0, ratio - 1, 0)
  measures = {
    'kl': (kl * weights).sum() / weights.sum(),
    'spread': jnp.sqrt((change**2).sum() / weights.sum()),
    'largest': jnp.abs(change).max(),
    'flips': (~kept).mean(),
    'reward': rewards.mean(),
  }
  return {**variables, 'params': params}, opt_state, measures


def trained(run: Run, state: TrainState, case: str) -> dict[str, float]:
  """Trains the policy of one case of `CASES`; returns means over updates."""
  dtype, replays = CASES[case]
  options = run.options.filled(run.dataset.vocab_size)
  numerics = dataclasses.replace(options.model.numerics, dtype=dtype)
  sampler = dataclasses.replace(options.model, numerics=numerics).build()
  variables = run.programs.variables(state)
  opt_state = OPTIMIZER.init(variables['params'])
  rows = routing.spread_rows(run, PROMPTS * UPDATES)['tokens'][:, :READ]
  rng, measures = np.random.default_rng(options.seed), []
  key = jax.random.key(options.seed)
  for i, prompts in enumerate(np.split(rng.permutation(rows), UPDATES)):
    repeated = np.repeat(prompts, GROUP, 0)
    batch = rollouts(sampler, variables, repeated, jax.random.fold_in(key, i))
    variables, opt_state, of_update = updated(
      run.model, replays, variables, opt_state, batch
    )
    measures.append(jax.device_get(of_update))
  values = {name: [float(m[name]) for m in measures] for name in measures[0]}
  rewards, tenth = values.pop('reward'), max(UPDATES // 10, 1)
  return {name: float(np.mean(x)) for name, x in values.items()} | {
    'first_reward': float(np.mean(rewards[:tenth])),
    'last_reward': float(np.mean(rewards[-tenth:])),
  }


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures of the policies of all cases, by `routing/<case>/<measure>`."""
  numbers = {case: trained(run, state, case) for case in CASES}
  for name, left in LEFT.items():
    numbers[REPLAY][left] = numbers[REPLAY][name] / numbers[PLAIN][name]
  return routing.named(numbers)


def rows(results: parts.Results) -> list[Row]:
  """A row of each case; the model that all begin with is the same."""
  (runs,) = results.values()
  return [routing.row_at(case, runs, COLUMNS, case) for case in CASES]


STUDY = Study(
  name='replayed_policy',
  title='What replay of a rollout leaves of the gap between two policies',
  source='Rollout Routing Replay, 2025 (arXiv:2510.11370; none of its numbers)',
  config=config,
  arms=lambda _: [Arm('top-8 of 64', {})],
  rows=rows,
  presets={
    'quick': parts.trial(100, 3, why='routers hardly differ'),
    'full': Preset(600, 5),
  },
  columns=COLUMNS,
  claims={
    'one choice in a hundred flips': f'{FLIPS}: {PLAIN} > 1',
    'replay leaves no tenth of the divergence': f'{KL_LEFT}: {REPLAY} < 10',
    'replay leaves no half of the spread of ratios': (
      f'{SPREAD_LEFT}: {REPLAY} < 50'
    ),
    'most of what replay leaves is not there in float32': (
      f'KL: {EXACT} < {REPLAY}'
    ),
  },
  figure=Figure(['KL', 'ratio spread', FLIPS]),
  measure=measure,
  remarks='KL is that of the trainer from the sampler, exact over the '
  'vocabulary, a mean over drawn bytes and updates. The ratio spread is the '
  'root mean square of importance ratios less one, the largest change the mean '
  'over updates of the largest. Flips are choices of the sampler that the '
  'trainer does not make; with replay it makes them as they are imposed. '
  'Rewards are shares of vowels in the first and last tenth of updates, and '
  'decide nothing. Both policies have the same rate, which was not searched.',
  written='2026-12-02',
  earlier=[
    'On 2026-12-02, with 20 updates, 0.92 ± 0.10 % of choices flipped, and '
    'replay left 2.462 ± 0.512 % of the divergence and 15.9 ± 2.2 % of the '
    'spread of ratios. Flips become rarer as the policy narrows; so that one '
    'choice in a hundred flips, updates were cut to eight.'
  ],
)
get_config, get_items = command.entries(STUDY, __name__)
