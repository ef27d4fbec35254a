"""Tuning a masked language model to the texts of a request: masked tokens, and a contrastive entropy to its old self (O3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from expunge.adapters.lowrank import LowRank, loaded
from expunge.adapters.passes import evaluating
from expunge.adapters.reading import TextEncoder
from expunge.engine.preparation import Tell

MASKED = 0.15  #: share of the tokens that are to be guessed
_KEPT = -100


@dataclass(frozen=True)
class EncoderTraining:
    """How an encoder is tuned; the defaults are the published ones.

    Attributes:
        rank, alpha, dropout: of the update of query, key and value.
        epochs: passes over the texts.
        lr: peak learning rate of AdamW; it falls linearly to 0.
        batch: texts per step.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    epochs: float = 2.0
    lr: float = 1e-5
    batch: int = 8

    @property
    def scale(self) -> float:
        """By which the update is multiplied."""
        return self.alpha / self.rank


def contrastive_entropy(tuned: Sequence[Tensor], frozen: Sequence[Tensor]) -> Tensor:
    """``sum_l mean_i H(softmax_j <z_il, z*_jl>)``: small where each text is like one text of the batch as it was, and no other.

    Args:
        tuned: features ``z`` ``[B, D]`` of each layer, of the masked texts in the tuned encoder.
        frozen: the same ``z*`` of the texts as they are, in the encoder as it was.
    """
    total = tuned[0].new_zeros(())
    for z, old in zip(tuned, frozen, strict=True):
        log_p = (z.float() @ old.float().T).log_softmax(-1)
        total = total - (log_p.exp() * log_p).sum(-1).mean()
    return total


def masked(ids: Tensor, real: Tensor, encoder: TextEncoder, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids with 15 % of the real tokens to be guessed, and the labels: the true id there, -100 elsewhere.

    Of the tokens to be guessed 80 % become the mask, 10 % another token, 10 % stay (Devlin et al. 2018). Of every text at least
    one is to be guessed, so short texts are learnt from too.
    """
    special = torch.tensor(sorted(set(encoder.tokenizer.all_special_ids)), device=ids.device)
    open_ = real & ~torch.isin(ids, special)
    draws = torch.rand(ids.shape, generator=generator).to(ids.device).masked_fill(~open_, 2.0)
    chosen = (draws < MASKED) | ((draws == draws.amin(-1, keepdim=True)) & open_)
    labels = torch.where(chosen, ids, _KEPT)
    kind = torch.rand(ids.shape, generator=generator).to(ids.device)
    others = torch.randint(len(encoder.tokenizer), ids.shape, generator=generator).to(ids.device)
    swapped = torch.where(kind < 0.8, encoder.tokenizer.mask_token_id, torch.where(kind < 0.9, others, ids))
    return torch.where(chosen, swapped, ids), labels


def train_encoder(encoder: TextEncoder, texts: Sequence[str], settings: EncoderTraining, tell: Tell | None = None) -> LowRank:
    """An update of the encoder that is tuned to the texts; the encoder itself stays as it is.

    ``L = NLL(masked tokens) + contrastive entropy`` over the embedding layer and all blocks, as the published code sums it. Where
    that averages features over padding too, here padding counts for nothing.
    """
    model, generator = encoder.model, torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))
    device = next(model.parameters()).device
    made = LowRank.fresh(model, encoder.adapted(), settings.rank, settings.scale).to(device)
    optimizer = torch.optim.AdamW(made.parameters(), lr=settings.lr)
    per_epoch = math.ceil(len(texts) / settings.batch)
    steps = max(1, math.ceil(settings.epochs * per_epoch))
    order: list[int] = []
    with torch.enable_grad(), evaluating(model):
        for step in range(steps):
            if len(order) < min(settings.batch, len(texts)):
                order += torch.randperm(len(texts), generator=generator).tolist()
            chosen, order = order[: settings.batch], order[settings.batch :]
            loss = _loss(encoder, made, [texts[i] for i in chosen], settings.dropout, generator)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if tell is not None:
                tell(step + 1, steps, f"tuning the detector's encoder: loss {float(loss.detach()):.3f}")
    return made.requires_grad_(False)


def _loss(encoder: TextEncoder, made: LowRank, texts: Sequence[str], dropout: float, generator: torch.Generator) -> Tensor:
    given = encoder.tokens(texts)
    real = given["attention_mask"].bool()
    ids, labels = masked(given["input_ids"], real, encoder, generator)
    ones = torch.ones(len(texts), device=real.device)
    with torch.no_grad():
        frozen = encoder.model(**given, output_hidden_states=True).hidden_states
    with loaded(encoder.model, [(made, ones)], dropout):
        out = encoder.model(input_ids=ids, attention_mask=given["attention_mask"], output_hidden_states=True)
    guessed = functional.cross_entropy(out.logits.float().flatten(0, 1), labels.flatten(), ignore_index=_KEPT)
    shares = (real / real.sum(-1, keepdim=True))[..., None]
    tuned, old = ([(state * shares).sum(1) for state in states] for states in (out.hidden_states, frozen))
    return guessed + contrastive_entropy(tuned, old)
