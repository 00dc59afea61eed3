"""Generation: tokens and text from a trained or imported model."""

# `import X as X` marks the name X as public.
from moe_jax.data.tokenizers import TextStream as TextStream
from moe_jax.generation.beams import beam_search as beam_search
from moe_jax.generation.decode_loop import generate as generate
from moe_jax.generation.prefix import prepare as prepare
from moe_jax.training.trained import load as load
