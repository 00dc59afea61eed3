"""The newer Pythons that the whole check finds on a machine."""

import os
import pathlib
import subprocess

SCRIPT = pathlib.Path(__file__).parents[1] / '.ci' / 'newer_pythons'
# This fake interpreter makes environments, and ends well whatever it is asked.
WORKS = """
case "$*" in
  *' venv '*) for last; do :; done
    mkdir -p "$last/bin"
    printf '#!/bin/sh\\necho {version} of {place}\\n' > "$last/bin/python"
    chmod +x "$last/bin/python";;
esac
"""
# pyenv has this shim for a version that is installed and not activated.
SHIM = """
echo 'pyenv: python3.12: command not found' >&2
exit 127
"""
WITHOUT_VENV = """
case "$*" in
  *' venv '*) echo 'ensurepip is not available' >&2; exit 1;;
esac
"""


def add(path, body, **names):
  path.parent.mkdir(parents=True, exist_ok=True)
  for key, value in names.items():
    body = body.replace('{' + key + '}', value)
  path.write_text(f'#!/bin/sh\n{body}')
  path.chmod(0o755)


def interpreters(tmp_path):
  """The script's line for each minor version."""
  out = subprocess.check_output(
    [SCRIPT, tmp_path / 'made', '3.91', '3.92', '3.93', '3.94'],
    env={
      'PATH': f'{tmp_path / "path"}{os.pathsep}{os.environ["PATH"]}',
      'PYENV_ROOT': str(tmp_path / 'pyenv'),
    },
    text=True,
  )
  return dict(line.split(': ', 1) for line in out.splitlines())


def test_interpreters_count_only_if_they_make_environments(tmp_path):
  path, versions = tmp_path / 'path', tmp_path / 'pyenv' / 'versions'
  # The version is not activated: its shim fails, and the newest installed
  # release is used.
  add(path / 'python3.91', SHIM)
  for release in ('3.91.2', '3.91.10'):
    add(
      versions / release / 'bin' / 'python3.91',
      WORKS,
      version=release,
      place='pyenv',
    )
  add(path / 'python3.92', SHIM)
  add(path / 'python3.93', WITHOUT_VENV)
  assert interpreters(tmp_path) == {
    '3.91': '3.91.10 of pyenv',
    '3.92': 'not found',
    '3.93': (
      f'left out, as {path / "python3.93"} makes no environment that has pip'
    ),
    '3.94': 'not found',
  }
  assert [p.name for p in (tmp_path / 'made').iterdir()] == ['3.91']
