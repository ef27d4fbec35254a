"""scikit-learn estimators as networks: the same predictions, and the way back after unlearning.

Linear models and multi-layer perceptrons are networks already; here they become ``torch`` modules with the estimator's own
weights in its own precision, and the weights of a module are written back into the estimator. Scalers that stand before one
in a ``Pipeline`` become fixed layers. Their statistics were taken from all rows, also from those to forget, and unlearning
does not change them: a mean over n rows carries a share of 1/n of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn import linear_model, neural_network, preprocessing, svm
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional

from expunge.core.errors import InputError

Head = Literal["scores", "binary", "one_vs_rest", "number"]

UNSEEN = math.log(np.finfo(np.float64).eps)
"""Score of a class that an estimator has never seen, -36.04: where scikit-learn too clips probabilities of 0 in a loss."""

_LINEAR_CLASSIFIERS = (
    linear_model.LogisticRegression, linear_model.LogisticRegressionCV, linear_model.SGDClassifier, linear_model.Perceptron,
    linear_model.RidgeClassifier, linear_model.RidgeClassifierCV, svm.LinearSVC,
)  # fmt: skip
_LINEAR_REGRESSORS = (
    linear_model.LinearRegression, linear_model.Ridge, linear_model.RidgeCV, linear_model.Lasso, linear_model.LassoCV,
    linear_model.ElasticNet, linear_model.ElasticNetCV, linear_model.SGDRegressor, linear_model.HuberRegressor,
    linear_model.BayesianRidge, svm.LinearSVR,
)  # fmt: skip
_PERCEPTRONS = (neural_network.MLPClassifier, neural_network.MLPRegressor)
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity, "logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU,
}  # fmt: skip


class EstimatorNetwork(nn.Module):
    """The network that an estimator is.

    Scores are ``[B, C]`` in the order of the estimator's classes. Softmax of them is what the estimator calls probabilities, for
    logistic regression, perceptrons, and stochastic gradient descent with the logistic loss; for other linear classifiers, which
    know none, the scores are the decision function, and their largest is the prediction. A classifier of two classes has one
    output f, and the scores are (0, f). A regressor returns ``[B, 1]``.

    Args:
        weights: of each layer ``[outputs, inputs]``.
        biases: of each layer ``[outputs]``; none: the layer has none.
        activation: between the layers.
        head: how outputs become scores; ``one_vs_rest``: each output is the log odds of its class against all others.
        scale, shift: of the features ``[inputs]``, applied first: ``x * scale + shift``.
    """

    def __init__(
        self,
        weights: Sequence[Any],
        biases: Sequence[Any | None],
        *,
        activation: str = "identity",
        head: Head = "scores",
        scale: Any = None,
        shift: Any = None,
    ) -> None:
        super().__init__()
        self.head = head
        parts: list[nn.Module] = []
        for weight, bias in zip(weights, biases, strict=True):
            held = torch.from_numpy(np.array(weight))
            layer = nn.Linear(held.shape[1], held.shape[0], bias=bias is not None, dtype=held.dtype)
            with torch.no_grad():
                layer.weight.copy_(held)
                if bias is not None:
                    layer.bias.copy_(torch.from_numpy(np.array(bias)))
            parts += [layer, _ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*parts[:-1])
        dtype = parts[0].weight.dtype
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", None if scale is None else torch.as_tensor(scale, dtype=dtype))  # type: ignore[arg-type]
        self.register_buffer("shift", None if shift is None else torch.as_tensor(shift, dtype=dtype))  # type: ignore[arg-type]

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores ``[B, C]``, or numbers ``[B, 1]``, of rows ``[B, features]`` in any precision."""
        x = inputs.to(next(self.parameters()).dtype)
        if self.scale is not None and self.shift is not None:
            x = x * self.scale + self.shift
        out: Tensor = self.layers(x)
        if self.head == "binary":
            return functional.pad(out, (1, 0))
        return functional.logsigmoid(out) if self.head == "one_vs_rest" else out


def is_estimator(model: Any) -> bool:
    """Whether a model is one of scikit-learn's."""
    return isinstance(model, BaseEstimator)


def estimator_network(estimator: Any, classes: Sequence[str] = ()) -> EstimatorNetwork:
    """The network with the estimator's predictions; it holds a copy of the weights.

    Args:
        estimator: a fitted linear model or multi-layer perceptron, or a ``Pipeline`` of scalers and one.
        classes: names of all classes in the order wanted; none: the estimator's. One that the estimator has never seen, such as a
            class without which it was fitted anew, gets the score :data:`UNSEEN` (its probability is 0, of which there is no
            finite score). The weights of a network that is wider than the estimator cannot be written back.

    Raises:
        InputError: it is not fitted, predicts several targets at once, is no network, or knows a class that is none of those.
    """
    held = _last(estimator)
    network = _network(estimator, held)
    own = estimator_classes(estimator)
    return network if not classes or own == tuple(classes) else _widened(network, held, own, tuple(classes))


def _network(estimator: Any, held: Any) -> EstimatorNetwork:
    scale, shift = _scaling(estimator)
    try:
        check_is_fitted(held)
    except NotFittedError:
        raise InputError(f"The {type(held).__name__} is not fitted.", "Fit it to the rows first.") from None
    except TypeError:
        raise _no_network(held) from None
    if isinstance(held, _PERCEPTRONS):
        return EstimatorNetwork(
            [w.T for w in held.coefs_], held.intercepts_, activation=held.activation, head=_perceptron_head(held),
            scale=scale, shift=shift,
        )  # fmt: skip
    if not isinstance(held, (*_LINEAR_CLASSIFIERS, *_LINEAR_REGRESSORS)):
        raise _no_network(held)
    weight = np.atleast_2d(np.asarray(held.coef_))
    bias = np.atleast_1d(np.asarray(held.intercept_, dtype=weight.dtype)) if held.fit_intercept else None
    return EstimatorNetwork([weight], [bias], head=_linear_head(held, len(weight)), scale=scale, shift=shift)


def _widened(network: EstimatorNetwork, held: Any, own: tuple[str, ...], classes: tuple[str, ...]) -> EstimatorNetwork:
    """The same network with one output for each of ``classes``."""
    odd = next((c for c in own if c not in classes), None)
    if odd is not None:
        raise InputError(f"The {type(held).__name__} knows the class {odd!r}, which the rows do not.", "Name all classes.")
    last: Any = network.layers[-1]
    if last.bias is None:
        raise InputError(f"Without intercepts a {type(held).__name__} cannot leave a class out.", "Fit it with intercepts.")
    weight, bias = last.weight.detach(), last.bias.detach()
    rated = isinstance(held, (linear_model.LogisticRegression, *_PERCEPTRONS))
    if network.head == "binary":  # as two scores: of probabilities (0, f), of decisions against the rest (-f, f)
        factor = torch.tensor([0.0 if rated else -1.0, 1.0], dtype=bias.dtype)
        weight, bias = factor[:, None] * weight, factor * bias
    at = torch.tensor([classes.index(c) for c in own])
    wide = nn.Linear(last.in_features, len(classes), dtype=bias.dtype)
    with torch.no_grad():
        wide.weight.zero_()
        wide.bias.fill_(UNSEEN)
        wide.weight[at], wide.bias[at] = weight, bias
    network.layers[-1] = wide
    network.head = "one_vs_rest" if _one_vs_rest(held) else "scores"
    return network


def estimator_classes(estimator: Any) -> tuple[str, ...]:
    """Names of the classes in the order of the scores, as :func:`expunge.data.rows.table` writes them; empty: a regressor."""
    found = getattr(_last(estimator), "classes_", None)
    if found is None:
        return ()
    return tuple(str(int(c)) if isinstance(c, float) and c.is_integer() else str(c) for c in np.asarray(found).tolist())


def write_back(estimator: Any, network: nn.Module) -> None:
    """Give the estimator the weights of the network, in place; what it knows of its training beyond that stays as it was.

    Raises:
        InputError: the network is not the estimator's: a shape differs, or weights are not finite.
    """
    held = _last(estimator)
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    weights = [m.weight.detach().cpu().numpy() for m in layers]
    biases = [None if m.bias is None else m.bias.detach().cpu().numpy() for m in layers]
    if not all(np.isfinite(v).all() for v in (*weights, *biases) if v is not None):
        raise InputError("The network holds weights that are not finite.", "Unlearn with a smaller step.")
    if isinstance(held, _PERCEPTRONS):
        olds: list[Any] = [*held.coefs_, *held.intercepts_]
        _check_shapes(olds, [*(w.T for w in weights), *biases])
        for old, new in zip(olds, [*(w.T for w in weights), *biases], strict=True):
            old[...] = new  # in place: the estimator's optimiser holds the same arrays
        return
    _check_shapes([np.atleast_2d(held.coef_)], weights)
    held.coef_ = weights[0].reshape(np.shape(held.coef_)).astype(np.asarray(held.coef_).dtype)
    if biases[0] is not None:
        old = held.intercept_
        held.intercept_ = biases[0].reshape(np.shape(old)).copy() if np.ndim(old) else float(biases[0][0])


def _check_shapes(olds: Sequence[Any], news: Sequence[Any]) -> None:
    if [np.shape(o) for o in olds] != [np.shape(n) for n in news]:
        raise InputError("The network is not that of the estimator: shapes of weights differ.", "Give the one made from it.")


def _last(estimator: Any) -> Any:
    return estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator


def _scaling(estimator: Any) -> tuple[Any, Any]:
    """Scale and shift of all scalers before the last step, as one."""
    if not isinstance(estimator, Pipeline):
        return None, None
    scale: Any = 1.0
    shift: Any = 0.0
    for name, step in estimator.steps[:-1]:
        if step is None or step == "passthrough":
            continue
        if isinstance(step, preprocessing.StandardScaler):
            factor = 1 / np.asarray(step.scale_) if step.with_std else 1.0
            move = -np.asarray(step.mean_) * factor if step.with_mean else 0.0
        elif isinstance(step, preprocessing.MinMaxScaler) and not step.clip:
            factor, move = np.asarray(step.scale_), np.asarray(step.min_)
        elif isinstance(step, preprocessing.MaxAbsScaler):
            factor, move = 1 / np.asarray(step.scale_), 0.0
        else:
            raise InputError(
                f"The step {name!r} of the pipeline, {type(step).__name__}, has no equivalent layer.",
                "Transform the rows first and give the last step alone, or take expunge.ShardedEstimator.",
            )
        scale, shift = scale * factor, shift * factor + move
    size = _last(estimator).n_features_in_
    return np.broadcast_to(scale, size).copy(), np.broadcast_to(shift, size).copy()


def _perceptron_head(held: Any) -> Head:
    if isinstance(held, neural_network.MLPRegressor):
        if held.n_outputs_ > 1:
            raise _several(held)
        if held.out_activation_ != "identity":
            raise InputError(f"An MLPRegressor of the loss {held.loss!r} returns exponentials.", "Fit it with squared_error.")
        return "number"
    if held.out_activation_ == "softmax":
        return "scores"
    if held.n_outputs_ > 1:
        raise _several(held)
    return "binary"


def _linear_head(held: Any, outputs: int) -> Head:
    if isinstance(held, _LINEAR_REGRESSORS):
        if outputs > 1:
            raise _several(held)
        return "number"
    if outputs == 1:
        return "binary"
    if len(held.classes_) != outputs:
        raise _several(held)
    return "one_vs_rest" if _one_vs_rest(held) else "scores"


def _one_vs_rest(held: Any) -> bool:
    return isinstance(held, linear_model.SGDClassifier) and held.loss == "log_loss"


def _several(held: Any) -> InputError:
    return InputError(f"The {type(held).__name__} predicts several targets of a row.", "Fit one estimator for each.")


def _no_network(held: Any) -> InputError:
    return InputError(
        f"{type(held).__name__} is no network: gradients and edits of weights mean nothing to it.",
        "Take expunge.ShardedEstimator (SISA), which deletes rows from any estimator; or a linear model or perceptron.",
    )
