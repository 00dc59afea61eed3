"""The options of distillation: `config.distill`."""

import dataclasses
from collections.abc import Iterator

from moe_jax.config import Options, option
from moe_jax.partitioning import ShardingOptions

NONE, NON_EXPERTS, CONCATENATED = 'none', 'non_experts', 'concatenated'


@dataclasses.dataclass(frozen=True)
class DistillOptions(Options):
  """Options of distillation from another run, whose model is the teacher."""

  teacher: str = option(
    '',
    'Folder of the run whose model is the teacher of this one, trained or '
    'imported; with an empty string there is no teacher.',
  )
  step: int = option(
    -1,
    'Optimizer step of the checkpoint of the teacher that is read, 0 for an '
    'imported one; -1 is the newest good one when the run begins, which it '
    'then keeps to.',
    minimum=-1,
  )
  start: str = option(
    NON_EXPERTS,
    "Parameters of the teacher that the run begins with: 'non_experts' are all "
    'but experts and routers, which are among them in the option `trainable`; '
    "with 'concatenated', feed-forwards are made of the teacher's experts of "
    "the highest conditional probability, too; 'none' takes none.",
    choices=(NONE, NON_EXPERTS, CONCATENATED),
  )
  start_batches: int = option(
    8,
    'Number of training batches on which the conditional probability of the '
    "teacher's experts is measured.",
    minimum=1,
  )
  hard_weight: float = option(
    0.75,
    'Weight in the loss of the cross-entropy of the targets (hard labels); 0 '
    'leaves them out.',
    minimum=0,
  )
  soft_weight: float = option(
    0.25,
    "Weight in the loss of the cross-entropy of the teacher's probabilities "
    '(soft labels); with 0 the teacher only gives parameters to begin with.',
    minimum=0,
  )
  temperature: float = option(
    1.0,
    'Number that the logits of both models are divided by in the soft loss, '
    'which is multiplied by its square.',
    above=0,
  )
  logits: str = option(
    '',
    "Folder of the teacher's largest logits for the batches of this run, as "
    '`python -m moe_jax.compression keep_logits` writes it; with an empty '
    "string the teacher is computed beside the student's step.",
  )
  sharding: ShardingOptions = option(
    ShardingOptions(),
    "Mesh axes over which dimensions of the teacher's arrays are split.",
  )

  @property
  def begins(self) -> bool:
    """Whether the teacher gives parameters to begin with."""
    return bool(self.teacher) and self.start != NONE

  def problems(self) -> Iterator[str]:
    """A text for each option without effect, and one if both weights are 0."""
    if not self.teacher:
      yield from self.in_vain('unless teacher is given')
      return
    if not self.soft_weight:
      reason = 'unless soft_weight is above 0'
      yield from self.in_vain(reason, 'temperature', 'logits')
    if not self.hard_weight and not self.soft_weight:
      yield 'hard_weight=0.0 with soft_weight=0.0: there is nothing to learn'
    if not self.soft_weight and self.start == NONE:
      yield (
        f'teacher={self.teacher!r} has no effect with soft_weight=0.0 and '
        f'start={self.start!r}'
      )
