"""Job files of clusters: what they say, what they start, what is refused."""

import os
import pathlib
import re
import shlex
import subprocess

import jsonschema
import pytest
import yaml

import moe_jax.main
from experiments import launch
from experiments.launching import topologies
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
  [(0, 0, False), (75, 50, True), (1, 0, True), (1, 19, True), (1, 20, False)],
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
  task = yaml.safe_load(printed(*COMMANDS['skypilot.yaml']))
  assert task['num_nodes'] == 8
  assert task['resources']['accelerators'] == 'H100:8'
  assert task['resources']['job_recovery']['recover_on_exit_codes'] == [75]
  mount = {'source': 'gs://my-bucket', 'mode': 'MOUNT'}
  assert task['file_mounts'] == {'/shared': mount}
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


def fields(**types):
  """The schema of an object that has no other fields."""
  schemas = {
    name: {'$ref': f'#/$defs/{t}'} if t[:1].isupper() else {'type': t}
    for name, t in types.items()
  }
  return {
    'type': 'object',
    'properties': schemas,
    'additionalProperties': False,
  }


def many(name):
  return {'type': 'array', 'items': {'$ref': f'#/$defs/{name}'}}


# The fields that job files may use, with the names and types that are published
# at https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2 and
# https://kubernetes.io/docs/reference/generated/kubernetes-api/v1.33.
SCHEMA = {
  '$ref': '#/$defs/JobSet',
  '$defs': {
    'JobSet': fields(
      apiVersion='string', kind='string', metadata='Meta', spec='JobSetSpec'
    ),
    'Meta': fields(name='string', annotations='object', labels='object'),
    'JobSetSpec': fields(
      replicatedJobs='ReplicatedJobs',
      network='object',
      successPolicy='object',
      failurePolicy='FailurePolicy',
      suspend='boolean',
      coordinator='object',
      managedBy='string',
      ttlSecondsAfterFinished='integer',
    ),
    'FailurePolicy': fields(
      maxRestarts='integer', restartStrategy='Strategy', rules='array'
    ),
    'Strategy': {'enum': ['Recreate', 'BlockingRecreate']},
    'ReplicatedJobs': many('ReplicatedJob'),
    'ReplicatedJob': fields(
      name='string',
      groupName='string',
      template='JobTemplate',
      replicas='integer',
      dependsOn='array',
    ),
    'JobTemplate': fields(metadata='Meta', spec='JobSpec'),
    'JobSpec': fields(
      activeDeadlineSeconds='integer',
      backoffLimit='integer',
      completionMode='string',
      completions='integer',
      parallelism='integer',
      podFailurePolicy='object',
      template='PodTemplate',
    ),
    'PodTemplate': fields(metadata='Meta', spec='PodSpec'),
    'PodSpec': fields(
      containers='Containers',
      nodeSelector='object',
      restartPolicy='RestartPolicy',
      serviceAccountName='string',
      terminationGracePeriodSeconds='integer',
      tolerations='array',
      volumes='Volumes',
    ),
    'RestartPolicy': {'enum': ['Never', 'OnFailure']},
    'Containers': many('Container'),
    'Container': fields(
      args='Texts',
      command='Texts',
      env='EnvVars',
      image='string',
      name='string',
      resources='Resources',
      volumeMounts='VolumeMounts',
    ),
    'Texts': {'type': 'array', 'items': {'type': 'string'}},
    'EnvVars': many('EnvVar'),
    'EnvVar': fields(name='string', value='string', valueFrom='EnvVarSource'),
    'EnvVarSource': fields(fieldRef='FieldRef'),
    'FieldRef': fields(apiVersion='string', fieldPath='string'),
    'Resources': fields(limits='object', requests='object'),
    'VolumeMounts': many('VolumeMount'),
    'VolumeMount': fields(name='string', mountPath='string'),
    'Volumes': many('Volume'),
    'Volume': fields(
      name='string', persistentVolumeClaim='Claim', emptyDir='EmptyDir'
    ),
    'Claim': fields(claimName='string', readOnly='boolean'),
    'EmptyDir': fields(medium='string', sizeLimit='string'),
  },
}


def pods_of(text):
  """The JobSet of a job file, which is checked, and its one group of pods."""
  jobset = yaml.safe_load(text)
  jsonschema.validate(jobset, SCHEMA)
  assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  (group,) = jobset['spec']['replicatedJobs']
  return jobset, group, group['template']['spec']


def test_a_jobset_of_slices(printed):
  jobset, group, job = pods_of(printed(*COMMANDS['jobset.yaml']))
  assert jobset['spec']['failurePolicy']['maxRestarts'] == 20
  assert (group['replicas'], job['parallelism'], job['completions']) == (
    *(2, 16, 16),
  )
  pod = job['template']['spec']
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
    'cloud.google.com/gke-tpu-topology': '4x4x4',
  }
  (container,) = pod['containers']
  assert container['resources'] == {'limits': {'google.com/tpu': 4}}
  words = [*container['command'], *container['args']]
  assert words == ['python', *words_of(*COMMANDS['jobset.yaml'])]
  assert container['volumeMounts'][0]['mountPath'] == '/shared'
  claim = {'name': 'runs', 'persistentVolumeClaim': {'claimName': 'runs'}}
  assert pod['volumes'][0] == claim


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
    *('mix-learning-rate-0-001', 'mix-learning-rate-0-0005'),
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
    ('v5litepod-256', 1, 256, 64, 'v5litepod-256', '16x16'),
    ('v6e:2x4', 1, 8, 2, 'v6e-8', '2x4'),
    ('3xv5p-128', 3, 64, 16, 'v5p-128', '4x4x4'),
    ('v5p:4x8x16', 1, 512, 128, 'v5p-1024', '4x8x16'),
    ('8xh100', 1, 8, 1, 'h100', ''),
    ('16x4xa100-80gb', 16, 4, 1, 'a100-80gb', ''),
  ],
)
def test_topologies_have_names(name, groups, size, hosts, kind, shape):
  topology = topology_of(name)
  assert topology[:4] == (groups, size, hosts, kind)
  assert topology.shape == shape


def test_labels_are_those_of_gke():
  labels = {tpu.label for tpu in topologies.TPUS.values()}
  assert labels == {
    *('tpu-v4-podslice', 'tpu-v5-lite-podslice', 'tpu-v5p-slice'),
    'tpu-v6e-slice',
  }


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ([*JOBSET, '--topology=h100'], r"'h100' is no .* v4, v5e.* h100, h200"),
    ([*JOBSET, '--topology=v5p-100'], 'v5p has the slices v5p-8, v5p-16, '),
    ([*JOBSET, '--topology=v5p:3x4x4'], 'has the slices 2x2x1.* divide by 4'),
    ([*JOBSET, '--topology=v6e:4x4x4'], 'v6e has the slices 2x2.* 16x16$'),
    (
      [*JOBSET, *NODES, '--config.mesh.expert=3'],
      "8 x 8 GPUs of h100 in 8 machines: mesh=.*'expert': 3}.* not fit 64 dev",
    ),
    (
      [*JOBSET, *TWO_SLICES],
      'multiply to 1, not 2; set them, such as --config.mesh.dcn_data=2',
    ),
    (
      [*JOBSET, *NODES, '--config.mesh.dcn_fsdp=4'],
      'in 8 machines: the dcn_ sizes .* multiply to 4, not 8',
    ),
    (
      [*JOBSET, NODES[0], '--config.microbatches=16'],
      '32 sequences, which do not divide by 64 devices',
    ),
    (['--to=sbatch', *SLICES], r"have --to=\['jobset', 'xpk'\]"),
    (
      ['--to=xpk', '--image=x', '--cluster=c', SHARED, *NODES],
      r"have --to=\['sbatch', 'jobset', 'skypilot'\]",
    ),
    ([*SKYPILOT, *SLICES], r"2 x 64 chips .* have --to=\['jobset', 'xpk'\]"),
    ([*JOBSET[:1], *NODES], '--to=jobset needs --image'),
    ([*SKYPILOT, *NODES, '--image=x'], '--to=skypilot does not use --image'),
    (
      [*JOBSET, *NODES, '--output=runs/x'],
      'workdir runs/x/run would be lost .* below /shared',
    ),
    ([*JOBSET, *NODES, '--name=8x'], "name '8x' has to begin with a letter"),
    ([*JOBSET, *NODES, f'--name={"x" * 41}'], 'at most 40 letters'),
    (['--to=sbatch'], '--to=sbatch needs --topology'),
    (['--topology=8xh100'], '--topology has no effect with --to=local'),
    ([*JOBSET, *NODES, '--workers=2'], '--workers has no effect'),
  ],
)
def test_what_does_not_fit_is_refused(words, message, capsys):
  with pytest.raises(SystemExit) as error:
    launch.main([MIXTRAL, *words])
  assert error.value.code == 1
  output = capsys.readouterr()
  assert not output.out
  assert re.search(message, output.err.strip()), output.err
