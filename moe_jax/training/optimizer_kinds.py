"""The kinds of optimizers that a config can name."""

from moe_jax.options import Kinds
from moe_jax.training.muon import Muon
from moe_jax.training.optimizer import Adafactor, AdamW, Optimizer

OPTIMIZERS = Kinds(
  'optimizer',
  Optimizer,
  {'adamw': AdamW, 'adafactor': Adafactor, 'muon': Muon},
  inline=True,
)
