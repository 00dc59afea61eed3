"""Shares of the gain that a student keeps, of larger and larger teachers.

    python -m experiments.switch_table7 --preset=quick

Switch Transformers (https://arxiv.org/abs/2101.03961), Table 7: dense students
of one size keep 37 % of the gain of a teacher of 1.1 billion parameters, and 27
to 28 % of those of 7 and 15 billion, which are compressed by 97 and 99 %.

Here: the models of `switch_table6`, with teachers of 2 to 32 experts. Each
student begins with the non-expert weights of its teacher and learns from 0.75
of hard and 0.25 of soft labels. Compression is the share of the teacher's
parameters that the student lacks; shares kept are of each teacher's own gain. A
student has the steps of its teacher behind it, so that the dense twin of as
many steps as both together is the control, as in `switch_table6`.

Found, 5 seeds: teachers gain 0.05 nats a byte with 2 experts, 0.14 with 16 and
0.12 with 32, and the share that a student keeps falls, as published. All
students are better than their teachers here (113 to 288 % of the gain), and
worse by 0.05 to 0.07 nats than the dense twin of as many steps.

The full preset was planned for 38 minutes on two idle cores; its runs took 54
core minutes. The claims were written before these runs.
"""

from collections.abc import Sequence

import numpy as np

from experiments import switch_table6
from experiments.study import byte_models, command, parts
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from experiments.switch_table6 import DENSE, GAIN, LONG, SHARE, teacher_of
from moe_jax.analysis.intervals import Interval

EXPERTS = (2, 4, 8, 16, 32)
COMPRESSION = Column('compression', unit='% of parameters', digits=1)
_PAPER = 'switch2021/table7'


def student_of(num_experts: int) -> str:
  """The name of the student whose teacher has so many experts."""
  return f'student of {num_experts} experts'


def arms(preset: Preset) -> list[Arm]:
  """The dense twin, a student of each teacher, and the twin trained on."""
  options = switch_table6.STUDENTS[switch_table6.MIXED]
  students = (switch_table6.student(student_of(E), E, options) for E in EXPERTS)
  long = switch_table6.long_twin(preset)
  return [byte_models.dense(DENSE), *students, long]


def rows(results: parts.Results) -> Sequence[Row]:
  """Rows of the dense twins, of the teachers and of their students."""
  table = [switch_table6.row_of(results, n, n) for n in (DENSE, LONG)]
  for E in EXPERTS:
    teacher, student = teacher_of(E), student_of(E)
    if student not in results:  # a quick preset leaves some out
      continue
    table.append(switch_table6.row_of(results, teacher, teacher, 'teacher', E))
    row = switch_table6.row_of(results, student, teacher, 'student', E)
    small, large = (
      np.array([run[switch_table6.PARAMETERS] for run in results[name]])
      for name in (student, teacher)
    )
    compression = (100 * (1 - small / large)).tolist()
    table.append(row.plus({COMPRESSION.name: compression}))
  return table


def remarks(results: parts.Results) -> str:
  """The denominators of the shares, and the control of the students."""
  gains = []
  for E in EXPERTS:
    if teacher_of(E) in results:
      gain = Interval.of(switch_table6.gain_of(results, teacher_of(E)))
      gains.append(f'{gain:.4f} with {E} experts')
  return (
    "Shares are of each teacher's gain over the dense twin, in nats a byte: "
    f'{", ".join(gains)}. {switch_table6.UNCLEAR} {switch_table6.BEHIND}'
  )


STUDY = Study(
  name='switch_table7',
  title='Distillation of teachers with more and more experts',
  source='Switch Transformers, Table 7',
  config=switch_table6.config,
  arms=arms,
  rows=rows,
  starts=lambda preset: [switch_table6.teacher(preset, E) for E in EXPERTS],
  presets={
    'quick': Preset(
      250, 5, start_steps=250, without=(student_of(4), student_of(16))
    ),
    'full': Preset(1000, 5, start_steps=1000),
  },
  columns=[byte_models.LOSS, GAIN, SHARE, COMPRESSION],
  claims={
    'a teacher with more experts is better': Claim(
      f'loss: {teacher_of(32)} < {teacher_of(2)}',
      [f'{_PAPER}/14.7B/teacher_nlp', f'{_PAPER}/1.1B/teacher_nlp'],
    ),
    'and so is its student': Claim(
      f'loss: {student_of(32)} < {student_of(2)}',
      [f'{_PAPER}/14.7B/student_nlp', f'{_PAPER}/1.1B/student_nlp'],
    ),
    'of a larger teacher a student keeps a smaller share of the gain': Claim(
      f'share kept: {student_of(32)} < {student_of(2)}',
      [f'{_PAPER}/14.7B/gap_kept', f'{_PAPER}/1.1B/gap_kept'],
    ),
    'but still a part of it': Claim(
      f'share kept: {student_of(32)} > 0', [f'{_PAPER}/14.7B/gap_kept']
    ),
    'a student gains more than as many steps without a teacher': (
      f'loss: {student_of(32)} < {LONG}'
    ),
  },
  measure=switch_table6.parameters,
  remarks=remarks,
  length=switch_table6.length,
  gates={'loss: teacher, 32 experts < dense': ['*']},
  figure=Figure(['loss', 'share kept'], 'number of experts', log_x=True),
  tasks=switch_table6.STUDY.tasks,
  written='2026-11-27',
)
get_config, get_items = command.entries(STUDY, __name__)
