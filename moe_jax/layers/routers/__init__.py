"""The routers, each in a file of its own, and their names in configs."""

from moe_jax.config import Kinds
from moe_jax.layers.routers.contract import Causality as Causality
from moe_jax.layers.routers.contract import Router as Router
from moe_jax.layers.routers.contract import RouterOptions as RouterOptions
from moe_jax.layers.routers.contract import Sizes as Sizes
from moe_jax.layers.routers.contract import TokenInfo as TokenInfo
from moe_jax.layers.routers.expert_choice import ExpertChoice
from moe_jax.layers.routers.hash import Hash
from moe_jax.layers.routers.hierarchical import Hierarchical
from moe_jax.layers.routers.noisy_top_k import NoisyTopK
from moe_jax.layers.routers.random import Random
from moe_jax.layers.routers.sentence import Sentence
from moe_jax.layers.routers.soft import Soft
from moe_jax.layers.routers.sparse_mixer import SparseMixer
from moe_jax.layers.routers.strictly_balanced import StrictlyBalanced
from moe_jax.layers.routers.task import Task
from moe_jax.layers.routers.token_choice import TokenChoice
from moe_jax.layers.routers.topology_aware import TopologyAware

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
