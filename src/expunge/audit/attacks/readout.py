"""Reading out as an attack: does a new last layer bring back what the old one no longer says?

A method that touches the last layer alone changes every answer and no feature. So the last layer is thrown away, and a linear one
is fitted on the model's own features, of the retain rows and of one half of the forget rows; the other half is measured. A
retrained model under the same attack is the control: its features too serve for classes that it has never seen, and what they
give is not knowledge. (Kim, Cha and Kim 2025, arXiv 2503.06991, compare such read-outs; here they are judged like relearning.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from expunge.audit.outputs import RowOutputs

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

RETAIN_ROWS = 2000  #: retain rows that the layer is fitted on, at most
_STEPS = 200


def read_out(forget: RowOutputs, retain: RowOutputs, trained: Indices, measured: Indices, *, classes: int, seed: int) -> Floats:
    """Loss of the measured forget rows under a last layer fitted anew, in nats, ``[len(measured)]``.

    Features are standardised; the layer is a logistic regression with scikit-learn's penalty. A class that no fitted row has gets
    the loss of a guess.

    Args:
        forget, retain: outputs of the attacked model.
        trained, measured: which forget rows are fitted on, and which are measured.
        classes: how many there are.
        seed: of the sample of retain rows; the same for every model.
    """
    rows = np.arange(len(retain.targets))
    if len(rows) > RETAIN_ROWS:
        rows = np.sort(np.random.default_rng([seed, 15]).choice(len(rows), RETAIN_ROWS, replace=False))
    features = np.concatenate([retain.features[rows], forget.features[trained]]).astype(np.float64)
    targets = np.concatenate([retain.targets[rows], forget.targets[trained]]).astype(np.int64)
    if not np.isfinite(features).all() or not np.isfinite(forget.features[measured]).all():
        return np.full(len(measured), np.nan)
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(max_iter=_STEPS).fit(scaler.transform(features), targets)
    logp = np.full((len(measured), classes), -np.log(classes))
    logp[:, model.classes_] = model.predict_log_proba(scaler.transform(forget.features[measured].astype(np.float64)))
    found: Floats = -logp[np.arange(len(measured)), forget.targets[measured].astype(np.int64)]
    return found
