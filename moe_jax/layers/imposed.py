"""Choices that are imposed on the routers of sparse layers, by option.

A recorded routing is replayed, or experts are chosen evenly. Gates, losses and
gradients still come from the router's own logits.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.config import Options, option
from moe_jax.errors import InputError
from moe_jax.layers.routers import RouterOptions, Sizes
from moe_jax.layers.routers.contract import no_choices_taken
from moe_jax.routing import GivenChoices
from moe_jax.routing.rules_without_logits import choice_in_turn
from moe_jax.shapes import Array, Bool, Int, Int32, PRNGKey

FORCED = IN_TURN, AT_RANDOM = 'round_robin', 'random'
# Seed of the random choices of evaluations and of generation.
_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImposedOptions(Options):
  """The options by which something else than the router chooses experts."""

  force_balance: str = option(
    '',
    'Choice of experts whatever the logits are, for measurements of speed: '
    f'{IN_TURN!r} gives choices to the experts in turn, {AT_RANDOM!r} draws '
    'them, anew at each step in training. In generation a row has the same '
    'experts at every token. Gates are those of the logits. An empty string '
    'leaves the choice to the router.',
    choices=('', *FORCED),
  )
  replay: str = option(
    '',
    'Folder of the trace of another run on the same batches, whose choices of '
    'experts and drops each training step takes over from its record of the '
    'step; evaluations choose by themselves. An empty string leaves the choice '
    'to the router.',
    same_function=True,
  )

  def imposed_problems(self, router: RouterOptions) -> Iterator[str]:
    """The reasons why choices cannot be imposed on a router, as texts."""
    forced, replay = self.force_balance, self.replay
    if forced and replay:
      yield (
        f'force_balance={forced!r} with replay={replay!r}: experts are chosen '
        'by one of them'
      )
      return
    reason = no_choices_taken(router)
    if forced and router.by_expert and not router.mixes:
      name = type(router).__name__
      reason = f'the experts of {name} choose tokens, equally many each'
    if reason is not None and (forced or replay):
      name = 'force_balance' if forced else 'replay'
      yield f'{name}={forced or replay!r}: {reason}'

  @property
  def forced(self) -> str:
    """The warning for readers of results that choices are forced; '' if not.

    Every output of a model with forced choices has to show this text.
    """
    if not self.force_balance:
      return ''
    return (
      f'moe.force_balance={self.force_balance!r}: experts are chosen whatever '
      "the router's logits are; speeds are those of such loads, and losses are "
      'not those of a model with a router'
    )


def forced_choices(
  kind: str,
  mask: Bool[Array, 'G S'],
  sizes: Sizes,
  layer: int | Int[Array, ''],
  key: PRNGKey | None,
) -> GivenChoices:
  """The choices of `ImposedOptions.force_balance` in one layer.

  Args:
    kind: The value of the option, which is not empty.
    mask: False for padding.
    sizes: The sizes of the layer.
    layer: The index of the layer; each layer has other choices.
    key: The key of random choices; None: they are the same each time.
  """
  E, K = sizes.num_experts, sizes.num_selected
  if kind == IN_TURN:
    expert = choice_in_turn(mask, num_experts=E, num_selected=K, first=layer)
    return GivenChoices(expert)
  if key is None:
    key = jax.random.fold_in(jax.random.key(_SEED), layer)
  G, S = mask.shape
  expert = routing.random_choice(
    key, num_groups=G, group_size=S, num_experts=E, num_selected=K
  )
  return GivenChoices(expert)


def check_given(given: GivenChoices | None, sparse: Sequence[bool]) -> None:
  """Raises ValueError unless choices are [B, T, L, K] of L sparse layers.

  Args:
    given: The choices that are imposed on a stack of layers, if any.
    sparse: A flag for each layer, whether it has experts.
  """
  if given is None:
    return
  shape, L = given.expert.shape, sum(sparse)
  if len(shape) != 4 or shape[2] != L:
    raise InputError(
      f'given.expert has shape {shape}, and [B, T, L, K] is needed for the '
      f'L={L} sparse layers'
    )


def given_to_layer(
  given: GivenChoices | None,
  sparse: Sequence[bool],
  layer: int | Int32[Array, ''],
) -> GivenChoices | None:
  """The choices [B, T, K] of one layer, whose index may be traced.

  For a layer that is not sparse these are the choices of another layer, and the
  layer has to ignore them.
  """
  if given is None:
    return None
  index = jnp.asarray(np.cumsum(sparse, dtype=np.int32) - 1)[layer]
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, 2, keepdims=False), given
  )
