"""Packaging: `pip install -e .` and its extras."""

import pathlib

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent

DIGITS = 'scikit-learn>=1.4'  # its images
DJANGO = 'django>=5'  # its gettext catalogues
PLOTS = ['matplotlib>=3.8']
LIBTPU = 'jax[tpu]; sys_platform=="linux" and platform_machine=="x86_64"'
# What checkpoints are compared with, and speed; bugs of that release included.
TORCH = 'torch>=2.6'
TRANSFORMERS = 'transformers==5.24.*'
PEFT = 'peft>=0.19'  # adapters that ours are compared with
TEST = [
  'beartype>=0.18',
  DIGITS,
  DJANGO,
  'hypothesis>=6.100',
  'ipykernel>=6.29',
  'nbclient>=0.10',
  'nbformat>=5.10',
  'pytest>=8.0',
  'pytest-xdist>=3.5',
  'ruff>=0.6',
  'scipy>=1.11',
  TRANSFORMERS,
]

setup(
  name='moe_jax',
  version='0.1.0',
  description='Sparse mixture-of-experts models in JAX, one code for all',
  long_description=(here / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  url='https://github.com/moe-jax/moe_jax',  # notebooks name it, too
  license='Apache-2.0',
  packages=find_packages(include=['moe_jax', 'moe_jax.*']),
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'array_record>=0.5',
    'etils[epath]>=1.5',
    'flax>=0.12',
    'grain>=0.2.12',
    'huggingface_hub>=1.0',
    'importlib_resources>=6.0',
    'jax>=0.10',
    'jaxtyping>=0.3',
    'jinja2>=3.1',
    'ml_collections>=1.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11',
    'rich>=13.0',
    'sacrebleu>=2.4',
    'safetensors>=0.4.5',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.7',
    'tokenizers>=0.20',
    *PLOTS,
  ],
  extras_require={
    'test': [*TEST, TORCH, PEFT],
    # Tests of what is compared with torch are then skipped.
    'test-without-torch': TEST,
    'colab': ['ipykernel>=6.29', 'ipywidgets>=8', 'nbformat>=5.10', DIGITS],
    'experiments': [DIGITS, DJANGO, 'scipy>=1.11', LIBTPU, TORCH, TRANSFORMERS],
  },
)
