"""Autoencoders of the target's features: one that knows all rows, one that knows the forget set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge.adapters.base import Adapter, Example
from expunge.core.access import Offer, Stream
from expunge.engine.gradients import fitting
from expunge.engine.options import Engine
from expunge.engine.parameters import block_index
from expunge.engine.preparation import Examples, Preparation, Prepared, Tell
from expunge.methods.preparations.registry import preparation

HIDDEN = (128, 32)  #: widths of the encoder, and in reverse of the decoder
_ADDED = 1e-8  #: to the variance, under the logarithm


class Autoencoder(nn.Module):
    """A variational autoencoder of feature vectors (Kingma and Welling 2014, arXiv 1312.6114).

    Args:
        size: D of the features.
        latent: size of the code.
        output: "linear", or "sigmoid" as published, which cannot reach features outside of (0, 1).
    """

    def __init__(self, size: int, latent: int, output: Literal["linear", "sigmoid"]) -> None:
        super().__init__()
        wide, narrow = HIDDEN
        self.encoder = nn.Sequential(nn.Linear(size, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU())
        self.mean, self.spread = nn.Linear(narrow, latent), nn.Linear(narrow, latent)
        last = nn.Sigmoid() if output == "sigmoid" else nn.Identity()
        self.decoder = nn.Sequential(
            nn.Linear(latent, narrow), nn.ReLU(), nn.Linear(narrow, wide), nn.ReLU(), nn.Linear(wide, size), last
        )

    def forward(self, features: Tensor) -> Tensor:
        """The reconstruction by the mean code, without noise, ``[n, D]``."""
        made: Tensor = self.decoder(self.mean(self.encoder(features)))
        return made

    def error(self, features: Tensor) -> Tensor:
        """``||h(e) - e||^2``, summed over the D numbers, ``[n]``."""
        made: Tensor = self(features)
        return (made - features).square().sum(1)

    def loss(self, features: Tensor, divergence: float) -> Tensor:
        """Squared error of a noisy reconstruction plus ``divergence`` times the KL of the code from a normal, per row."""
        hidden = self.encoder(features)
        mean, spread = self.mean(hidden), (0.5 * self.spread(hidden)).exp()
        made: Tensor = self.decoder(mean + spread * torch.randn_like(spread))
        kl: Tensor = -0.5 * ((spread.square() + _ADDED).log() + 1 - mean.square() - spread.square()).sum()
        total: Tensor = (made - features).square().sum() + divergence * kl
        return total / len(features)


@preparation
class Autoencoders(Preparation):
    """Two autoencoders of the target's features, of all rows and of the forget rows (Shen et al. 2024, arXiv 2404.00506).

    Both are trained on the features of the frozen target, without labels, by Adam. The official code trains the first on all
    rows, arguing that the forget set is small; the paper writes of the remaining rows (``all_rows=false``). Its decoder ends in
    a sigmoid, which cannot reach features outside of (0, 1), so the default is linear. The features of all rows are held in
    memory.
    """

    name: ClassVar[str] = "autoencoders"
    reads: ClassVar[tuple[Stream, ...]] = (Stream.FORGET, Stream.RETAIN)
    makes: ClassVar[frozenset[str]] = frozenset({"autoencoders"})
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.FEATURES})

    layer: int = Field(
        -1,
        ge=-512,
        lt=512,
        description="block, counted from 0, negative from the end; of a classifier's last one its input is taken",
    )
    latent: int = Field(16, ge=1, description="size of the code (published: 8 for small networks, 16 for a ResNet)")
    output: Literal["linear", "sigmoid"] = Field("linear", description="end of the decoder; published: sigmoid")
    all_rows: bool = Field(True, description="train the first on all rows, or on the retain rows alone")
    epochs: int = Field(10, ge=1, description="passes over the rows")
    batch: int = Field(32, ge=1, description="rows per step")
    lr: float = Field(1e-3, gt=0, description="learning rate of Adam")
    divergence: float = Field(0.025, ge=0, description="weight of the code's divergence from a normal distribution")

    def prepare(self, adapter: Adapter, examples: Examples, engine: Engine, scratch: Path, tell: Tell | None) -> Prepared:
        """Train both.

        Raises:
            InputError: the model has no such block.
        """
        layers = adapter.layers()
        block = layers[block_index(self.layer, layers)]
        forget, retain = (_features(adapter, examples[s], block, engine.max_tokens) for s in (Stream.FORGET, Stream.RETAIN))
        kept = torch.cat([forget, retain]) if self.all_rows else retain
        made = {}
        for at, (stream, features) in enumerate(((Stream.RETAIN, kept), (Stream.FORGET, forget))):
            made[stream] = self._train(features, next(adapter.model.parameters()).device)
            if tell is not None:
                tell(at + 1, 2, "training autoencoders of features")
        return Prepared(made={"autoencoders": made})

    def _train(self, features: Tensor, device: torch.device) -> Autoencoder:
        model = Autoencoder(features.shape[1], self.latent, self.output).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)
        with torch.enable_grad():
            for _ in range(self.epochs):
                order = torch.randperm(len(features))
                for start in range(0, len(order), self.batch):
                    loss = model.loss(features[order[start : start + self.batch]].to(device), self.divergence)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        return model.eval().requires_grad_(False)


@torch.no_grad()
def _features(adapter: Adapter, examples: Sequence[Example], block: str, max_units: int) -> Tensor:
    """Features of all tokens of some examples, float32 ``[M, D]`` in main memory."""
    device = next(adapter.model.parameters()).device
    found = []
    for chosen in fitting(examples, max_units):
        batch = adapter.collate(chosen).to(device)
        found.append(adapter.forward(adapter.model, batch, frozenset({f"features:{block}"})).features(block).float().cpu())
    return torch.cat(found)
