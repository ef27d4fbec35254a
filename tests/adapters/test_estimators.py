"""scikit-learn estimators as networks and back."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn import ensemble, linear_model, neural_network, preprocessing, svm
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline

import expunge
from expunge.adapters.estimators import estimator_classes, estimator_network, is_estimator, write_back
from expunge.adapters.supervised import ClassifierAdapter
from expunge.core.errors import InputError
from expunge.data.rows import table

DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = DIGITS[:600] / 16
LABELS = LABELS[:600]
SUGAR, LEVEL = load_diabetes(return_X_y=True)
TWO = LABELS % 2
WORDS = np.array(["odd" if t else "even" for t in TWO])

PROBABLE = {
    "logistic": (linear_model.LogisticRegression(max_iter=50), LABELS),
    "logistic of two": (linear_model.LogisticRegression(max_iter=50), WORDS),
    "without intercept": (linear_model.LogisticRegression(max_iter=50, fit_intercept=False), TWO),
    "sgd one against rest": (linear_model.SGDClassifier(loss="log_loss", random_state=0), LABELS),
    "sgd of two": (linear_model.SGDClassifier(loss="log_loss", random_state=0), TWO),
    "sgd averaged": (linear_model.SGDClassifier(loss="log_loss", random_state=0, average=True), LABELS),
    **{
        f"perceptron {act}": (neural_network.MLPClassifier((20, 10), activation=act, max_iter=15, random_state=0), LABELS)
        for act in ("identity", "logistic", "tanh", "relu")
    },
    "perceptron of two": (neural_network.MLPClassifier((8,), max_iter=15, random_state=0), WORDS),
    "scaled": (
        make_pipeline(preprocessing.StandardScaler(), preprocessing.MinMaxScaler(), linear_model.LogisticRegression()),
        LABELS,
    ),
    "scaled by the largest": (
        make_pipeline(preprocessing.MaxAbsScaler(), neural_network.MLPClassifier((9,), max_iter=9)),
        LABELS,
    ),
}
DECIDING = {
    "hinge": (linear_model.SGDClassifier(random_state=0), LABELS),
    "svm": (svm.LinearSVC(random_state=0), LABELS),
    "svm of two": (svm.LinearSVC(random_state=0), WORDS),
    "ridge": (linear_model.RidgeClassifier(), LABELS),
}
NUMBERS = {
    "least squares": linear_model.LinearRegression(),
    "least squares without intercept": linear_model.LinearRegression(fit_intercept=False),
    "ridge": linear_model.Ridge(),
    "lasso": linear_model.Lasso(0.1),
    "sgd": linear_model.SGDRegressor(random_state=0),
    "perceptron": neural_network.MLPRegressor(hidden_layer_sizes=(10,), max_iter=30, random_state=0),
    "scaled": make_pipeline(preprocessing.StandardScaler(with_mean=False), linear_model.Ridge()),
}


def fitted(estimator, x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(x, y)


def scores(network, x) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(x)).numpy()


def moved(network) -> None:
    """Change every weight, as unlearning would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@pytest.mark.parametrize("name", PROBABLE)
def test_probabilities_are_those_of_the_estimator_before_and_after(name: str) -> None:
    estimator, y = PROBABLE[name]
    fitted(estimator, DIGITS, y)
    network = estimator_network(estimator)
    before = estimator.predict_proba(DIGITS)
    np.testing.assert_allclose(torch.softmax(torch.from_numpy(scores(network, DIGITS)), 1), before, atol=1e-6)
    names = np.array(estimator_classes(estimator))
    assert (names[scores(network, DIGITS).argmax(1)] == estimator.predict(DIGITS).astype(str)).all()
    moved(network)
    write_back(estimator, network)
    after = estimator.predict_proba(DIGITS)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(torch.softmax(torch.from_numpy(scores(network, DIGITS)), 1), after, atol=1e-6)


@pytest.mark.parametrize("name", DECIDING)
def test_decisions_are_those_of_the_estimator_before_and_after(name: str) -> None:
    estimator, y = DECIDING[name]
    network = estimator_network(fitted(estimator, DIGITS, y))
    for _ in range(2):
        found, decided = scores(network, DIGITS), estimator.decision_function(DIGITS)
        np.testing.assert_allclose(found[:, 1] - found[:, 0] if decided.ndim == 1 else found, decided, atol=1e-6)
        names = np.array(estimator_classes(estimator))
        assert (names[found.argmax(1)] == estimator.predict(DIGITS).astype(str)).all()
        moved(network)
        write_back(estimator, network)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_of_the_estimator_before_and_after(name: str) -> None:
    estimator = fitted(NUMBERS[name], SUGAR, LEVEL)
    network = estimator_network(estimator)
    before = estimator.predict(SUGAR)
    np.testing.assert_allclose(scores(network, SUGAR)[:, 0], before, rtol=1e-9, atol=1e-6)
    moved(network)
    write_back(estimator, network)
    assert estimator.predict(SUGAR).shape == before.shape
    assert np.abs(estimator.predict(SUGAR) - before).max() > 1e-3
    np.testing.assert_allclose(scores(network, SUGAR)[:, 0], estimator.predict(SUGAR), rtol=1e-9, atol=1e-6)


def test_single_precision_is_kept() -> None:
    estimator = fitted(linear_model.LogisticRegression(max_iter=20), DIGITS.astype(np.float32), LABELS)
    network = estimator_network(estimator)
    assert next(network.parameters()).dtype == torch.float32
    assert estimator_network(fitted(linear_model.Ridge(), SUGAR, LEVEL)).layers[0].weight.dtype == torch.float64


def test_the_network_has_weights_of_its_own_and_layers() -> None:
    estimator = fitted(neural_network.MLPClassifier((20,), max_iter=5, random_state=0), DIGITS, LABELS)
    network = estimator_network(estimator)
    kept = [w.copy() for w in estimator.coefs_]
    moved(network)
    assert all(np.array_equal(a, b) for a, b in zip(kept, estimator.coefs_, strict=True))
    assert ClassifierAdapter(network, estimator_classes(estimator)).layers() == ["layers.0", "layers.2"]


def test_a_perceptron_can_go_on_learning_after_the_way_back() -> None:
    estimator = fitted(neural_network.MLPClassifier((16,), max_iter=20, random_state=0), DIGITS, LABELS)
    network = estimator_network(estimator)
    with torch.no_grad():
        network.layers[2].weight.zero_()
        network.layers[2].bias.zero_()
    write_back(estimator, network)
    assert estimator.score(DIGITS, LABELS) < 0.2
    for _ in range(150):
        estimator.partial_fit(DIGITS, LABELS)
    assert estimator.score(DIGITS, LABELS) > 0.8


@pytest.mark.parametrize(
    ("estimator", "said"),
    [
        (linear_model.LogisticRegression(), "is not fitted"),
        (
            ensemble.RandomForestClassifier(3).fit(DIGITS, LABELS),
            "ShardedEstimator .SISA., which deletes rows from any",
        ),
        (fitted(neural_network.MLPRegressor("poisson", max_iter=3), SUGAR, LEVEL), "exponentials"),
        (svm.SVC().fit(DIGITS, LABELS), "SVC is no network"),
        (linear_model.PoissonRegressor().fit(SUGAR, LEVEL), "PoissonRegressor is no network"),
        (linear_model.LinearRegression().fit(SUGAR, np.stack([LEVEL, LEVEL], 1)), "several targets"),
        (make_pipeline(preprocessing.PolynomialFeatures(), linear_model.Ridge()).fit(SUGAR, LEVEL), "'polynomialfeatures'"),
    ],
)
def test_what_is_no_network_is_refused(estimator, said: str) -> None:
    with pytest.raises(InputError, match=said):
        estimator_network(estimator)
    assert is_estimator(estimator)
    assert not is_estimator(torch.nn.Linear(1, 1))


def test_weights_that_do_not_fit_are_refused() -> None:
    estimator = linear_model.Ridge().fit(SUGAR, LEVEL)
    network = estimator_network(linear_model.Ridge().fit(SUGAR[:, :3], LEVEL))
    with pytest.raises(InputError, match="shapes"):
        write_back(estimator, network)
    network = estimator_network(estimator)
    with torch.no_grad():
        network.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        write_back(estimator, network)


def test_an_estimator_forgets_in_place() -> None:
    estimator = fitted(linear_model.LogisticRegression(max_iter=200), DIGITS, LABELS)
    data = table(DIGITS, LABELS, precision="float64")
    chosen = LABELS == 3
    before = estimator.score(DIGITS[chosen], LABELS[chosen])
    expunge.unlearn_rows(
        estimator, data, classes=["3"], method="graddiff", seed=0, schedule="fixed", schedule__lr=1e-2, schedule__steps=60,
    )  # fmt: skip
    assert before > 0.95
    assert estimator.score(DIGITS[chosen], LABELS[chosen]) < 0.5
    assert estimator.score(DIGITS[~chosen], LABELS[~chosen]) > 0.9
    with pytest.raises(InputError, match="knows the classes 0, 1"):
        expunge.unlearn_rows(estimator, table(DIGITS, WORDS), classes=["odd"], method="graddiff")


@pytest.mark.parametrize("kept", [(2, 5, 7), (2, 7)])
@pytest.mark.parametrize("name", ["logistic", "sgd one against rest", "perceptron relu", "scaled", "hinge", "svm"])
def test_classes_that_an_estimator_has_never_seen_are_not_predicted(name: str, kept: tuple[int, ...]) -> None:
    estimator = clone((PROBABLE | DECIDING)[name][0])
    rows = np.isin(LABELS, kept)
    fitted(estimator, DIGITS[rows], LABELS[rows])
    network = estimator_network(estimator, [str(c) for c in range(10)])
    found = scores(network, DIGITS)
    assert found.shape == (600, 10)
    assert (found.argmax(1) == estimator.predict(DIGITS)).all()
    if name in PROBABLE:
        probable = torch.softmax(torch.from_numpy(found), 1).numpy()
        np.testing.assert_allclose(probable[:, list(kept)], estimator.predict_proba(DIGITS), atol=1e-6)
        assert np.delete(probable, kept, axis=1).max() < 1e-6
        assert found[np.arange(600), LABELS].min() > -1e3  # finite losses of rows of unseen classes
    whole = fitted(clone(estimator), DIGITS, LABELS)
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in estimator_network(whole).state_dict().items()
    }
    assert network.head == estimator_network(whole).head
    with pytest.raises(InputError, match="shapes"):
        write_back(estimator, network)


def test_classes_that_the_rows_do_not_have_are_refused() -> None:
    estimator = fitted(linear_model.LogisticRegression(max_iter=20), DIGITS, LABELS)
    with pytest.raises(InputError, match="knows the class '9'"):
        estimator_network(estimator, list("012345678"))
    bare = fitted(linear_model.LogisticRegression(max_iter=20, fit_intercept=False), DIGITS, LABELS)
    with pytest.raises(InputError, match="Without intercepts"):
        estimator_network(bare, [*map(str, range(10)), "x"])
