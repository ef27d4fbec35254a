"""Estimators of scikit-learn in the place of a network, for methods that only train and ask their models."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from expunge.core.errors import ExpungeError, InputError
from expunge.engine.functional import Tensors
from expunge.engine.members import Training
from expunge.engine.source import Source

_STATE = "estimator"  #: name under which the bytes of an estimator are kept
_LEAST = 1e-12  #: smallest probability whose logarithm is taken


@dataclass(frozen=True)
class Pass:
    """How an estimator learns a stage.

    Attributes:
        seed: of the order of the rows.
        goes_on: one pass from the state it is in, not a whole fit.
    """

    seed: int
    goes_on: bool


@dataclass(frozen=True)
class EstimatorSource(Source):
    """A source whose ``build`` makes an unfitted estimator of scikit-learn (or a pipeline): rows are flattened to features.

    Of one slice it is fitted; of several it needs ``partial_fit``, and every stage makes one pass over what it reads, in
    an order of its own. Every ``random_state`` is set from the seeds. A row counts as read once in a fit, however
    often the estimator itself goes over it. There is no ``training``: an estimator knows its own.

    Estimators are kept as pickles, as scikit-learn advises: open only folders that you trust. Equal estimators give equal
    answers; their bytes may differ.
    """

    @property
    def plan(self) -> Training:
        """Estimators have none.

        Raises:
            InputError: always.
        """
        raise InputError("This method trains networks step by step, and an estimator was given.", "Choose sisa, or a network.")

    @property
    def model(self) -> Callable[[], nn.Module]:
        """Estimators are no networks.

        Raises:
            InputError: always.
        """
        raise InputError("This method changes the weights of a network, and an estimator was given.", "Choose sisa.")

    def part(self, stages: int, stage: int, seed: int, *, growing: bool) -> Pass:
        """A whole fit, or one pass with an order of its own.

        Raises:
            InputError: several stages, and the estimator cannot go on learning.
        """
        if stages > 1 and not hasattr(self._made(0), "partial_fit"):
            raise InputError("The estimator has no partial_fit, so it cannot learn slice by slice.", "Choose slices=1.")
        return Pass(seed, stages > 1)

    def warm(self) -> None:
        """Nothing to load."""

    def visits(self, part: Any, rows: int) -> int:
        """Once each."""
        return rows

    def learn(self, inputs: Tensor, targets: Tensor, part: Any, seed: int, start: Tensors) -> Tensors:
        """The estimator after one more fit.

        Raises:
            ExpungeError: it cannot be fitted to these rows.
        """
        made = _loaded(start[_STATE]) if start else self._made(seed)
        x, y = inputs.flatten(1).numpy(), targets.numpy()
        try:
            with threadpool_limits(torch.get_num_threads()):
                if part.goes_on:
                    order = np.random.default_rng([part.seed, 41]).permutation(len(y))
                    known = {"classes": np.arange(len(self.table.classes))} if self.table.task == "classification" else {}
                    made.partial_fit(x[order], y[order], **known)
                else:
                    made.fit(x, y)
        except ValueError as error:
            raise ExpungeError(
                f"The estimator cannot be fitted to {len(y)} rows of a shard: {error}", "Choose fewer shards."
            ) from None
        return _bytes(made)

    def fresh(self, seed: int) -> Tensors:
        """An unfitted estimator."""
        return _bytes(self._made(seed))

    def module(self, state: Tensors) -> nn.Module:
        """The estimator as a module."""
        return EstimatorModule(_loaded(state[_STATE]), len(self.table.classes))

    def signature(self) -> str:
        """Its class and parameters, random states apart."""
        return hashlib.sha256(repr(self._made(0)).encode()).hexdigest()

    def _made(self, seed: int) -> Any:
        if self.build is None:
            raise InputError("Nothing says which estimator is trained.", "Give a function that makes it.")
        made = self.build()
        states = {name: seed for name in made.get_params() if name.rpartition("__")[2] == "random_state"}
        return made.set_params(**states)


class EstimatorModule(nn.Module):
    """A fitted estimator as a module: logarithms of probabilities ``[rows, classes]``, or numbers ``[rows, 1]``.

    A class that the estimator has not seen gets the smallest probability. It has no weights to move; what the estimator holds is
    a buffer, so that two modules are told apart.

    Args:
        estimator: fitted, with ``predict_proba`` where it is a classifier.
        classes: how many there are; 0 for a regression.
    """

    def __init__(self, estimator: Any, classes: int) -> None:
        super().__init__()
        if classes and not hasattr(estimator, "predict_proba"):
            raise InputError(
                f"The estimator {type(estimator).__name__} gives no probabilities.", "Choose one with predict_proba."
            )
        self.estimator, self.classes = estimator, classes
        self.register_buffer(_STATE + "_bytes", _bytes(estimator)[_STATE])
        self.none = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device, as the weights of a network do

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores, without gradients."""
        x = inputs.detach().cpu().flatten(1).numpy()
        if not self.classes:
            return torch.from_numpy(np.asarray(self.estimator.predict(x), dtype=np.float64)).reshape(len(x), 1)
        found = torch.full((len(x), self.classes), _LEAST, dtype=torch.float64)
        given = np.asarray(self.estimator.predict_proba(x), dtype=np.float64)
        found[:, [int(c) for c in self.estimator.classes_]] = torch.from_numpy(given).clamp_min(_LEAST)
        return found.log()


def _bytes(estimator: Any) -> Tensors:
    return {_STATE: torch.frombuffer(bytearray(pickle.dumps(estimator)), dtype=torch.uint8)}


def _loaded(held: Tensor) -> Any:
    return pickle.loads(held.numpy().tobytes())  # noqa: S301  (what training wrote; the class says whom to trust)
