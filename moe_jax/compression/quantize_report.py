"""Numbers about the kernels of a layer that was quantised, and their text."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.compression import stored
from moe_jax.compression.quantize_kernels import Outcome
from moe_jax.compression.quantize_layers import Spot
from moe_jax.layers.kernel_format import KernelFormat


class Report(NamedTuple):
  """Numbers about the kernels of a layer.

  Attributes:
    rtn: The squared change of the kernels' outputs, over all their squared
      outputs, when each weight is rounded to the nearest value.
    gptq: The same number for weights that GPTQ rounded.
    weights: The number of weights.
    zeros: The number of weights that are 0 in the result.
    code_bits: The bits of all codes, as they are stored.
    metadata_bits: The bits of scales, zeros and offsets. What fills up kernels
      of fewer codes is known only when all layers are done.
    without_tokens: The experts that no token that counts reaches, for which
      H = I, so that their weights are rounded to the nearest value.
    not_factored: The experts with tokens for which H = I as well, since their
      inputs are all zero or the factorisation failed.
  """

  rtn: float
  gptq: float
  weights: int
  zeros: int
  code_bits: int
  metadata_bits: int
  without_tokens: Sequence[int] = ()
  not_factored: Sequence[int] = ()

  def text(self) -> str:
    """The numbers in one line."""
    phrases = [
      f'error of RTN {self.rtn:.3g}, of GPTQ {self.gptq:.3g}',
      f'zeros {100 * self.zeros / self.weights:.1f} %',
      f'bits a weight {self.code_bits / self.weights:.2f} of codes and '
      f'{self.metadata_bits / self.weights:.2f} of metadata',
    ]
    if self.without_tokens:
      phrases.append(f'H = I for experts {[*self.without_tokens]} (no tokens)')
    if self.not_factored:
      phrases.append(f'H = I for experts {[*self.not_factored]} (no factor)')
    return '; '.join(phrases)


def report_of(
  outcomes: Mapping[Spot, Outcome],
  format: KernelFormat,
  *,
  by_data: bool,
  without_tokens: Sequence[int] = (),
) -> Report:
  """The report of the kernels of a layer.

  Args:
    outcomes: The outcome of each kernel.
    format: The format of the kernels.
    by_data: Whether inputs were read, so that H = I is reported.
    without_tokens: The experts of the layer that no token that counts reaches.
  """
  all_outcomes = outcomes.values()
  total = sum(float(x.total.sum()) for x in all_outcomes)
  bits = [_bits(x, format) for x in all_outcomes]
  plain = np.any([x.plain for x in all_outcomes], axis=0)
  not_factored = {*np.flatnonzero(plain).tolist()} - {*without_tokens}
  return Report(
    rtn=sum(float(x.rtn.sum()) for x in all_outcomes) / (total or 1.0),
    gptq=sum(float(x.gptq.sum()) for x in all_outcomes) / (total or 1.0),
    weights=sum(x.rounded.codes.size for x in all_outcomes),
    zeros=sum(int((x.rounded.values == 0).sum()) for x in all_outcomes),
    code_bits=sum(codes for codes, _ in bits),
    metadata_bits=sum(metadata for _, metadata in bits),
    without_tokens=without_tokens,
    not_factored=sorted(not_factored) if by_data else [],
  )


def _bits(outcome: Outcome, format: KernelFormat) -> tuple[int, int]:
  """The bits of the codes of some kernels, and of their metadata."""
  (arrays,), _ = stored.store([outcome.rounded], format)
  codes = 8 * arrays['codes'].nbytes
  if 'offsets' in arrays:  # the padding of shorter experts is no code
    codes = 16 * int(arrays['offsets'][..., -1].sum())
  metadata = sum(8 * x.nbytes for name, x in arrays.items() if name != 'codes')
  return codes, metadata


def numbers_of(
  reports: Sequence[Report], stored_bytes: int
) -> dict[str, float]:
  """Means over layers of errors, and shares over all weights.

  Args:
    reports: The reports of all layers.
    stored_bytes: The bytes of all arrays that store their kernels. All that is
      no code counts as metadata.
  """
  weights = sum(report.weights for report in reports)
  code_bits = sum(report.code_bits for report in reports)
  return {
    'rtn error': sum(report.rtn for report in reports) / len(reports),
    'gptq error': sum(report.gptq for report in reports) / len(reports),
    'zeros': sum(report.zeros for report in reports) / weights,
    'code bits': code_bits / weights,
    'metadata bits': (8 * stored_bytes - code_bits) / weights,
  }
