"""The command; the package's docstring describes it."""

import argparse
import concurrent.futures
import importlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn

from experiments import report
from experiments.study import jobs, stored
from moe_jax import models, run_config
from moe_jax.config import keys_of
from tests import golden

FOLDER = pathlib.Path(__file__).parent
HELD, MUTATIONS = FOLDER / 'held.json', FOLDER / 'mutations.json'
STORED = golden.ROOT / 'experiments' / report.KEPT
LOSSES_OF = (
  'tiny_switch',
  'shakespeare_switch',
  'tiny_seq2seq',
  'shakespeare_dense',
  'shazeer_lstm',
  'tiny_finegrained',
)
NUM_LOSSES, VOCABULARY = 20, 300
# Beginnings of options that have no effect in a model without experts.
ROUTED = tuple(
  f'model.moe.{name}'
  for name in (
    'router.', 'capacity.', 'dispatch.', 'retained.', 'group_size',
    'layer_reduce', 'allow_future_leak', 'output_masking', 'force_balance',
    'replay',
  )
)  # fmt: skip
_TIMEOUT = 600  # seconds of the tests of a mutation


def losses(name: str) -> list[str]:
  """The first losses of a config, as hexadecimal floats."""
  argv = [sys.executable, '-m', 'moe_jax.main', f'--config=moe_jax:{name}']
  if name.startswith('shakespeare'):  # in place of a text that is downloaded
    text = pathlib.Path(sysconfig.get_path('stdlib'), 'argparse.py')
    argv += [
      '--config.data.source.kind=files',
      f'--config.data.source.files.pattern={text}',
    ]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'run', 'metrics.jsonl')
    argv += [f'--workdir={path.parent}', '--config.log_every_steps=1']
    with open(f'{folder}/log', 'w') as log:
      run = subprocess.Popen(argv, stdout=log, stderr=log, cwd=golden.ROOT)
    rows = []
    while run.poll() is None and len(rows) < NUM_LOSSES:
      time.sleep(0.3)
      rows = _training_rows(path)
    run.kill()
    run.wait()
  return [row['train/loss'].hex() for row in rows[:NUM_LOSSES]]


def _training_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  rows = [json.loads(line) for line in lines if line.endswith('\n')]
  return [row for row in rows if 'train/loss' in row]


def tree(name: str) -> dict[str, list[int]]:
  """The shape of each parameter of a config, by its path."""
  model = run_config.read(golden.config(name)).filled(VOCABULARY).model
  params = nn.meta.unbox(models.abstract_params(model.build()))
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {jax.tree_util.keystr(path): list(x.shape) for path, x in leaves}


def studies() -> Iterator[tuple[dict[str, Any], Any]]:
  """Each stored summary, as it is, and its study."""
  for path in sorted(STORED.glob('*.json')):
    module = importlib.import_module(f'experiments.{path.stem}')
    yield json.loads(path.read_text()), module.STUDY


def verdicts() -> dict[str, dict[str, str]]:
  """The verdict of each claim of the stored results, by study."""
  return {
    summary['name']: {
      f'{i} {claim["text"]}': claim['verdict']
      for i, claim in enumerate(stored.judged_again(summary, study)['claims'])
    }
    for summary, study in studies()
  }


def settings() -> dict[str, dict[str, list[Any]]]:
  """Of each arm: its digest, the values of its config, and those it changes."""
  values = {}
  for summary, study in studies():
    preset = study.presets[stored.preset_of(summary)]
    shared, arms = study.shared(preset), study.arms_of(preset)
    levels = study.runs(preset, shared, arms, [0], pathlib.Path('results'))
    options = study.runner.options
    values[study.name] = {}
    for job in itertools.chain(*levels):
      leaves = [
        leaf
        for leaf in keys_of(options, job.config)
        if leaf.path not in ('seed', *job.arm.runs_before)
      ]
      values[study.name][job.arm.name] = [
        jobs.settings_digest(options, job),
        {leaf.path: leaf.value for leaf in leaves},
        [leaf.path for leaf in leaves if leaf.changed],
      ]
  return json.loads(json.dumps(values, default=list))


def record() -> dict[str, Any]:
  """All that is held, of this checkout."""
  digests = {
    study: {arm: values[0] for arm, values in arms.items()}
    for study, arms in settings().items()
  }
  return {
    'jax': jax.__version__,
    'losses': {name: losses(name) for name in LOSSES_OF},
    'trees': {name: tree(name) for name in golden.NAMES},
    'verdicts': verdicts(),
    'digests': digests,
  }


def differences(held: Any, now: Any, name: str = '') -> Iterator[str]:
  """A line for each value that differs, is missing or is new."""
  if isinstance(held, dict) and isinstance(now, dict):
    for key in [*held, *(key for key in now if key not in held)]:
      yield from differences(held.get(key), now.get(key), f'{name} / {key}')
  elif held != now:
    yield f'{name}: {str(held)[:80]} is now {str(now)[:80]}'


def effective(values: dict[str, Any]) -> dict[str, Any]:
  """The values of an arm's config that have an effect."""
  if values.get('model.moe.num_experts') != 0:
    return values
  return {k: v for k, v in values.items() if not k.startswith(ROUTED)}


def map_digests(old_settings: pathlib.Path) -> None:
  """Gives stored results the digests of today where arms are as they were.

  An arm is as it was where each option that both checkouts have has its old
  value, and where it had changed no option that is gone. Every mapping is
  printed, and so is every option that is gone or new, with its value. An arm
  that differs keeps its old digest, and so its verdicts are withheld.

  Args:
    old_settings: What `settings` wrote in the other checkout.
  """
  old, new = json.loads(old_settings.read_text()), settings()
  others: dict[str, set[str]] = {}
  for path in sorted(STORED.glob('*.json')):
    text = path.read_text()
    for arm, (digest, old_values, old_changed) in old[path.stem].items():
      today, now, _ = new[path.stem].get(arm, ('none', {}, []))
      if today == digest:
        continue
      values, now = effective(old_values), effective(now)
      gone, added = values.keys() - now.keys(), now.keys() - values.keys()
      differing = {k for k in values.keys() & now.keys() if values[k] != now[k]}
      differing |= {k for k in gone if k in old_changed}
      for key in gone:
        others.setdefault(f'gone: {key} = {values[key]!r}', set()).add(
          path.stem
        )
      for key in added:
        others.setdefault(f'new: {key} = {now[key]!r}', set()).add(path.stem)
      word = f'differs in {sorted(differing)}' if differing else 'mapped'
      print(f'{path.stem}: {arm}: {digest} -> {today}: {word}')
      if not differing:
        text = text.replace(f'"{digest}"', f'"{today}"')
    path.write_text(text)
  for key, names in sorted(others.items()):
    print(f'{key}: {len(names)} studies, such as {min(names)}')


def mutate(number: int) -> str:
  """What became of a mutation: 'caught by ...', 'survived' or 'not found'."""
  mutation = json.loads(MUTATIONS.read_text())[number]
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, 'copy')
    ignored = shutil.ignore_patterns('.git', 'results', '__pycache__')
    shutil.copytree(golden.ROOT, copy, ignore=ignored)
    file = copy / mutation['file']
    text = file.read_text() if file.exists() else ''
    if text.count(mutation['old']) != 1:
      return 'not found'
    file.write_text(text.replace(mutation['old'], mutation['new']))
    command = [sys.executable, '-m', 'pytest', *mutation['tests'], '-x', '-q']
    try:
      tests = subprocess.run(
        [*command, '-n', '0', '-p', 'no:cacheprovider'],
        cwd=copy,
        env={**os.environ, 'PYTHONPATH': str(copy)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
      )
    except subprocess.TimeoutExpired:
      return 'caught by the time limit'
  lines = tests.stdout.splitlines()
  failed = [line for line in lines if line.startswith(('FAILED', 'ERROR'))]
  if not tests.returncode:
    return 'survived'
  return f'caught by {(failed or lines[-1:])[0][:150]}'


def main() -> None:
  """Runs one of the commands."""
  parser = argparse.ArgumentParser(prog='python -m tests.held')
  choices = ('record', 'check', 'settings', 'map', 'mutate')
  parser.add_argument('command', choices=choices)
  parser.add_argument('path', nargs='?', type=pathlib.Path)
  options = parser.parse_args()
  if options.command == 'settings':
    options.path.write_text(json.dumps(settings()))
  elif options.command == 'map':
    map_digests(options.path)
  elif options.command == 'mutate':
    numbers = range(len(json.loads(MUTATIONS.read_text())))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      results = []
      for i, result in zip(numbers, pool.map(mutate, numbers), strict=True):
        results.append(result)
        print(f'{i}: {result}', flush=True)
    caught = sum(result.startswith('caught') for result in results)
    print(f'caught {caught} of {len(results)}')
  elif options.command == 'record':
    HELD.write_text(json.dumps(record(), indent=0))
  else:
    lines = list(differences(json.loads(HELD.read_text()), record()))
    print('\n'.join(lines) or 'all as held')
    sys.exit(bool(lines))


if __name__ == '__main__':
  main()
