"""Shares of a sparse teacher's gain that a dense student keeps.

    python -m experiments.switch_table6 --preset=quick

Switch Transformers (https://arxiv.org/abs/2101.03961), Table 6: a dense student
that learns from a sparse teacher's probabilities alone keeps 3 % of what the
teacher gains over a dense model; 20 % if it also begins with the teacher's
non-expert weights, and 29 % with 0.75 of hard and 0.25 of soft labels. A
student that begins with these weights without learning from the teacher gains
nothing. Table 7: of larger teachers, students keep smaller shares, 37 % of that
of 1.1 billion parameters, and 27 to 28 % of those of 7 and 15 billion.

Here: decoders of bytes with two layers, which are sparse and dropless in the
teachers. These have 4, 8 or 32 experts; Table 6 is of 8. A teacher of one
expert, whose gate is 1, computes what the dense twin does: it is the row
"dense", and what students are compared with begins with it. A student that
begins with weights of its teacher has the teacher's steps behind it, and reads
its first batches again. So have two dense models that go on from "dense" with
hard labels, and as many steps, batches and changes of the rate: one with new
feed-forwards, as students have, the other with all weights, which is the dense
twin of equal total steps. The paper's dense model begins anew.

The gain of a row is over a dense model of as many steps. The share that a
student keeps is of what lies between this model and the teacher; another column
has it over the twin with all weights. Whether a start helps is asked of two
students of soft labels and equal total steps: one has the teacher's steps
behind it, the other takes all itself, in one schedule of the rate and without
batches that come again. Students take fewer steps than teachers, since a dense
model that is trained on for as many would be better than the teacher. Rates are
searched for each row, those of teachers first.

The quick preset decides nothing. The full preset, 4 teachers and an arm of 900
steps, one of 1,250, 7 of 350, 5 seeds, and 104 trials of 0.3 of these steps,
took 54 of its planned 79 core minutes. The claims were written anew, before any
run of them, when students and dense models had equal steps.
"""

from collections.abc import Sequence

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

FEW, USUAL, MANY = 4, 8, 32  # experts of the teachers
EXPERTS = (1, FEW, USUAL, MANY)
DENSE = 'dense'


def teacher_of(num_experts: int) -> str:
  """The name of the teacher that has so many experts."""
  return f'teacher, {num_experts} experts' if num_experts > 1 else DENSE


def student_of(num_experts: int) -> str:
  """The name of the student of mixed labels of that teacher."""
  return f'student of {num_experts} experts'


TEACHER, STUDENT = teacher_of(USUAL), student_of(USUAL)
PLAIN, LONGER = 'distilled', 'distilled, all steps its own'
STARTED = 'distilled, non-expert start'
ALONE = 'non-expert start alone'
CONTROL, TRAINED_ON = 'dense, non-expert start alone', 'dense, trained on'
SOFT = {'hard_weight': 0.0, 'soft_weight': 1.0}
HARD = {'hard_weight': 1.0, 'soft_weight': 0.0}
# Experts of the teacher, start and weights of labels by arm; labels are mixed
# by default.
STUDENTS = {
  PLAIN: (USUAL, 'none', SOFT),
  LONGER: (USUAL, 'none', SOFT),
  STARTED: (USUAL, 'non_experts', SOFT),
  **{student_of(E): (E, 'non_experts', {}) for E in EXPERTS[1:]},
  ALONE: (USUAL, 'non_experts', HARD),
  CONTROL: (1, 'non_experts', HARD),
  TRAINED_ON: (1, 'concatenated', HARD),
}
# Dense models of as many steps; that of others is `CONTROL`.
CONTROLS = {teacher_of(E): DENSE for E in EXPERTS}
CONTROLS |= {PLAIN: DENSE, LONGER: TRAINED_ON}
GAIN = Column('gain', unit='nats/byte')
SHARE = Column('share kept', unit='% of gap', digits=1)
OVER_TWIN = Column('share over trained on', unit='% of gap', digits=1)
PARAMETERS = 'parameters'


def config(steps: int):
  """Config of a teacher, which its students change."""
  config = byte_models.decoder(steps, num_experts=USUAL, drops=False)
  config.model.moe.router.token_choice.z_weight = 0.0
  return config


def length(steps: int) -> dict[str, int]:
  """What the runs of so many steps change, which are not a student's."""
  return {
    'total_steps': steps,
    'optimizer.schedule.warmup_steps': min(100, steps // 8),
  }


def starts(preset: Preset) -> list[parts.Start]:
  """The teachers, and the dense twin."""
  return [
    parts.Start(
      teacher_of(E),
      overrides={**length(preset.start_steps), 'model.moe.num_experts': E},
      searched=True,
    )
    for E in EXPERTS
  ]


def arms(preset: Preset) -> list[Arm]:
  """A dense arm for each way to learn or to begin."""
  made = []
  for name, (E, start, labels) in STUDENTS.items():
    options = {**labels, 'start': start}
    overrides = {f'distill.{key}': value for key, value in options.items()}
    overrides['model.moe.num_experts'] = 0
    if start == 'none':
      own = preset.steps if name == LONGER else 0
      overrides |= length(preset.start_steps + own)
    made.append(Arm(name, overrides, teacher=teacher_of(E)))
  return made


def parameters(run: Run, state: TrainState) -> dict[str, int]:
  """The number of a run's parameters; see `TrainingRunner.measure`."""
  del run
  return {PARAMETERS: sum(x.size for x in jax.tree.leaves(state.params))}


def rows(results: parts.Results) -> Sequence[Row]:
  """Rows of teachers and students, with gains over a control and shares.

  A share stays empty unless the interval of what lies between control and
  teacher is all above zero: next to zero a ratio says nothing.
  """
  names = [*map(teacher_of, EXPERTS), *STUDENTS]
  table = {name: STUDY.row_of(Arm(name, {}), results) for name in names}
  losses = {k: np.array(row.values['loss']) for k, row in table.items()}
  for name in names:
    control = CONTROLS.get(name, CONTROL)
    if name == control:
      continue
    values = {GAIN.name: (losses[control] - losses[name]).tolist()}
    E = STUDENTS[name][0] if name in STUDENTS else 1
    bases = {SHARE.name: control}
    if name != PLAIN:  # which has fewer steps
      bases[OVER_TWIN.name] = TRAINED_ON
    for column, base in bases.items():
      gap = losses[base] - losses[teacher_of(E)]
      if E > 1 and Interval.of(gap).sign() > 0:
        share = ratios(losses[base] - losses[name], gap)
        values[column] = (100 * share).tolist()
    table[name] = table[name].plus(values)
  return [*table.values()]


# The paper's rows.
_PUBLISHED = {
  TEACHER: 'teacher 3.8B',
  DENSE: 'T5-Base',
  PLAIN: 'distillation',
  STARTED: '+ init non-expert weights',
  STUDENT: '+ 0.75 hard, 0.25 soft mix',
  ALONE: 'init without distillation',
}
_TABLE7 = 'switch2021/table7'
ANEW = "The paper's dense model begins anew."


def cells(*arms: str) -> list[str]:
  """Addresses of the paper's negative log perplexities of some arms."""
  return [f'switch2021/table6/{_PUBLISHED[arm]}/nlp' for arm in arms]


def better(arm: str, other: str) -> Claim:
  """A claim of the paper that one arm has a lower loss than another."""
  return Claim(f'loss: {arm} < {other}', cells(arm, other))


def sizes(column: str, *models: str) -> list[str]:
  """Addresses of the paper's numbers of teachers of different sizes."""
  return [f'{_TABLE7}/{model}/{column}' for model in models]


STUDY = Study(
  name='switch_table6',
  title='Distillation of sparse teachers into dense students',
  source='Switch Transformers, Tables 6 and 7',
  config=config,
  arms=arms,
  rows=rows,
  starts=starts,
  presets={
    'quick': Preset(
      20, 3, start_steps=50, underpowered='50 steps make no good teacher'
    ),
    'full': Preset(350, 5, start_steps=900),
  },
  columns=[
    byte_models.LOSS,
    GAIN,
    SHARE,
    OVER_TWIN,
    Column(PARAMETERS, PARAMETERS, 'thousands', 0, lambda n: n / 1e3),
  ],
  claims={
    'the teacher is better than its dense twin': better(TEACHER, DENSE),
    'soft labels help': better(PLAIN, DENSE),
    'to begin with non-expert weights helps a student': Claim(
      f'loss: {STARTED} < {LONGER}',
      cells(STARTED, PLAIN),
      "Both have as many steps in all; in the paper the teacher's are free.",
    ),
    'to mix in hard labels helps further': better(STUDENT, STARTED),
    'to begin with non-expert weights hurts without a teacher': Claim(
      f'loss: {ALONE} > {CONTROL}',
      cells(ALONE, DENSE),
      f"Here a dense model's are the other start. {ANEW} It has 0.003 between "
      'the two.',
    ),
    'with a teacher a start is worth more than without': better(STUDENT, ALONE),
    'a student keeps a part of the gain': Claim(
      f'share kept: {STUDENT} > 0',
      [f'switch2021/table6/{_PUBLISHED[STUDENT]}/gap_kept'],
      ANEW,
    ),
    'a student keeps less than all of the gain': f'share kept: {STUDENT} < 100',
    'a student gains more than as many steps without a teacher': (
      f'loss: {STUDENT} < {TRAINED_ON}'
    ),
    'a teacher with more experts is better': Claim(
      f'loss: {teacher_of(MANY)} < {teacher_of(FEW)}',
      sizes('teacher_nlp', '14.7B', '1.1B'),
    ),
    'and so is its student': Claim(
      f'loss: {student_of(MANY)} < {student_of(FEW)}',
      sizes('student_nlp', '14.7B', '1.1B'),
    ),
    'of a larger teacher a student keeps a smaller share of the gain': Claim(
      f'share kept: {student_of(MANY)} < {student_of(FEW)}',
      sizes('gap_kept', '14.7B', '1.1B'),
      ANEW,
    ),
    'but still a part of it': Claim(
      f'share kept: {student_of(MANY)} > 0', sizes('gap_kept', '14.7B'), ANEW
    ),
  },
  measure=parameters,
  gates={
    f'loss: {TEACHER} < {DENSE}': ['*'],
    f'loss: {TEACHER} < {CONTROL}': ['a student keeps*'],
    f'loss: {teacher_of(FEW)} < {CONTROL}': ['*smaller share*'],
    f'loss: {teacher_of(MANY)} < {CONTROL}': ['*smaller share*', 'but still*'],
    f'loss: {teacher_of(MANY)} < {teacher_of(FEW)}': [
      'and so*',
      '*smaller share*',
    ],
  },
  rates=(0.002, 0.005, 0.012, 0.03),
  figure=Figure(['loss', 'gain', 'share kept']),
  remarks=f'A gain is over a dense model of as many steps in all: "{DENSE}", '
  f'"{CONTROL}", or "{TRAINED_ON}" for "{LONGER}". A share is of what '
  'lies between this model, or the one that is trained on, and the teacher; '
  'there is none where the interval of that is not all above zero.',
  tasks={'cipher': TASKS['cipher'], **TASKS},
  earlier=[
    'Until 2026-12-02 students that began with weights of their teacher were '
    'compared with a dense twin of their own 800 steps, without the steps of '
    'the teacher, and no rate was searched: with 16 experts they kept 59.9 ± '
    '1.2 % of the gain with soft labels, 135.6 ± 12.8 % with mixed ones and '
    '137.4 ± 15.4 % without any ("opposite"). The dense twin of 1,600 steps '
    'was 0.055 ± 0.005 nats a byte better than the student of mixed labels '
    '("refuted").',
    'A study of its own, `switch_table7`, had students of teachers of 2 to 32 '
    'experts, of 1,000 steps each: they kept 288 ± 92 % to 113 ± 10 % of the '
    'gain, less of larger teachers ("direction reproduced"); that of 32 '
    'experts was 0.014 ± 0.008 better than that of 2, and 0.058 ± 0.005 worse '
    'than a dense twin of 2,000 steps ("refuted").',
    'Two claims were replaced by one, against "dense, trained on", whose rate '
    "begins anew when a student's does: that a student gains more than as many "
    'steps without a teacher. One was taken out: feed-forwards made of experts '
    'were a worse start than new ones, by 0.014 ± 0.005 ("refuted").',
  ],
  written='2026-12-02',
)
get_config, get_items = command.entries(STUDY, __name__)
