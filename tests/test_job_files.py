"""Job files of clusters.

Files that were read and tried once are kept as golden texts; programs of
clusters are stand-ins that print the words that they are given.
"""

import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

import moe_jax.main
from experiments import launch
from experiments.launching.topologies import topology_of
from moe_jax.devices import checked_flags

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / 'tests' / 'golden' / 'jobs'
MIXTRAL = '--config=configs/mixtral_8x7b.py'
TWO_SLICES = ['--topology=2xv5p-128', '--config.mesh.expert=4']
SLICES = [*TWO_SLICES, '--config.mesh.dcn_data=2', '--config.microbatches=4']
NODES = ['--topology=8x8xh100', '--config.microbatches=8']
SHARED = '--output=/shared/runs'
JOBSET = ['--to=jobset', '--image=my-image', '--volume=runs:/shared', SHARED]
SKYPILOT = ['--to=skypilot', '--volume=gs://my-bucket:/shared', SHARED]
# The command of each golden file, after `python -m experiments.launch`.
COMMANDS = {
  'sbatch.sh': [
    *(MIXTRAL, '--to=sbatch', *NODES, '--output=/scratch/runs'),
    *('--option=--time=24:00:00', '--option=--account=my account'),
  ],
  'jobset.yaml': [MIXTRAL, *JOBSET, *SLICES],
  'xpk.sh': [
    *(MIXTRAL, '--to=xpk', '--image=my-image', '--cluster=c', SHARED),
    *(*SLICES, '--config.sample.prompt=it is'),
  ],
  'skypilot.yaml': [MIXTRAL, *SKYPILOT, *NODES],
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture
def printed(capsys):
  """Returns what `experiments.launch` prints."""

  def run(*words):
    assert launch.main(words) == 0
    return capsys.readouterr().out

  return run


@pytest.mark.parametrize('name', COMMANDS)
def test_job_files_are_as_they_were(name, printed):
  command = shlex.join(COMMANDS[name])
  assert printed(*COMMANDS[name]) == (GOLDEN / name).read_text(), (
    f'if that is meant: python -m experiments.launch {command} '
    f'> tests/golden/jobs/{name}'
  )


def stub(folder, program, script):
  """A program for PATH, of a script for bash."""
  path = folder / program
  path.write_text(f'#!/bin/bash\n{script}\n')
  path.chmod(0o755)


def bash(script, folder, **env):
  """Checks a script's syntax, and runs it with the stubs in a folder."""
  subprocess.run(['bash', '-n'], input=script, text=True, check=True)
  path = f'{folder}:{os.environ["PATH"]}'
  return subprocess.run(
    ['bash'],
    input=script,
    text=True,
    capture_output=True,
    env={**os.environ, 'PATH': path, **env},
  )


def words_of(*command):
  """The words that a run of the command is started with."""
  options, overrides = launch.parse(command)
  (item,) = launch.items_of(options, overrides)
  return ['-m', *item.words()]


PRINT_WORDS = 'printf "%s\\0" "$@"'


@pytest.mark.parametrize(
  ('status', 'restarts', 'requeued'),
  [(0, 0, False), (75, 50, True), (1, 19, True), (1, 20, False)],
)
def test_a_slurm_job_is_requeued(tmp_path, printed, status, restarts, requeued):
  stub(tmp_path, 'srun', f'{PRINT_WORDS}; exit {status}')
  stub(tmp_path, 'scontrol', 'echo "scontrol $@" >&2')
  stub(tmp_path, 'sleep', '')
  name = 'sbatch.sh'
  process = bash(
    printed(*COMMANDS[name]),
    tmp_path,
    SLURM_JOB_ID='7',
    SLURM_RESTART_COUNT=str(restarts),
  )
  assert process.returncode == status
  assert process.stderr == 'scontrol requeue 7\n' * requeued
  _, python, *words = process.stdout.split('\0')[:-1]
  assert python == 'python' and words == words_of(*COMMANDS[name])


def test_xpk_is_given_the_command_as_one_word(tmp_path, printed):
  stub(tmp_path, 'xpk', PRINT_WORDS)
  stub(tmp_path, 'python', PRINT_WORDS)
  script = printed(*COMMANDS['xpk.sh'], '--option=--priority=high')
  *flags, command, _ = bash(script, tmp_path).stdout.split('\0')
  assert flags[:2] == ['workload', 'create'] and '--priority=high' in flags
  started = bash(command.removeprefix('--command='), tmp_path).stdout
  assert started.split('\0')[:-1] == words_of(*COMMANDS['xpk.sh'])


def processes_of(words):
  """The arguments of `jax.distributed.initialize`, as `moe_jax.main` reads."""
  flags, _ = moe_jax.main.parse(words)
  arguments = checked_flags(
    flags.coordinator, flags.num_processes, flags.process_id
  )
  return arguments and tuple(arguments.values())[:3]


def test_skypilot_starts_the_processes_of_nodes(tmp_path, printed):
  # The golden file says which nodes are asked for; this runs its command.
  task = yaml.safe_load(printed(*COMMANDS['skypilot.yaml']))
  stub(tmp_path, 'python', PRINT_WORDS)
  started = bash(
    task['run'],
    tmp_path,
    SKYPILOT_NODE_IPS='10.0.0.4\n10.0.0.5\n',
    SKYPILOT_NUM_NODES='8',
    SKYPILOT_NODE_RANK='3',
  )
  words = started.stdout.split('\0')[:-1]
  assert words[:-3] == words_of(*COMMANDS['skypilot.yaml'])
  assert processes_of(words[2:]) == ('10.0.0.4:9876', 8, 3)


def test_skypilot_lets_a_slice_find_its_processes(printed):
  task = yaml.safe_load(
    printed(MIXTRAL, *SKYPILOT, '--topology=v5e:16x16', '--config.mesh.fsdp=32')
  )
  assert task['resources']['accelerators'] == 'tpu-v5litepod-256'
  assert task['num_nodes'] == 1 and '[tpu]' in task['setup']
  assert 'coordinator' not in task['run']


def pods_of(text):
  """The JobSet of a job file, its one group of pods, and that group's job."""
  jobset = yaml.safe_load(text)
  (group,) = jobset['spec']['replicatedJobs']
  return jobset, group, group['template']['spec']


def test_a_jobset_of_nodes_tells_the_processes_of_each_other(printed):
  jobset, group, job = pods_of(printed(MIXTRAL, *JOBSET, *NODES))
  assert (group['replicas'], job['parallelism']) == (1, 8)
  (container,) = job['template']['spec']['containers']
  assert container['resources'] == {'limits': {'nvidia.com/gpu': 8}}
  # JobSet's name of a pod: JOBSET-GROUP-JOB-POD, in the subdomain JOBSET.
  name = jobset['metadata']['name']
  address = f'{name}-{group["name"]}-0-0.{name}:9876'
  assert [variable['name'] for variable in container['env']] == ['PROCESS_ID']
  args = [word.replace('$(PROCESS_ID)', '5') for word in container['args']]
  assert processes_of(args) == (address, 8, 5)


def test_each_swept_value_is_a_job(printed):
  sweep = ['--sweep', 'optimizer.learning_rate=0.001,0.0005', '--name=Mix']
  texts = printed(MIXTRAL, *JOBSET, *NODES, *sweep).split('---\n')
  jobs = [pods_of(text)[0] for text in texts]
  assert [job['metadata']['name'] for job in jobs] == [
    *('mix-learning-rate-0-001', 'mix-learning-rate-0-0005')
  ]


def test_jobs_are_submitted(tmp_path, printed, monkeypatch):
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
  stub(tmp_path, 'kubectl', 'cp "${@: -2:1}" "${0%/*}/submitted"')
  monkeypatch.setattr(launch.job_files, 'FOLDER', tmp_path / 'jobs')
  words = [MIXTRAL, *JOBSET, *NODES]
  output = printed(*words, '--submit', '--option=--namespace=train')
  path = tmp_path / 'jobs' / 'mixtral-8x7b.yaml'
  assert output == f'kubectl apply -f {path} --namespace=train\n'
  assert (tmp_path / 'submitted').read_text() == printed(*words)


@pytest.mark.parametrize(
  ('name', 'groups', 'size', 'hosts', 'kind', 'shape'),
  [
    ('v4-8', 1, 4, 1, 'v4-8', '2x2x1'),
    ('v5e-16', 1, 16, 4, 'v5litepod-16', '4x4'),
    ('v6e:2x4', 1, 8, 2, 'v6e-8', '2x4'),
    ('3xv5p-128', 3, 64, 16, 'v5p-128', '4x4x4'),
    ('8xh100', 1, 8, 1, 'h100', ''),
    ('16x4xa100-80gb', 16, 4, 1, 'a100-80gb', ''),
  ],
)
def test_topologies_have_names(name, groups, size, hosts, kind, shape):
  topology = topology_of(name)
  assert topology[:4] == (groups, size, hosts, kind)
  assert topology.shape == shape


# These settings would wait in a queue, and then not start or be lost.
@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ([*JOBSET, '--topology=v5p-100'], 'v5p has the slices v5p-8, v5p-16, '),
    ([*JOBSET, '--topology=v5p:3x4x4'], 'has the slices 2x2x1.* divide by 4'),
    ([*JOBSET, *NODES, '--config.mesh.expert=3'], 'not fit 64 dev'),
    ([*JOBSET, *TWO_SLICES], 'multiply to 1, not 2; set them, such as'),
    (
      [*JOBSET, NODES[0], '--config.microbatches=16'],
      'do not divide by 64 dev',
    ),
    (['--to=sbatch', *SLICES], r"have --to=\['jobset', 'xpk'\]"),
    ([*SKYPILOT, *SLICES], r"2 x 64 chips .* have --to=\['jobset', 'xpk'\]"),
    ([*JOBSET[:1], *NODES], '--to=jobset needs --image'),
    ([*JOBSET, *NODES, '--output=runs/x'], 'would be lost .* below /shared'),
    ([*JOBSET, *NODES, '--name=8x'], "name '8x' has to begin with a letter"),
    (['--topology=8xh100'], '--topology has no effect with --to=local'),
  ],
)
def test_what_does_not_fit_is_refused(words, message, capsys):
  with pytest.raises(SystemExit):
    launch.main([MIXTRAL, *words])
  output = capsys.readouterr()
  assert not output.out and re.search(message, output.err), output.err
