"""Measures for models that classify or predict: pure functions over arrays.

Nothing here knows a model, a file or an adapter. Arrays are ``[examples]`` or ``[models, examples]`` in, numbers or arrays out.
What holds everywhere:

- Accuracies, rates and shares are in [0, 1] (papers print them in percent).
- Each function states its direction and what a model retrained without the forget set gets. That value is the target; it is
  rarely 0 or 0.5, and a perfect method scores at the noise floor between two retrained models, not at the end of the range.
- An empty input, lengths that differ, or a sample of one class where two are needed raise
  :class:`~expunge.core.errors.InputError`. A value that is not finite, or scores that cannot be told apart where the measure
  then has no meaning, give NaN, never a silent 0: a destroyed model must be reported as one.
"""
