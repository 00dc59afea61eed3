"""The routers: one file each, and the list of them that configs choose from."""

from moe_jax.config import Kinds
from moe_jax.layers.routers.by_expert import ExpertChoice, StrictlyBalanced
from moe_jax.layers.routers.contract import Router, RouterOptions
from moe_jax.layers.routers.hierarchical import Hierarchical
from moe_jax.layers.routers.noisy_top_k import NoisyTopK
from moe_jax.layers.routers.sentence import Sentence
from moe_jax.layers.routers.sizes import Sizes
from moe_jax.layers.routers.soft import Soft
from moe_jax.layers.routers.sparse_mixer import SparseMixer
from moe_jax.layers.routers.task import Task
from moe_jax.layers.routers.token_choice import TokenChoice
from moe_jax.layers.routers.topology_aware import TopologyAware
from moe_jax.layers.routers.without_logits import Hash, Random

ROUTERS = Kinds(
  'router',
  RouterOptions,
  {
    'token_choice': TokenChoice,
    'noisy_top_k': NoisyTopK,
    'expert_choice': ExpertChoice,
    'strictly_balanced': StrictlyBalanced,
    'hash': Hash,
    'random': Random,
    'hierarchical': Hierarchical,
    'sentence': Sentence,
    'task': Task,
    'topology': TopologyAware,
    'sparse_mixer': SparseMixer,
    'soft': Soft,
  },
)

__all__ = [
  'ROUTERS',
  'ExpertChoice',
  'Hash',
  'Hierarchical',
  'NoisyTopK',
  'Random',
  'Router',
  'RouterOptions',
  'Sentence',
  'Sizes',
  'Soft',
  'SparseMixer',
  'StrictlyBalanced',
  'Task',
  'TokenChoice',
  'TopologyAware',
]
