"""Public methods have a docstring, their own or that of what they override."""

import ast
import importlib
import inspect
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FILES = [
  path
  for folder in ('moe_jax', 'experiments')
  for path in sorted((ROOT / folder).rglob('*.py'))
  if path.name != '__main__.py'
]


def bare_methods(path: pathlib.Path) -> list[tuple[str, str]]:
  """The public classes of a file with their methods that have no docstring."""
  return [
    (c.name, f.name)
    for c in ast.parse(path.read_text(encoding='utf-8')).body
    if isinstance(c, ast.ClassDef) and not c.name.startswith('_')
    for f in c.body
    if isinstance(f, ast.FunctionDef) and not f.name.startswith('_')
    if ast.get_docstring(f) is None
  ]


def test_a_method_without_docstring_overrides_one_that_has_it():
  missing = []
  for path in FILES:
    if not (methods := bare_methods(path)):
      continue
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    module = importlib.import_module(name)
    for cls, method in methods:
      if not inspect.getdoc(getattr(getattr(module, cls), method)):
        missing.append(f'{name}.{cls}.{method}')
  assert not missing
