"""Imports point down: the layout's rule, read from the code."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
# What each part of moe_jax may import of moe_jax, itself apart.
BASE = {'config', 'shapes'}
UP_TO_LAYERS = BASE | {
  'routing',
  'kernels',
  'dispatch',
  'layers',
  'partitioning',
  'distributed',
}
UP_TO_TRAINING = UP_TO_LAYERS | {'models', 'data', 'training'}
ALLOWED = {
  'config': set(),
  'shapes': set(),
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
  'training': UP_TO_TRAINING - {'training'} | {'parallel'},
  'finetuning': UP_TO_TRAINING,
  'generation': UP_TO_LAYERS | {'models', 'data', 'training'},
  'interop': UP_TO_LAYERS | {'models', 'data', 'training', 'command_line'},
  'compression': UP_TO_LAYERS | {'models', 'data', 'training'},
  'analysis': UP_TO_LAYERS
  | {'models', 'data', 'training', 'command_line', 'host'},
  'evaluation': BASE
  | {'data', 'distributed', 'generation', 'models', 'partitioning', 'training'},
  'command_line': BASE,
  'hooks': UP_TO_TRAINING | {'analysis', 'generation'},
  'generate': {
    'command_line',
    'data',
    'generation',
    'host',
    'models',
    'training',
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
    'training',
  },
  '__init__': UP_TO_LAYERS | {'models'},
}
# These four see data.tokenizers and training.checkpoint, and no more of them.
ABOVE_MODELS = ('generation', 'interop', 'compression', 'analysis')
NARROW = {
  'data': 'moe_jax.data.tokenizers',
  'training': 'moe_jax.training.checkpoint',
}
# Who explains a step's cost has to build the step, who imports a run has to
# make its folder, and who generates to read it; the loop stays out of reach.
ALSO = {
  'analysis': 'moe_jax.training.setup',
  'generation': 'moe_jax.training.workdir',
  'interop': 'moe_jax.training.workdir',
}


# Evaluations are called by the training loop, and do not reach into it.
EVALUATION = ('moe_jax.training.evaluate', 'moe_jax.training.workdir')


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
    narrow = NARROW.get(target, '') if part in ABOVE_MODELS else ''
    starts = (narrow, ALSO.get(part, narrow))
    if (part, target) == ('evaluation', 'training'):
      starts = EVALUATION
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
  assert not broken_rules('analysis', {'moe_jax.training.checkpoint.Restored'})
  assert not broken_rules('analysis', {'moe_jax.training.setup.set_up'})
  assert broken_rules('interop', {'moe_jax.training.setup.set_up'})
  assert not broken_rules('layers', {'moe_jax.routing.token_choice'})
  assert broken_rules('training', {'moe_jax.evaluation.KINDS'})
  assert broken_rules('evaluation', {'moe_jax.training.setup.Run'})
  assert not broken_rules('evaluation', {'moe_jax.training.evaluate.Row'})


def test_top_level_is_settled():
  settled = {
    'setup.py', 'moe_jax', 'experiments', 'configs', 'tests', 'colab',
    'README.md',
  }  # fmt: skip
  made = {'runs', 'results', 'build', 'moe_jax.egg-info'}
  here = {p.name for p in ROOT.iterdir() if not p.name.startswith('.')}
  assert here - made - {'__pycache__'} == settled
