"""Imports point down: the rule of the design, checked in the code."""

import ast
import functools
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
# These are the parts of moe_jax that each part may import, besides itself.
OPTIONS = {
  'options', 'plugins', 'sections', 'section_reader',
}  # fmt: skip
BASE = {'shapes', 'shape_checks', 'memory_room'} | OPTIONS
UP_TO_LAYERS = BASE | {
  'routing',
  'kernels',
  'layers',
  'partitioning',
  'distributed',
}
UP_TO_RUNS = UP_TO_LAYERS | {'models', 'data', 'runs'}
UP_TO_TRAINING = UP_TO_RUNS | {'training'}
ALLOWED = {
  'configs': set(),
  'errors': set(),  # which every part may import
  'shapes': set(),
  'shape_checks': set(),
  'memory_room': set(),
  'options': OPTIONS,
  'sections': OPTIONS,
  'section_reader': OPTIONS,
  'plugins': OPTIONS,
  'distributed': BASE,
  'routing': BASE,
  'kernels': BASE,
  'partitioning': BASE,
  'parallel': BASE | {'routing', 'partitioning'},
  'layers': UP_TO_LAYERS - {'layers'} | {'parallel'},
  'models': UP_TO_LAYERS | {'parallel'},
  'data': BASE,
  'runs': UP_TO_RUNS - {'runs'},
  'training': UP_TO_RUNS | {'parallel'},
  'finetuning': UP_TO_TRAINING | {'command_line', 'config_file'},
  'generation': UP_TO_LAYERS | {'models', 'data', 'runs'},
  'interop': UP_TO_TRAINING | {'command_line', 'config_file', 'run_config'},
  'compression': UP_TO_TRAINING | {'command_line', 'config_file', 'finetuning'},
  'analysis': UP_TO_LAYERS
  | {
    'models',
    'data',
    'runs',
    'training',
    'run_config',
    'command_line',
    'compile_cache',
  },
  'evaluation': BASE
  | {
    'data',
    'distributed',
    'generation',
    'models',
    'partitioning',
    'runs',
    'training',
  },
  'config_file': OPTIONS,
  'command_line': BASE | {'config_file', 'data', 'runs'},
  'hooks': UP_TO_TRAINING | {'analysis', 'generation'},
  'dry_run': UP_TO_TRAINING | {'analysis', 'evaluation', 'hooks', 'run_config'},
  'generate': OPTIONS
  | {
    'analysis',
    'command_line',
    'compile_cache',
    'data',
    'generation',
    'memory_room',
    'models',
    'runs',
  },
  'run_config': OPTIONS
  | {
    'compression',
    'config_file',
    'evaluation',
    'finetuning',
    'models',
    'training',
  },
  'compile_cache': {'data'},
  'prepare': {'command_line', 'run_config', 'data'},
  'main': {
    'command_line',
    'compile_cache',
    'compression',
    'config_file',
    'data',
    'distributed',
    'dry_run',
    'hooks',
    'memory_room',
    'run_config',
    'runs',
    'training',
  },
  '__init__': UP_TO_LAYERS | {'models'},
}
# Some parts may import these modules although the rest of their part is closed
# to them: tokenizers, checkpoints and folders of runs. `explain_cost` has to
# build the training step; evaluations are called by the training loop and use
# nothing of it; an imported checkpoint gets the options of a run.
TOKENIZERS = ('moe_jax.data.tokenizers',)
CHECKPOINTS = (
  'moe_jax.runs.checkpointer', 'moe_jax.training.trained', 'moe_jax.runs.workdir'
)  # fmt: skip
FOLDERS = (*CHECKPOINTS, 'moe_jax.training.new_run')
NARROW = {
  'generation': {
    'data': (
      *TOKENIZERS,
      'moe_jax.data.DataOptions',
      'moe_jax.data.TaskOptions',
    ),
    'runs': CHECKPOINTS,
  },
  'interop': {
    'runs': FOLDERS,
    'training': ('moe_jax.training.run_options',),
  },
  'compression': {'runs': FOLDERS},
  'analysis': {
    'data': (
      *TOKENIZERS,
      'moe_jax.data.DataOptions',
      'moe_jax.data.SPLITS',
      'moe_jax.data.cache_folders',
      'moe_jax.data.load',
    ),
    'runs': (
      *CHECKPOINTS,
      'moe_jax.runs.metrics',
      'moe_jax.runs.summary',
    ),
    'training': (
      'moe_jax.training.evaluate',
      'moe_jax.training.programs',
      'moe_jax.training.run_options',
      'moe_jax.training.setup',
    ),
  },
  'evaluation': {
    'runs': ('moe_jax.runs.metrics', 'moe_jax.runs.workdir'),
    'training': (
      'moe_jax.training.evaluate',
      'moe_jax.training.step',
    ),
  },
}


@functools.cache
def nodes_of(text: str) -> list[ast.AST]:
  """The imports and attributes of a source, anywhere in it."""
  kinds = ast.Import | ast.ImportFrom | ast.Attribute
  return [n for n in ast.walk(ast.parse(text)) if isinstance(n, kinds)]


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names that a file imports, anywhere in it."""
  names = set()
  for node in nodes_of(path.read_text(encoding='utf-8')):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def broken_rules(part: str, names: set[str]) -> list[str]:
  """The imports of one file in `part` that the layout forbids."""
  forbidden, allowed = [], ALLOWED[part]
  for name in names:
    top, _, rest = name.partition('.')
    if top in ('configs', 'experiments', 'tests'):
      forbidden.append(name)
    if top != 'moe_jax':
      continue
    target = rest.split('.')[0]
    if target in (part, 'errors'):
      continue
    prefixes = NARROW.get(part, {}).get(target, ('',))
    if target not in allowed or not name.startswith(prefixes):
      forbidden.append(name)
  return sorted(forbidden)


def test_imports_point_down():
  violations = {}
  for path in sorted((ROOT / 'moe_jax').rglob('*.py')):
    part = path.relative_to(ROOT / 'moe_jax').parts[0].removesuffix('.py')
    assert part in ALLOWED, f'moe_jax/{part} has no import rule'
    if broken := broken_rules(part, imports(path)):
      violations[str(path.relative_to(ROOT))] = broken
  assert not violations


def test_configs_import_nothing_above_the_package():
  allowed = {'ml_collections', 'moe_jax', 'typing'}
  for path in sorted((ROOT / 'configs').glob('*.py')):
    assert {name.split('.')[0] for name in imports(path)} <= allowed, path.name


# JAX removes such modules without notice; their replacements are listed too.
PRIVATE = ('jax.core', 'jax.interpreters', 'jax.lib', 'jaxlib')
# The parser of Triton programs is used with a jaxlib that can lower to them.
EXCEPTIONS = {'tests/kernels/test_pallas_gpu.py': 'jaxlib.triton.dialect'}

# Names such as `_replace`, which every NamedTuple has, are public.
PRIVATE_NAME = re.compile(
  r'_(?!(fields|replace|asdict|make)$)[a-z]', re.IGNORECASE
).match


def dotted(node: ast.Attribute) -> str:
  """The source of an attribute; `ast.unparse` is slow."""
  names, inner = [node.attr], node.value
  while isinstance(inner, ast.Attribute):
    names.append(inner.attr)
    inner = inner.value
  if not isinstance(inner, ast.Name):
    return ast.unparse(node)
  return '.'.join([inner.id, *reversed(names)])


def private_names(text: str) -> set[str]:
  """Other libraries' private names in a source, which a release may remove."""
  names = set()
  for node in nodes_of(text):
    if isinstance(node, ast.Attribute):
      names.add(dotted(node))
    elif isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    else:
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return {
    name
    for name in names
    if f'{name}.'.startswith(tuple(f'{prefix}.' for prefix in PRIVATE))
    or re.match(r'(jax|flax|optax|orbax|grain)\b.*\._(?!_)', name)
  }


def test_no_private_name_of_a_library_is_used():
  violations = {}
  for room in ('moe_jax', 'configs', 'experiments', 'tests'):
    for path in sorted((ROOT / room).rglob('*.py')):
      name = str(path.relative_to(ROOT))
      names = private_names(path.read_text(encoding='utf-8'))
      if names := names - {EXCEPTIONS.get(name)}:
        violations[name] = names
  assert not violations


def test_a_private_name_is_seen():
  assert private_names('from jax import core') == {'jax.core'}
  assert private_names('import jax._src.core')
  assert private_names('jax.core.jaxprs_in_params(x)')
  assert private_names('optax._src.base.X')
  assert private_names('from jaxlib import xla_client')
  assert not private_names('from jax.extend import core')
  assert not private_names('from jax.extend.core import Literal')
  assert not private_names('jax.__version_info__')
  assert not private_names('self._core')


def private_to_the_project(text: str) -> set[str]:
  """Private names of the project's modules that a source uses."""
  modules, private = set(), set()
  for node in nodes_of(text):
    if not isinstance(node, ast.ImportFrom):
      continue
    if node.module.split('.')[0] in ('moe_jax', 'experiments', 'configs'):
      modules |= {alias.asname or alias.name for alias in node.names}
      private |= {
        alias.name for alias in node.names if PRIVATE_NAME(alias.name)
      }
  for node in nodes_of(text):
    if isinstance(node, ast.Attribute) and PRIVATE_NAME(node.attr):
      name = dotted(node)
      if name.split('.')[0] in modules:
        private.add(name)
  return private


def test_tests_use_public_names_alone():
  violations = {}
  for path in sorted((ROOT / 'tests').rglob('*.py')):
    if names := private_to_the_project(path.read_text(encoding='utf-8')):
      violations[str(path.relative_to(ROOT))] = names
  assert not violations


def test_a_private_name_of_the_project_is_seen():
  assert private_to_the_project('from moe_jax import a\na._b(1)') == {'a._b'}
  assert private_to_the_project('from moe_jax import a\na.b._c(1)')
  assert private_to_the_project('from moe_jax.a import _b') == {'_b'}
  assert private_to_the_project('from moe_jax import a as d\nd._b') == {'d._b'}
  assert not private_to_the_project('from moe_jax import a\nx._b, a.b')
  assert not private_to_the_project('from moe_jax.a import __main__')
  assert not private_to_the_project('from moe_jax.a import A\nA._fields')


def test_a_forbidden_import_is_seen():
  # The rule is tested too: routing must not import upwards, nor analysis the
  # loop.
  assert broken_rules('routing', {'moe_jax.layers.moe.MoE'})
  assert broken_rules('training', {'moe_jax.configs.base'})
  assert broken_rules('main', {'configs.base'})
  assert broken_rules('analysis', {'moe_jax.training.loop.Run'})
  assert not broken_rules('analysis', {'moe_jax.runs.checkpointer.Restored'})
  assert not broken_rules('analysis', {'moe_jax.training.setup.set_up'})
  assert broken_rules('interop', {'moe_jax.training.setup.set_up'})
  assert not broken_rules('layers', {'moe_jax.routing.token_choice'})
  assert broken_rules('training', {'moe_jax.evaluation.KINDS'})
  assert broken_rules('evaluation', {'moe_jax.training.setup.Run'})
  assert not broken_rules('evaluation', {'moe_jax.training.evaluate.Kind'})
  assert broken_rules('runs', {'moe_jax.training.step.TrainState'})
  assert not broken_rules('training', {'moe_jax.runs.watchdog.watching'})


def test_top_level_is_settled():
  settled = {
    'setup.py', 'moe_jax', 'experiments', 'configs', 'tests', 'colab',
    'README.md', 'LICENSE',
  }  # fmt: skip
  outputs = {'runs', 'results', 'build', 'moe_jax.egg-info'}
  entries = {p.name for p in ROOT.iterdir() if not p.name.startswith('.')}
  assert entries - outputs - {'__pycache__'} == settled


def test_no_two_files_share_a_name():
  names = [path.name for path in (ROOT / 'moe_jax').rglob('*.py')]
  shared_names = {name for name in names if names.count(name) > 1}
  # Each room has an `__init__.py`, and may have a contract.
  assert shared_names <= {'__init__.py', '__main__.py', 'contract.py'}
