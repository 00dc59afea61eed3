"""Generation: tokens and text from a trained or imported model."""

from moe_jax.data.tokenizers import TextStream
from moe_jax.generation.beams import beam_search
from moe_jax.generation.decode_loop import generate
from moe_jax.generation.prefix import prepare
from moe_jax.generation.trained_run import load

__all__ = [
  'TextStream',
  'beam_search',
  'generate',
  'load',
  'prepare',
]
