"""Imports point down: the layout's rule, read from the code."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
# What each part of moe_jax may import of moe_jax, itself apart.
OPTIONS = {'options', 'plugins', 'sections', 'section_reader'}
BASE = {'config', 'shapes'} | OPTIONS
UP_TO_LAYERS = BASE | {
  'routing',
  'kernels',
  'dispatch',
  'layers',
  'partitioning',
  'distributed',
}
UP_TO_RUNS = UP_TO_LAYERS | {'models', 'data', 'training_types', 'runs'}
UP_TO_TRAINING = UP_TO_RUNS | {'training'}
ALLOWED = {
  'config': set(),
  'shapes': set(),
  'options': OPTIONS,
  'sections': OPTIONS,
  'section_reader': OPTIONS,
  'plugins': OPTIONS,
  'host': set(),
  'launcher': set(),
  'distributed': BASE | {'launcher'},
  'routing': BASE,
  'kernels': BASE,
  'dispatch': BASE | {'routing', 'kernels'},
  'partitioning': BASE,
  'parallel': BASE | {'routing', 'dispatch', 'partitioning'},
  'layers': UP_TO_LAYERS - {'layers'} | {'parallel'},
  'models': UP_TO_LAYERS | {'parallel'},
  'data': BASE,
  'training_types': BASE | {'routing'},
  'runs': UP_TO_RUNS - {'runs'},
  'training': UP_TO_RUNS | {'parallel'},
  'finetuning': UP_TO_TRAINING,
  'generation': UP_TO_LAYERS | {'models', 'data', 'runs'},
  'interop': UP_TO_LAYERS | {'models', 'data', 'runs', 'command_line'},
  'compression': UP_TO_LAYERS | {'models', 'data', 'runs'},
  'analysis': UP_TO_LAYERS
  | {'models', 'data', 'runs', 'training', 'command_line', 'host'},
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
  'command_line': BASE,
  'hooks': UP_TO_TRAINING | {'analysis', 'generation'},
  'generate': {
    'command_line',
    'data',
    'generation',
    'host',
    'models',
    'runs',
  },
  'main': {
    'command_line',
    'config',
    'data',
    'distributed',
    'evaluation',
    'finetuning',
    'hooks',
    'host',
    'runs',
    'training',
  },
  '__init__': UP_TO_LAYERS | {'models'},
}
# What these see of the rooms that hold more than is theirs: tokenizers, the
# checkpoints and the folders of runs. Who explains a step's cost has to build
# the step; evaluations are called by the training loop, and do not reach into
# it.
TOKENIZERS = ('moe_jax.data.tokenizers',)
CHECKPOINTS = ('moe_jax.runs.checkpointer', 'moe_jax.runs.workdir')
NARROW = {
  'generation': {'data': TOKENIZERS, 'runs': CHECKPOINTS},
  'interop': {'data': TOKENIZERS, 'runs': CHECKPOINTS},
  'compression': {'data': TOKENIZERS, 'runs': CHECKPOINTS},
  'analysis': {
    'data': TOKENIZERS,
    'runs': CHECKPOINTS[:1],
    'training': ('moe_jax.training.setup',),
  },
  'evaluation': {
    'runs': ('moe_jax.runs.metrics', 'moe_jax.runs.workdir'),
    'training': ('moe_jax.training.evaluate',),
  },
}


def imported(path: pathlib.Path) -> set[str]:
  """The dotted names a file imports, wherever the import stands."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def broken_rules(part: str, names: set[str]) -> list[str]:
  """The imports of one file in `part` that the layout forbids."""
  broken = []
  for name in names:
    top, _, rest = name.partition('.')
    if top in ('configs', 'experiments', 'tests'):
      broken.append(name)
    if top != 'moe_jax':
      continue
    target = rest.split('.')[0]
    if target == part:
      continue
    starts = NARROW.get(part, {}).get(target, ('',))
    if target not in ALLOWED[part] or not name.startswith(starts):
      broken.append(name)
  return sorted(broken)


def test_imports_point_down():
  found = {}
  for path in sorted((ROOT / 'moe_jax').rglob('*.py')):
    part = path.relative_to(ROOT / 'moe_jax').parts[0].removesuffix('.py')
    assert part in ALLOWED, f'moe_jax/{part} has no import rule'
    if broken := broken_rules(part, imported(path)):
      found[str(path.relative_to(ROOT))] = broken
  assert not found


def test_configs_import_only_configs_and_ml_collections():
  for path in sorted((ROOT / 'configs').glob('*.py')):
    tops = {name.split('.')[0] for name in imported(path)}
    assert tops <= {'configs', 'ml_collections'}, path.name


def test_a_forbidden_import_is_seen():
  # The rule itself: routing must not reach up, analysis not into the loop.
  assert broken_rules('routing', {'moe_jax.layers.moe.MoE'})
  assert broken_rules('training', {'configs.base'})
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
    'README.md',
  }  # fmt: skip
  made = {'runs', 'results', 'build', 'moe_jax.egg-info'}
  here = {p.name for p in ROOT.iterdir() if not p.name.startswith('.')}
  assert here - made - {'__pycache__'} == settled


def test_no_two_files_share_a_name():
  names = [path.name for path in (ROOT / 'moe_jax').rglob('*.py')]
  twice = {name for name in names if names.count(name) > 1}
  assert twice <= {'__init__.py'}
