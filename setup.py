"""Packaging: `pip install -e .`, its extras, and the wheel."""

import pathlib

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# The address that notebooks and documents name; a test compares them with it.
REPOSITORY = 'https://github.com/moe-jax/moe_jax'
here = pathlib.Path(__file__).parent

DIGITS = 'scikit-learn>=1.4'  # its images
DJANGO = 'django>=5'  # its gettext catalogues
PARQUET = 'pyarrow>=16'  # parquet files, and .zst
SLURM = 'submitit>=1.5'  # studies on a cluster
SCORES = 'sacrebleu>=2.4'  # BLEU and chrF
SENTENCEPIECE = 'sentencepiece>=0.2.1'  # unigram tokenizers
NOTEBOOK = ['ipykernel>=6.29', 'ipywidgets>=8.1', 'nbformat>=5.10']
# Checkpoints and speed are compared with this release, whose bugs count, too.
TORCH = 'torch>=2.6'
TRANSFORMERS = 'transformers==5.24.*'
PEFT = 'peft>=0.19'  # adapters that ours are compared with
TEST = [
  *NOTEBOOK,
  'beartype>=0.18',
  DIGITS,
  DJANGO,
  PARQUET,
  SCORES,
  SENTENCEPIECE,
  'hypothesis>=6.100',
  'import-linter>=2.5',
  'jsonschema>=4.18',
  'nbclient>=0.10',
  'pytest>=8.0',
  'pytest-xdist>=3.5',
  'ruff>=0.6',
  'setuptools>=77',
  SLURM,
  TRANSFORMERS,
]
COMMANDS = {
  'moe-train': 'moe_jax.main:main',
  'moe-generate': 'moe_jax.generate:main',
  'moe-cost': 'moe_jax.analysis.cost:main',
  'moe-interop': 'moe_jax.interop.__main__:main',
  'moe-compress': 'moe_jax.compression.__main__:main',
  'moe-routes': 'moe_jax.analysis.routes:main',
  'moe-prepare': 'moe_jax.data.prepare:main',
  'moe-sweep': 'moe_jax.sweep:main',
}


class BuildWithConfigs(build_py):
  """Copies `configs/` into the package, where `moe_jax.configs` finds it.

  An editable installation reads the folder where it is.
  """

  def run(self):
    """Builds the package, then adds the configs."""
    super().run()
    for source, target in self._configs():
      if not self.editable_mode:
        self.copy_file(source, target)

  def _configs(self):
    """The path of each config, and that of its copy."""
    folder = pathlib.Path(self.build_lib, 'moe_jax', 'configs')
    for path in sorted(pathlib.Path('configs').glob('*.py')):
      yield str(path), str(folder / path.name)

  def get_source_files(self):
    """Everything that the build reads, for source distributions."""
    return super().get_source_files() + [path for path, _ in self._configs()]

  def get_outputs(self, include_bytecode=1):
    """Everything that the build writes."""
    copies = [] if self.editable_mode else [to for _, to in self._configs()]
    return super().get_outputs(include_bytecode) + copies


setup(
  name='moe_jax',
  version='0.1.0',
  description='Sparse mixture-of-experts models in JAX, one code for all',
  long_description=(here / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  url=REPOSITORY,
  project_urls={
    'Documentation': f'{REPOSITORY}#readme',
    'Issues': f'{REPOSITORY}/issues',
    'Source': REPOSITORY,
  },
  license='Apache-2.0',
  license_files=['LICENSE'],
  classifiers=[
    'Development Status :: 4 - Beta',
    'Environment :: GPU :: NVIDIA CUDA',
    'Intended Audience :: Science/Research',
    'Operating System :: MacOS',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3 :: Only',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
    'Typing :: Typed',
  ],
  packages=find_packages(include=['moe_jax', 'moe_jax.*']),
  package_data={'moe_jax': ['py.typed', 'analysis/run_page.html']},
  cmdclass={'build_py': BuildWithConfigs},
  entry_points={
    'console_scripts': [f'{name} = {at}' for name, at in COMMANDS.items()]
  },
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'array_record>=0.5',
    'etils[epath]>=1.5',
    'filelock>=4',
    'flax>=0.12',
    'fsspec>=2024.6',
    'grain>=0.2.12',
    'huggingface_hub>=1.0',
    'importlib_resources>=6.0',
    'jax>=0.10',
    'jaxtyping>=0.3',
    'jinja2>=3.1',
    'matplotlib>=3.8',
    'ml_collections>=1.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11',
    'rich>=13.0',
    'safetensors>=0.4.5',
    'scipy>=1.11',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.7',
    'tokenizers>=0.20',
    'universal_pathlib>=0.3',
  ],
  extras_require={
    # Extras of jax for accelerators, in the release of the jax that is there;
    # its `cuda12` is for drivers that are older than CUDA 13.
    'cuda': ['jax[cuda13]'],
    'cuda12': ['jax[cuda12]'],
    'tpu': ['jax[tpu]'],
    # The compiler for TPUs on a machine that has none. It makes every command
    # look for one, and say that there is none.
    'tpu-compiler': [
      'jax[tpu]; sys_platform=="linux" and platform_machine=="x86_64"'
    ],
    'test': [*TEST, TORCH, PEFT],
    'types': ['pyright[nodejs]==1.1.414'],
    # Tests of what is compared with torch are then skipped.
    'test-without-torch': TEST,
    'data': [PARQUET],
    'scores': [SCORES],
    'sentencepiece': [SENTENCEPIECE],
    'beam': ['apache-beam>=2.65'],
    'tokamax': ['tokamax>=0.0.12'],  # its grouped products
    'trackers': ['mlflow-skinny>=3', 'wandb>=0.19'],
    'colab': [*NOTEBOOK, DIGITS],
    'slurm': [SLURM],
    'experiments': [DIGITS, DJANGO, SCORES, TORCH, TRANSFORMERS],
  },
)
