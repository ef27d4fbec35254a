"""A small network on the model's own states of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from expunge.adapters.language import LanguageAdapter
from expunge.core.errors import unknown
from expunge.guards.calibration import Refitted, Scoring, Threshold
from expunge.guards.conversation import Conversation
from expunge.guards.parts import Hit, Hook, Material, Reading, Watcher, detector
from expunge.guards.prompts import put
from expunge.guards.reading import read_states
from expunge.guards.target import Target


@detector
class States(Scoring):
    """A perceptron on the mean state of the prompt's tokens at one layer of the model: is this about a target (GUARD, 2025).

    The paper is followed in what is read and in the shape of the classifier; layer, width, training and negatives are not given
    in it. Here: the block in the middle, one hidden layer of 256, states brought to mean 0 and deviation 1, cross-entropy with
    classes weighed by the inverse of their size, Adam over all prompts at once. The threshold is conformal, on prompts that are
    not learnt from. What is noticed is the prompt as a whole, all turns in the template: words around a question dilute it, and
    an encoding that the model does not read hides it.

    It costs one product per request; the states are those of the answer's own run. An action on embeddings comes too late: the
    prompt has been read. A target that comes or goes is learnt by a new fit, for which the model reads its questions. The states
    that are kept are derivatives of questions and prompts, and can be inverted in part: personal data where those are.
    """

    name: ClassVar[str] = "states"
    title: ClassVar[str] = "The model's own states of the prompt"
    sees: ClassVar[frozenset[Hook]] = frozenset({Hook.HIDDEN})
    least: ClassVar[int] = 2

    layer: str = Field("", description="block whose output is read; none: the one in the middle")
    width: int = Field(256, ge=1, description="units of the hidden layer")
    steps: int = Field(300, ge=1, description="steps of training, over all prompts each")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    weight_decay: float = Field(0.01, ge=0, description="of the network, decoupled")

    def fit(self, material: Material) -> Watcher:
        """Read all prompts, learn, and set the threshold.

        Raises:
            InputError: there is no model or layer, too few ordinary prompts, or some are questions of a target.
        """
        adapter = material.model("The detector 'states'")
        layers = adapter.layers()
        if self.layer and self.layer not in layers:
            raise unknown("layer", self.layer, layers)
        learning, calibrating = self.parted(material)
        reading = Reading(self.layer or layers[(len(layers) - 1) // 2], "output", "mean")
        return StatesWatcher(self, adapter, reading, material.targets, ordinary=(learning, calibrating), seed=material.seed)


class Perceptron(nn.Module):
    """``sigmoid(w2 relu(W1 z + b1) + b2)`` of standardised states ``z``.

    Args:
        mean, deviation: of the states, ``[D]``.
        width: units of the hidden layer.
    """

    def __init__(self, mean: Tensor, deviation: Tensor, width: int) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation
        self.layers = nn.Sequential(nn.Linear(len(mean), width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, states: Tensor) -> Tensor:
        """Log-odds of a target, ``[n]``, of states ``[n, D]``."""
        found: Tensor = self.layers((states - self.mean) / self.deviation)[:, 0]
        return found

    @torch.no_grad()
    def scores(self, states: Tensor) -> NDArray[np.float64]:
        """Probability of a target, ``[n]``."""
        found: NDArray[np.float64] = self(states.float().cpu()).double().sigmoid().numpy()
        return found


class StatesWatcher(Refitted[Perceptron]):
    """Classifies states; network and threshold are exchanged together.

    Args:
        settings: of the detector.
        adapter: the model.
        reading: what is read.
        targets: to be learnt.
        ordinary: prompts to learn from, and prompts that set the threshold.
        seed: of the network.
    """

    def __init__(
        self, settings: States, adapter: LanguageAdapter, reading: Reading, targets: Sequence[Target], *,
        ordinary: tuple[Sequence[str], Sequence[str]], seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.adapter, self.seed = settings, adapter, seed
        self.readings = (reading,)
        self._learning, self._calibrating = (self._read(texts) for texts in ordinary)
        self._rows: dict[str, Tensor] = {}
        self.take(targets)

    def _forget(self, target: str) -> None:
        self._rows.pop(target, None)

    def _read(self, texts: Sequence[str]) -> Tensor:
        prompts = [put(self.adapter, Conversation.of(t)) for t in texts]
        found = read_states(self.adapter, prompts, self.readings)
        return torch.stack([f[self.readings[0]] for f in found]) if found else torch.empty(0, 1)

    def _hold(self, targets: Sequence[Target]) -> None:
        for target in targets:
            self._rows.pop(target.id, None)
            if target.questions:
                self._rows[target.id] = self._read(target.questions)

    def _fitted(self) -> tuple[Perceptron, Threshold] | None:
        if not self._rows:
            return None
        network = learnt(torch.cat(list(self._rows.values())), self._learning, self.settings, self.seed)
        scores: NDArray[np.float64] = network.scores(self._calibrating) if len(self._calibrating) else np.empty(0)
        return network, self.settings.bound(scores)

    def hidden(self, states: Mapping[Reading, Tensor]) -> list[Hit]:
        """One hit, of no target in particular, if the prompt's state is classified as a target's."""
        held = self._held
        if held is None:
            return []
        score = float(held[0].scores(states[self.readings[0]][None])[0])
        return [Hit("", score)] if held[1].passed(score) else []


def learnt(asked: Tensor, ordinary: Tensor, settings: States, seed: int) -> Perceptron:
    """A network that tells states of targets' questions ``[n, D]`` from those of ordinary prompts ``[m, D]``."""
    states = torch.cat([asked, ordinary])
    labels = torch.cat([torch.ones(len(asked)), torch.zeros(len(ordinary))])
    weights = torch.where(labels > 0, len(states) / (2 * len(asked)), len(states) / (2 * len(ordinary)))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = Perceptron(states.mean(0), states.std(0).clamp(min=1e-6), settings.width)
        optimiser = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        for _ in range(settings.steps):
            loss = functional.binary_cross_entropy_with_logits(network(states), labels, weights)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return network.requires_grad_(False)
