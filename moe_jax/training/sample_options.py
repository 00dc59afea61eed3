"""Options of the text sample that a run writes at its end."""

import dataclasses
from typing import Self

from moe_jax.options import NOT_EMPTY, SEED, Options, at_least, option


@dataclasses.dataclass(frozen=True)
class SampleOptions(Options):
  """The text sample at the end of a run."""

  prompt: str = option(
    '\n',
    'Text that the sample at the end of the run continues or answers.',
    NOT_EMPTY,
    when={'num_tokens': at_least(1)},
  )
  num_tokens: int = option(
    300,
    'Number of tokens of the text sample at the end of the run; 0 draws no '
    'sample.',
    at_least(0),
  )
  temperature: float = option(
    0.8,
    'Temperature by which logits are divided before a token of the sample is '
    'drawn; 0 takes the likeliest token.',
    at_least(0),
    when={'num_tokens': at_least(1)},
  )
  task: str = option(
    '',
    'Name of the task of the prompt, a source of data.mixture, for a model '
    'that routes by task; an empty string is the first task.',
    when={'num_tokens': at_least(1)},
  )
  seed: int = option(
    0,
    'Seed for drawing the tokens of the sample.',
    SEED,
    when={'num_tokens': at_least(1)},
  )

  def shrunk(self) -> Self:
    """The same sample with at most 16 tokens."""
    return dataclasses.replace(self, num_tokens=min(self.num_tokens, 16))
