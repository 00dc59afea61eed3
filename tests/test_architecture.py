"""Imports point down: the rule of the design, checked in the code."""

import ast
import functools
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
# Rooms of moe_jax, the lowest floor first. A room imports what is below it, and
# nothing beside it.
FLOORS = (
  {'errors'},
  {'config', 'shapes'},
  {'cli', 'devices', 'kernels', 'partitioning', 'routing'},
  {'data', 'parallel'},
  {'layers'},
  {'models', 'runs'},
  {'training', '__init__'},
  {'finetuning', 'generation'},
  {'compression', 'evaluation'},
  {'run_config'},
  {'analysis', 'interop'},
  {'configs', 'generate', 'items', 'main'},
  {'sweep'},
)
FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
# Rooms that are open to these alone, although they are below more: layers and
# models know no data, only `main` runs the loop, and hooks are its guests.
ONLY_FOR = {
  'moe_jax.data': {
    'analysis', 'compression', 'evaluation', 'finetuning', 'generate',
    'generation', 'interop', 'runs', 'training',
  },
  'moe_jax.training.loop': {'main', 'training'},
}  # fmt: skip


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


def forbidden(room: str, names: set[str]) -> list[str]:
  """The imports of one file in `room` that the layout forbids."""

  def is_allowed(name):
    top, _, rest = name.partition('.')
    target = rest.split('.')[0]
    if top != 'moe_jax' or target == room:
      return top not in ('configs', 'experiments', 'tests')
    return FLOOR_OF.get(target, len(FLOORS)) < FLOOR_OF[room] and all(
      room in guests
      for closed, guests in ONLY_FOR.items()
      if f'{name}.'.startswith(f'{closed}.')
    )

  return sorted(name for name in names if not is_allowed(name))


def test_imports_point_down():
  violations = {}
  for path in sorted((ROOT / 'moe_jax').rglob('*.py')):
    room = path.relative_to(ROOT / 'moe_jax').parts[0].removesuffix('.py')
    assert room in FLOOR_OF, f'moe_jax/{room} has no floor'
    if names := forbidden(room, imports(path)):
      violations[str(path.relative_to(ROOT))] = names
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
  assert not forbidden('layers', {'moe_jax.routing.token_choice', 'jax.numpy'})
  assert forbidden('routing', {'moe_jax.layers.moe.MoE'})
  assert forbidden('models', {'moe_jax.data.DataOptions'})
  assert forbidden('generation', {'moe_jax.finetuning.start'})
  assert forbidden('analysis', {'moe_jax.training.loop.train_and_evaluate'})
  assert not forbidden('analysis', {'moe_jax.training.setup.set_up'})
  assert forbidden('training', {'moe_jax.configs.base'})
  assert forbidden('main', {'configs.base'})


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
