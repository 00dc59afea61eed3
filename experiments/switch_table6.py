"""Shares of a sparse teacher's gain that a dense student keeps.

    python -m experiments.switch_table6 --preset=quick

Switch Transformers (https://arxiv.org/abs/2101.03961), Table 6: a dense student
that learns from a sparse teacher's probabilities alone keeps 3 % of what the
teacher gains over a dense model; 20 % if it also begins with the teacher's
non-expert weights, and 29 % with 0.75 of hard and 0.25 of soft labels. A
student that begins with these weights without learning from the teacher gains
nothing.

Here: decoders of bytes with two layers, all of them sparse and dropless in the
teacher, which has 16 experts and is trained for as long as its students. The
share is the mean gain of an arm over the mean gain of the teacher, both over
the dense twin on the same seeds; its interval is that of a ratio of means. One
row is our own: feed-forwards that begin as the expert of the highest
conditional probability (https://arxiv.org/abs/2605.28207), instead of anew. A
student that begins with weights of the teacher has its steps behind it, which
is little beside the length of the paper's runs and much here: the dense twin of
as many steps as both together is the control.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.study import byte_models, command, parts
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.tables import ratios
from experiments.study.tasks import TASKS
from moe_jax.analysis.intervals import Interval
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

NUM_EXPERTS = 16
DENSE, ALONE = 'dense', 'non-expert start alone'
LONG = 'dense, twice the steps'
PLAIN = 'distilled'
STARTED = 'distilled, non-expert start'
MIXED = 'distilled, non-expert start, mixed labels'
JOINED = 'distilled, concatenated start, mixed labels'
# Options of `config.distill`, by arm.
STUDENTS = {
  PLAIN: {'hard_weight': 0.0, 'soft_weight': 1.0, 'start': 'none'},
  STARTED: {'hard_weight': 0.0, 'soft_weight': 1.0, 'start': 'non_experts'},
  MIXED: {'start': 'non_experts'},
  JOINED: {'start': 'concatenated'},
  ALONE: {'hard_weight': 1.0, 'soft_weight': 0.0, 'start': 'non_experts'},
}
GAIN = Column('gain', unit='nats/byte')
SHARE = Column('share kept', unit='% of gain', digits=1)
PARAMETERS = 'parameters'
BEHIND = (
  "A student that begins with its teacher's weights has the teacher's steps "
  'behind it, which the dense twin has not, and reads the batches that the '
  'teacher has read: compare it with the row '
  f'"{LONG}", which has as many steps without a teacher, on new batches.'
)
UNCLEAR = 'No share is given of a gain whose interval is not all above zero.'


def teacher_of(num_experts: int) -> str:
  """The name of the teacher that has so many experts."""
  return f'teacher, {num_experts} experts'


TEACHER = teacher_of(NUM_EXPERTS)


def config(steps: int):
  """Config of the teacher, which its students change."""
  return byte_models.decoder(steps, num_experts=NUM_EXPERTS, drops=False)


def teacher(preset: Preset, num_experts: int) -> parts.Start:
  """The run of the teacher that has so many experts."""
  steps = preset.start_steps
  overrides = {
    'total_steps': steps,
    'log_every_steps': max(steps // 10, 1),
    'optimizer.schedule.warmup_steps': min(100, steps // 8),
    'model.moe.num_experts': num_experts,
  }
  return parts.Start(teacher_of(num_experts), overrides=overrides)


def student(name: str, num_experts: int, options: Mapping[str, Any]) -> Arm:
  """The arm of a dense student.

  Args:
    name: The name of the arm.
    num_experts: The number of experts of its teacher.
    options: Options of `config.distill`.
  """
  overrides = {f'distill.{key}': value for key, value in options.items()}
  overrides['model.moe.num_experts'] = 0
  return Arm(name, overrides, teacher=teacher_of(num_experts))


def long_twin(preset: Preset) -> Arm:
  """The dense twin with the steps of a student and of its teacher."""
  steps = preset.steps + preset.start_steps
  return byte_models.dense(LONG, total_steps=steps)


def arms(preset: Preset) -> list[Arm]:
  """The dense twin, and a student for each way to learn."""
  students = (student(n, NUM_EXPERTS, o) for n, o in STUDENTS.items())
  return [byte_models.dense(DENSE), *students, long_twin(preset)]


def parameters(run: Run, state: TrainState) -> dict[str, int]:
  """The number of a run's parameters; see `TrainingRunner.measure`."""
  del run
  return {PARAMETERS: sum(x.size for x in jax.tree.leaves(state.params))}


def losses(results: parts.Results, name: str) -> np.ndarray:
  """The losses of an arm or of a teacher, one for each seed."""
  return np.array([byte_models.LOSS.of(run) for run in results[name]])


def gain_of(results: parts.Results, name: str) -> np.ndarray:
  """The gain of an arm or a teacher over the dense twin, for each seed."""
  return losses(results, DENSE) - losses(results, name)


def row_of(
  results: parts.Results,
  name: str,
  teacher: str,
  line: str = '',
  x: float | None = None,
) -> Row:
  """The row of a run, with its gain and the share of a teacher's.

  The share is NaN, which stays empty, unless the interval of the teacher's gain
  is all above zero: next to zero a ratio says nothing.

  Args:
    results: The results of all runs.
    name: The name of the run.
    teacher: The name of the teacher whose gain is the denominator.
    line: Name of the figure's line, as in `Row`.
    x: Coordinate along the x axis, as in `Row`.
  """
  gain, teacher_gain = (gain_of(results, run) for run in (name, teacher))
  values = {byte_models.LOSS.name: losses(results, name)}
  if name != DENSE:
    values[GAIN.name] = gain
  if name not in (DENSE, teacher):
    values[SHARE.name] = np.full_like(gain, np.nan)
    if Interval.of(teacher_gain).sign() > 0:
      values[SHARE.name] = 100 * ratios(gain, teacher_gain)
  return Row(name, {k: v.tolist() for k, v in values.items()}, line, x)


def rows(results: parts.Results) -> Sequence[Row]:
  """Rows of the teacher, of the dense twin and of its students."""
  names = [TEACHER, DENSE, *STUDENTS, LONG]
  # A quick preset leaves some out.
  return [row_of(results, n, TEACHER) for n in names if n in results]


def length(preset: Preset) -> str:
  """The length of a preset's runs, in words."""
  return (
    f'{preset.start_steps:,} steps of the teacher, and {preset.steps:,} steps '
    'of each student and of the dense twin'
  )


def remarks(results: parts.Results) -> str:
  """The denominator of the shares."""
  gain = Interval.of(gain_of(results, TEACHER))
  return (
    f"Shares are of the teacher's gain over the dense twin, {gain:.4f} nats a "
    f'byte. {UNCLEAR} {BEHIND} A share above 100 % '
    'probably says that the models had much to learn still.'
  )


# The paper's rows.
_PUBLISHED = {
  TEACHER: 'teacher 3.8B',
  DENSE: 'T5-Base',
  PLAIN: 'distillation',
  STARTED: '+ init non-expert weights',
  MIXED: '+ 0.75 hard, 0.25 soft mix',
  ALONE: 'init without distillation',
}


def cells(*arms: str) -> list[str]:
  """Addresses of the paper's negative log perplexities of some arms."""
  return [f'switch2021/table6/{_PUBLISHED[arm]}/nlp' for arm in arms]


def better(arm: str, other: str) -> Claim:
  """A claim of the paper that one arm has a lower loss than another."""
  return Claim(f'loss: {arm} < {other}', cells(arm, other))


STUDY = Study(
  name='switch_table6',
  title='Distillation of a sparse teacher into a dense student',
  source='Switch Transformers, Table 6',
  config=config,
  arms=arms,
  rows=rows,
  starts=lambda preset: [teacher(preset, NUM_EXPERTS)],
  presets={
    'quick': Preset(250, 5, start_steps=250, without=(JOINED,)),
    'full': Preset(800, 5, start_steps=800),
  },
  columns=[byte_models.LOSS, GAIN, SHARE],
  claims={
    'the teacher is better than its dense twin': better(TEACHER, DENSE),
    'soft labels help': better(PLAIN, DENSE),
    'to begin with non-expert weights helps a student': better(STARTED, PLAIN),
    'to mix in hard labels helps further': better(MIXED, STARTED),
    'to begin with non-expert weights does not help without a teacher': Claim(
      f'loss: {ALONE} > {DENSE}',
      cells(ALONE, DENSE),
      note='The paper has 0.003 between the two.',
    ),
    'with a teacher a start is worth more than without': better(MIXED, ALONE),
    'a student keeps a part of the gain': Claim(
      f'share kept: {MIXED} > 0',
      [f'switch2021/table6/{_PUBLISHED[MIXED]}/gap_kept'],
    ),
    'a student keeps less than all of the gain': f'share kept: {MIXED} < 100',
    'a student gains more than as many steps without a teacher': (
      f'loss: {MIXED} < {LONG}'
    ),
    'feed-forwards made of experts are a better start than new ones': (
      f'loss: {JOINED} < {MIXED}'
    ),
  },
  measure=parameters,
  remarks=remarks,
  length=length,
  written='2026-11-27',
  gates={'loss: teacher, 16 experts < dense': ['*']},
  figure=Figure(['loss', 'share kept']),
  tasks={'cipher': TASKS['cipher'], **TASKS},
)
get_config, get_items = command.entries(STUDY, __name__)
