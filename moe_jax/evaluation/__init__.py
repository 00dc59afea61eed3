"""Kinds of evaluation, for the entries of `config.evals`.

'loss' measures the validation loss; 'generate' scores generated outputs (BLEU,
chrF, ROUGE-L, exact match); 'choice' takes the likeliest of several answers;
'source_losses' and 'source_scores' measure every source of a mixture. A config
names a user's own kind as 'module:name'. A trained or imported run is evaluated
by

    from moe_jax import evaluation

    evaluation.evaluate('runs/tiny_seq2seq', evaluation.ChoiceEvaluation())
"""

from moe_jax.config import Kinds
from moe_jax.evaluation.by_source import SourceLosses, SourceScores
from moe_jax.evaluation.choice import ChoiceEvaluation

# `import X as X` marks the name X as public.
from moe_jax.evaluation.evaluate_run import evaluate as evaluate
from moe_jax.evaluation.evaluate_run import evaluate_all as evaluate_all
from moe_jax.evaluation.generated_text import GenerateEvaluation
from moe_jax.training.evaluate import EvaluationOptions, LossEvaluation

EVALUATIONS = Kinds(
  'evaluation',
  EvaluationOptions,
  {
    'loss': LossEvaluation,
    'generate': GenerateEvaluation,
    'choice': ChoiceEvaluation,
    'source_losses': SourceLosses,
    'source_scores': SourceScores,
  },
  inline=True,
)
