"""A model of rows with what it was trained on, as a user's own function returns it: ``module:function``, ``file.py:function``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from expunge.adapters.estimators import estimator_network, is_estimator
from expunge.adapters.extra import need
from expunge.adapters.supervised import SupervisedAdapter
from expunge.core.entries import ENTRY, load_function, own_code
from expunge.core.errors import InputError
from expunge.core.runs import cache_folder
from expunge.data.rows import Indices, Table
from expunge.engine.ensemble import Ensemble, train_ensemble
from expunge.engine.members import Members, Spec, Training
from expunge.engine.outcome import Progress
from expunge.engine.tasks import Workers
from expunge.pipeline.rows import open_rows


@dataclass(frozen=True)
class Supervised:
    """A classifier or regressor, the rows it was trained on, and how it was trained.

    >>> def digits():
    ...     return expunge.Supervised(
    ...         data=expunge.table(images, labels),
    ...         holdout=expunge.table(unseen, unseen_labels),
    ...         build=lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    ...         training=expunge.Training(steps=400, batch=128, lr=1e-3),
    ...     )

    All models may also be scikit-learn estimators that are networks (:mod:`expunge.adapters.estimators`).

    Attributes:
        data: all rows that it was trained on.
        build: makes an untrained network, its weights from torch's global generator.
        training: how the network is trained on rows; with it models are retrained, many at once. None: ``fit`` does it.
        fit: trains an untrained network on a table, with a seed, and returns it; for trainings that ``training`` cannot say.
        model: the trained model; none: trained by the above, once, and kept in the cache.
        holdout: rows that it was never trained on.
        sets: further rows by name that an audit measures every model on, such as unseen rows with a trigger on them; never
            trained on, and nothing is stopped by them.
        loss: of a regression.
        layers: names of the modules whose outputs are features; none: found.
    """

    data: Table
    build: Callable[[], nn.Module] | None = None
    training: Training | None = None
    fit: Callable[[nn.Module, Table, int], nn.Module] | None = None
    model: nn.Module | None = None
    holdout: Table | None = None
    sets: Mapping[str, Table] = field(default_factory=dict)
    loss: Literal["l1", "mse"] = "l1"
    layers: tuple[str, ...] | None = None

    def check(self) -> None:
        """Check that there is a model, or a way to one, and that the unseen rows are of the same kind and unseen.

        Raises:
            InputError: something is missing or does not fit.
        """
        if self.model is None and (self.build is None or (self.training is None and self.fit is None)):
            raise InputError(
                "There is neither a trained model nor a way to train one.",
                "Give model=..., or build=... with training=... or fit=...",
            )
        if self.training is not None and self.fit is not None:
            raise InputError("There are two ways to train: training and fit.", "Give one of them.")
        taken = sorted({"forget", "retain", "holdout", "test"} & set(self.sets))
        if taken:
            raise InputError(f"A further set cannot be called {taken[0]!r}: an audit makes one of that name.", "Rename it.")
        held = {} if self.holdout is None else {"the holdout": self.holdout}
        for name, other in {**held, **{f"the set {n!r}": t for n, t in self.sets.items()}}.items():
            if other.task != self.data.task or other.classes != self.data.classes:
                raise InputError(
                    f"The rows of {name} are of another task, or of other classes.", "Name the same classes in both."
                )
            if other.inputs.shape[1:] != self.data.inputs.shape[1:]:
                raise InputError(
                    f"The rows have the shape {list(self.data.inputs.shape[1:])}, those of {name} "
                    f"{list(other.inputs.shape[1:])}.", "Prepare both alike.",
                )  # fmt: skip

    @property
    def retrainable(self) -> bool:
        """Whether a model can be trained without some rows."""
        return self.build is not None and (self.training is not None or self.fit is not None)

    def adapter(self, model: nn.Module, *, dropout: bool = False) -> SupervisedAdapter:
        """The adapter around a model of this shape."""
        return open_rows(model, self.data, loss=self.loss, layers=self.layers, dropout=dropout)

    def trained(
        self,
        without: Indices | None,
        seeds: list[int],
        *,
        workers: Workers = "local",
        progress: Progress | None = None,
        what: str = "",
    ) -> list[nn.Module] | Ensemble:
        """Models trained without some rows, one for each seed.

        With ``training`` they are trained together, come as one ensemble (see :func:`member`) and are kept in the cache. Each
        draws its rows in an order of its own: models that share one are more alike than independent trainings are.

        Args:
            without: indices of the rows that are left out; None: none.
            seeds: one for each model.
            workers: where they are trained; ``fit`` runs here.
            progress: called with (done, of how many, text).
            what: the text.

        Raises:
            InputError: nothing says how to train.
        """
        if not self.retrainable or self.build is None:
            raise InputError(
                "Nothing says how the model was trained, so none can be retrained.", "Give build=... with training=... or fit=..."
            )
        kept = np.arange(len(self.data)) if without is None else self.data.others(without)
        if self.training is None:
            return [self._fitted(kept, seed, progress, (i, len(seeds), what)) for i, seed in enumerate(seeds)]
        if workers == "ray":
            _carried(self.build)
        weights = torch.zeros(len(self.data), dtype=torch.bool)
        weights[torch.from_numpy(kept)] = True
        members = Members(weights.expand(len(seeds), -1), tuple(seeds))
        tell = None if progress is None else (lambda done, total: progress(done, total, what))
        return train_ensemble(
            self.spec(), members, folder=cache_folder() / "members", workers=workers, progress=tell,
            chunk=min(32, len(seeds)),
        )  # fmt: skip

    def untrained(self, seed: int = 0) -> nn.Module:
        """A network (or estimator) that ``build`` makes, its weights from ``seed``.

        Raises:
            InputError: there is no ``build``, it raises an error, or it makes something else.
        """
        if self.build is None:
            raise InputError("Nothing makes an untrained network.", "Give build=...")
        with torch.random.fork_rng(devices=[]), own_code("build"):
            torch.manual_seed(seed)
            made: Any = self.build()
        if not (isinstance(made, nn.Module) or is_estimator(made)):
            raise InputError(
                f"The function build made {type(made).__name__}, not a network.", "Return a torch.nn.Module, not its class."
            )
        fresh: nn.Module = made
        return fresh

    def spec(self) -> Spec:
        """What trains many models at once.

        Raises:
            InputError: nothing says how.
        """
        if self.build is None or self.training is None:
            raise InputError("Models cannot be trained together.", "Give build=... and training=...")
        adapter = self.adapter(self.untrained())
        tensors = dict(adapter.collate([adapter.encode(r) for r in self.data.rows()]).tensors)
        return Spec(
            self.build, tensors, torch.as_tensor(self.data.targets, dtype=adapter.target_type),
            self.training.model_copy(update={"stream": "own"}), loss=adapter.row_losses, forward=adapter.scores,
        )  # fmt: skip

    def _fitted(self, kept: Indices, seed: int, progress: Progress | None, at: tuple[int, int, str]) -> nn.Module:
        assert self.build is not None
        assert self.fit is not None
        if progress is not None:
            progress(*at)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with own_code("fit"):
                made = self.fit(self.build(), self.data.subset(kept), seed)
        return estimator_network(made, self.data.classes) if is_estimator(made) else made


def _carried(function: Callable[..., Any]) -> None:
    """Let what a file of the user's defines travel to Ray's workers, who cannot import it by its name."""
    module = sys.modules.get(getattr(function, "__module__", "") or "")
    if module is not None and module.__name__.startswith(ENTRY):
        cloudpickle = need("ray.cloudpickle", "Training on Ray workers", "ray")
        cloudpickle.register_pickle_by_value(module)


def member(problem: Supervised, held: list[nn.Module] | Ensemble, i: int) -> nn.Module:
    """Model ``i`` of what :meth:`Supervised.trained` returned."""
    if not isinstance(held, Ensemble):
        return held[i]
    assert problem.build is not None
    with torch.random.fork_rng(devices=[]):
        model = problem.build()
    own = model.state_dict()  # without buffers that are not saved: the network has made them itself
    model.load_state_dict({k: v.clone() for k, v in held.member(i).items() if k in own})
    return model.eval()


def target_of(problem: Supervised, seed: int = 0, *, progress: Progress | None = None) -> nn.Module:
    """The trained model: the given one, or one trained on all rows."""
    if problem.model is not None:
        return problem.model
    return member(problem, problem.trained(None, [seed], progress=progress, what="training the target"), 0)


def load_entry(source: str) -> Supervised:
    """Call the function that ``source`` names. It is the user's own code, and runs as such.

    Raises:
        OwnCodeError: the module or the function raises an error of its own.
        InputError: no such module or function, or what it returns is no :class:`Supervised`.
    """
    function = load_function(source, "it returns expunge.Supervised")
    with own_code(source):
        made: Any = function()
    if not isinstance(made, Supervised):
        raise InputError(
            f"{source!r} returned {type(made).__name__}, not expunge.Supervised.",
            "Return expunge.Supervised(data=expunge.table(...), model=..., holdout=...).",
        )
    made.check()
    return made
