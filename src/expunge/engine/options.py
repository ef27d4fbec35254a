"""How the machine is used: none of it changes what a method is."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from expunge.core.settings import Settings


class Engine(Settings):
    """Options of the training loop that are not part of the method."""

    name: ClassVar[str] = "engine"

    seed: int = Field(0, ge=0, description="seed of the order of examples and of every random part")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="precision of matrix products; weights keep theirs")
    max_tokens: int = Field(8192, ge=64, description="padded input tokens per forward pass and process; larger steps accumulate")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    dropout: bool = Field(False, description="apply the dropout of the model, and of LoRA, while training")
    batch_norm: Literal["frozen", "batch"] = Field(
        "frozen",
        description="batch normalisation by its running statistics, or by each forward pass, whose statistics it then follows",
    )
    checkpoint_every: int = Field(
        50, ge=0, description="optimiser steps between checkpoints from which --resume goes on; 0: none"
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes an accelerator if there is one")
    trackers: tuple[str, ...] = Field(
        (), description="experiment trackers that also get the log, by their accelerate name (wandb, ...)"
    )
