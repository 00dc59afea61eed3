"""Options of the recording of choices of experts."""

import dataclasses
import functools
from collections.abc import Collection, Iterator

from moe_jax.models.recorded import Apply, plainly, recording
from moe_jax.option_checks import unknown_text
from moe_jax.options import Options, at_least, no_effect, one_of, option

# Names of the records that are not those of an evaluation.
_OTHER_RECORDS = ('train', 'generate')


@dataclasses.dataclass(frozen=True)
class TraceOptions(Options):
  """The choices that are recorded: the section `trace` of a config."""

  every_steps: int = option(
    0,
    'Number of optimizer steps between two whose choices of experts are '
    'recorded into the folder `trace` of the workdir; 0 records no step.',
    at_least(0),
  )
  evaluations: str = option(
    '',
    "Evaluations of the kind 'loss' whose choices are recorded, too: 'all', or "
    'names of entries of `evals` with commas between them; an empty string '
    'records none.',
  )
  logits: bool = option(
    False,
    "Whether the routers' logits are recorded, too, which take most of the "
    'bytes.',
  )
  dtype: str = option(
    'float16',
    'Type in which gates and logits are recorded; float32 loses nothing.',
    one_of('float16', 'float32'),
  )

  @property
  def is_on(self) -> bool:
    """Whether steps or evaluations are recorded."""
    return bool(self.every_steps or self.evaluations)

  @property
  def recording(self) -> Apply:
    """The function that applies a model and returns its choices."""
    return functools.partial(recording, logits=self.logits, dtype=self.dtype)

  @property
  def in_training(self) -> Apply:
    """The function by which the training step applies the model."""
    return self.recording if self.every_steps else plainly

  def has_step(self, step: int) -> bool:
    """Whether an optimizer step, counted from 1, is recorded."""
    return self.every_steps > 0 and (step - 1) % self.every_steps == 0

  def names(self, evals: Collection[str]) -> tuple[str, ...]:
    """The names of the evaluations that are recorded.

    Args:
      evals: The names of all evaluations that can be recorded.
    """
    if self.evaluations == 'all':
      return tuple(evals)
    return tuple(filter(None, map(str.strip, self.evaluations.split(','))))

  def problems_in(self, evals: Collection[str]) -> Iterator[str]:
    """The problems of the options, a text for each.

    Args:
      evals: The names of all evaluations that can be recorded.
    """
    for name in self.names(evals):
      if name not in evals:
        yield unknown_text('evaluation trace.evaluations', name, evals)
      elif name in _OTHER_RECORDS:
        yield (
          f'trace.evaluations={self.evaluations!r}: evaluation {name!r} has a '
          f'name that other records have; {list(_OTHER_RECORDS)} are taken'
        )
    for name in ('logits', 'dtype'):
      value = getattr(self, name)
      if not self.is_on and value != getattr(type(self)(), name):
        yield no_effect(f'trace.{name}', value, 'where nothing is recorded')
