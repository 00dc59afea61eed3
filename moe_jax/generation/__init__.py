"""Generation: text from a trained model."""

from moe_jax.generation.sampling import sample

__all__ = ['sample']
