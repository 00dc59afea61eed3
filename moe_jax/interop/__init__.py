"""Hugging Face checkpoints in and out; `ARCHITECTURES` lists their families.

    options, model, variables = interop.load('google/switch-base-8')
    interop.save(options, variables, 'folder')

On the command line: `python -m moe_jax.interop import | export | verify`.
"""

from moe_jax.interop.checkpoint_folder import ARCHITECTURES
from moe_jax.interop.loading import Loaded, load
from moe_jax.interop.saving import save

__all__ = ['ARCHITECTURES', 'Loaded', 'load', 'save']
