"""Diffusion models that draw a picture of a class, through the diffusers library.

The prompt is the class and the answer is the picture. What such a model predicts of a picture is how to take the noise off it, at
each noise level; so the targets of an example are noise levels, and the loss of a target is the squared error of that prediction.
"""

from __future__ import annotations

import copy as copying
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from expunge.adapters import identity
from expunge.adapters.answers import Generation
from expunge.adapters.base import Adapter, Batch, Example, Outputs
from expunge.adapters.extra import need
from expunge.adapters.head import base
from expunge.adapters.registry import adapter
from expunge.core.access import Offer
from expunge.core.errors import InputError, nearest
from expunge.core.files import atomic_path
from expunge.data.rows import Row

_FEATURE = "A diffusion model"
_OWN = -1  #: in place of another class: the picture itself is the answer
_KINDS = ("epsilon", "sample", "v_prediction")


@adapter
class DiffusionAdapter(Adapter):
    """A diffusion model of pictures, conditioned on a class: a UNet2DModel and a scheduler of the diffusers library.

    An example is a picture with its class (a row of a table; inputs ``[channels, height, width]`` in [-1, 1]). It has ``draws``
    targets: the noise levels are cut into so many equal parts, and one level is drawn in each. The loss of a target is the mean
    over the picture of the squared error of what the scheduler says the network predicts (the noise, the picture, or the
    velocity): ``|| eps(x_t, t, c) - n ||^2 / pixels`` with ``x_t = sqrt(a_t) x + sqrt(1 - a_t) n`` (Ho et al. 2020, arXiv
    2006.11239).

    *Draws.* Levels and noise are a function of the example's id and of ``seed``: the same example has the same loss whenever, in
    whatever batch and by whatever process it is computed. In a training step they depend on the step as well, so they are new in
    each step and still the same after a resumption. The current and all frozen models of a step read the same draws.

    *Other classes.* The other answer to a class c is what the model draws of a class c': with the picture noised as before,
    ``|| eps(x_t, t, c) - stopgrad eps(x_t, t, c') ||^2 / pixels``, the second prediction by the model as it is in that step
    (SalUn for diffusion, Fan et al. 2023, arXiv 2310.12508). To teach the noise on the forgotten pictures under the label c'
    instead would make the model draw them where c' is asked for, and leave c as it was.

    Args:
        model: a ``UNet2DModel`` with class embeddings; its dropout is left to the training loop.
        scheduler: of the diffusers library, one that can add noise.
        classes: names of the C classes, in the order of the embeddings; the model may have more (one for no class).
        draws: targets of an example, at least 1.
        seed: of the draws outside of training, non-negative.

    Raises:
        InputError: model, scheduler and classes do not fit each other.
    """

    modality: ClassVar[str] = "diffusion"
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.LOSSES, Offer.FEATURES, Offer.CLASSES})
    draws_anew: ClassVar[bool] = True

    def __init__(self, model: nn.Module, scheduler: Any, classes: Sequence[str], *, draws: int = 4, seed: int = 0) -> None:
        self.model: Any = model
        self.scheduler = scheduler
        self.classes = tuple(str(c) for c in classes)
        self.draws, self.seed = draws, seed
        self._step: tuple[int, int] | None = None
        if draws < 1 or seed < 0:
            raise InputError(f"There must be at least one draw and a seed of at least 0; got {draws} and {seed}.")
        if len(self.classes) < 2:
            raise InputError(f"A model of classes needs at least two, not {len(self.classes)}.", "Name all of them.")
        held = getattr(model.config, "num_class_embeds", None)
        if held is None or held < len(self.classes):
            raise InputError(
                f"The model knows {held or 'no'} classes, and {len(self.classes)} are named.",
                "Make it with num_class_embeds, one for each class.",
            )
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in _KINDS or not hasattr(scheduler, "add_noise"):
            raise InputError(f"The scheduler {type(scheduler).__name__} ({kind}) cannot be trained with.", "Use DDPMScheduler.")

    # ---- data --------------------------------------------------------------------------------------------------------

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.classes)

    def target(self, value: Any) -> int:
        """A class number, from a number or a name.

        Raises:
            InputError: there is no such class.
        """
        if isinstance(value, str):
            if value not in self.classes:
                close = nearest(value, self.classes)
                raise InputError(f"There is no class {value!r}.", f"Nearest: {', '.join(close or self.classes[:5])}.")
            return self.classes.index(value)
        number = int(value)
        if number != value or not 0 <= number < len(self.classes):
            raise InputError(f"The class {value} is out of range: there are {len(self.classes)}, counted from 0.")
        return number

    def encode(self, record: Row, *, answer: Any = None, suffix: str = "", prompt: str | None = None) -> Example:
        """One example with ``draws`` targets; ``answer`` names the class whose drawing takes the picture's place.

        Raises:
            InputError: a picture of another shape or range than the model's, no such class, or a prompt was given.
        """
        if prompt is not None:
            raise InputError("A picture has no prompt but its class.")
        inputs = np.asarray(record.inputs)
        shape = self._shape()
        if inputs.shape != shape:
            raise InputError(f"The picture {record.id!r} has the shape {list(inputs.shape)}.", f"The model draws {list(shape)}.")
        if np.abs(inputs).max() > 1.001:
            raise InputError(f"The picture {record.id!r} has values outside of [-1, 1].", "Scale all pictures to [-1, 1].")
        drawn = _OWN if answer is None else self.target(answer)
        cost = self.draws * shape[1] * shape[2]
        data = (inputs.astype(np.float32, copy=False), self.target(record.target), drawn)
        return Example(record.id + suffix, record.cluster, self.draws, self.draws, data, cost)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pictures ``[B, ...]``, classes ``[B]``, and the noise ``[N, ...]`` and level ``[N]`` of each target."""
        if not examples:
            raise InputError("A batch needs at least one example.")
        found = [self._drawn(e.id) for e in examples]
        tensors = {
            "pictures": torch.from_numpy(np.stack([e.data[0] for e in examples])),
            "classes": torch.tensor([e.data[1] for e in examples]),
            "drawn": torch.tensor([e.data[2] for e in examples]),
            "levels": torch.from_numpy(np.concatenate([level for level, _ in found])),
            "noise": torch.from_numpy(np.concatenate([noise for _, noise in found])),
        }
        owner = torch.arange(len(examples)).repeat_interleave(self.draws)
        counts = (self.draws,) * len(examples)
        position = torch.arange(self.draws).repeat(len(examples))
        return Batch(
            tuple(e.id for e in examples), tensors, tensors["classes"][owner], owner, position, counts,
            owner, torch.ones(len(owner), dtype=torch.bool), counts,
        )  # fmt: skip

    @contextmanager
    def drawing(self, seed: int, step: int) -> Iterator[None]:
        """While open, batches get the levels and noise of a training step."""
        self._step = (seed, step)
        try:
            yield
        finally:
            self._step = None

    def _drawn(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Levels ``[draws]``, one in each equal part of the schedule, and noise ``[draws, ...]`` of an example."""
        where = ("fixed", self.seed) if self._step is None else self._step
        key = hashlib.blake2b(json.dumps([*where, name]).encode(), digest_size=16).digest()
        rng = np.random.default_rng(int.from_bytes(key, "big"))
        total = int(self.scheduler.config["num_train_timesteps"])
        levels = np.floor((np.arange(self.draws) + rng.random(self.draws)) * (total / self.draws)).astype(np.int64)
        return levels.clip(max=total - 1), rng.standard_normal((self.draws, *self._shape()), dtype=np.float32)

    def _shape(self) -> tuple[int, int, int]:
        inner: Any = base(self.model)
        config = inner.config
        size: Any = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(config["in_channels"]), int(height), int(width)

    # ---- the model ---------------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, batch: Batch, want: frozenset[str]) -> Outputs:
        """One forward pass over all targets, and one without gradients over those whose answer is another class's drawing."""
        held = batch.tensors
        each = held["pictures"][batch.owner]
        noisy = self.scheduler.add_noise(each, held["noise"], held["levels"])
        asked = [w.partition(":")[2] for w in sorted(want) if w.startswith("features:")]
        values: dict[str, Tensor] = {}
        with _captured(base(model), asked, values):
            predicted = self._predict(model, noisy, held["levels"], held["classes"][batch.owner])
        if "losses" in want:
            goal = self._goal(each, held["noise"], held["levels"]).to(predicted.dtype)
            drawn = held["drawn"][batch.owner]
            other = drawn != _OWN
            if bool(other.any()):
                with torch.no_grad():
                    painted = self._predict(base(model), noisy[other], held["levels"][other], drawn[other])
                goal = goal.index_put((other,), painted.to(goal.dtype))
            values["losses"] = (predicted - goal).square().flatten(1).mean(1)
        return Outputs.of(batch, values)

    def _predict(self, model: nn.Module, noisy: Tensor, levels: Tensor, classes: Tensor) -> Tensor:
        out: Tensor = model(noisy, levels, class_labels=classes)["sample"]
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def _goal(self, pictures: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the network should have predicted."""
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(pictures, noise, levels)
            return velocity
        return pictures if kind == "sample" else noise

    def logit_blocks(self, model: nn.Module, batch: Batch, rows: int = 512) -> Iterator[tuple[int, Tensor]]:
        """Not what these models have.

        Raises:
            InputError: always.
        """
        raise InputError("A diffusion model has no scores of classes.", "Use metrics that read losses or drawn pictures.")

    def generate(self, model: nn.Module, examples: Sequence[Example], max_new_tokens: int) -> list[Generation]:
        """Not what these models do; see :meth:`draw`.

        Raises:
            InputError: always.
        """
        raise InputError("A diffusion model does not write text.", "Use metrics that need no generated text.")

    def draw(self, classes: Sequence[Any], *, steps: int | None = None, seed: int = 0, batch: int = 256) -> np.ndarray:
        """Draw one picture for each class named, ``[n, channels, height, width]`` in [-1, 1], through ``DDPMPipeline``.

        Args:
            classes: names or numbers (n).
            steps: denoising steps; none: as many as there are noise levels.
            seed: of the noise, non-negative.
            batch: pictures at once; the pictures depend on it, as the noise of a batch is drawn together.

        Raises:
            InputError: there is no such class.
        """
        pipeline = need("diffusers", _FEATURE, "diffusion").DDPMPipeline
        model: Any = base(self.model)
        labels = torch.tensor([self.target(c) for c in classes], device=model.device)
        own = type(self.scheduler).from_config(self.scheduler.config)
        painter = pipeline(unet=model, scheduler=own)
        painter.set_progress_bar_config(disable=True)
        generator = torch.Generator(device=model.device).manual_seed(seed)
        found = []
        for part in torch.split(labels, batch):
            with _conditioned(model, part):
                made = painter(
                    len(part), generator, num_inference_steps=steps or own.config["num_train_timesteps"], output_type="np"
                )
            found.append(made.images.transpose(0, 3, 1, 2) * 2 - 1)
        return np.concatenate(found)

    def layers(self) -> list[str]:
        """The blocks of the network from the input to the output; features are theirs, one row for each target."""
        found = []
        for name in ("down_blocks", "mid_block", "up_blocks"):
            part = getattr(base(self.model), name)
            found += [f"{name}.{i}" for i in range(len(part))] if isinstance(part, nn.ModuleList) else [name] * (part is not None)
        return found

    # ---- identity and storage ----------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Settings that, with the weights, decide what the model says."""
        return {"modality": self.modality, "classes": list(self.classes), "draws": self.draws, "seed": self.seed}

    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration, scheduler and settings."""
        inner: Any = base(self.model)
        state = identity.weights_hash(inner)
        described = [self.describe(), type(self.scheduler).__name__, _plain(self.scheduler.config), _plain(inner.config)]
        state.update(json.dumps(described, sort_keys=True, default=str).encode())
        return str(state.hexdigest())

    def save(self, folder: Path, model: nn.Module | None = None) -> None:
        """Write model and scheduler in the layout of ``DDPMPipeline``, and the settings to ``model.json``.

        Raises:
            InputError: the folder holds something.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{str(folder)!r} exists and is not empty.", "Choose another folder, or remove it.")
        pipeline = need("diffusers", _FEATURE, "diffusion").DDPMPipeline
        with atomic_path(folder) as temporary:
            pipeline(unet=base(self.model if model is None else model), scheduler=self.scheduler).save_pretrained(temporary)
            (temporary / "model.json").write_text(json.dumps(self.describe(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> DiffusionAdapter:
        """What :meth:`save` wrote.

        Raises:
            InputError: there is no such model.
        """
        folder = Path(folder)
        if not (folder / "model.json").is_file() or not (folder / "model_index.json").is_file():
            raise InputError(f"There is no diffusion model in {str(folder)!r}.", "Give a folder that was saved by this adapter.")
        held = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        kinds = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        library = need("diffusers", _FEATURE, "diffusion")
        model, scheduler = (
            getattr(library, kinds[part][1]).from_pretrained(folder, subfolder=part) for part in ("unet", "scheduler")
        )
        return cls(model, scheduler, held["classes"], draws=held["draws"], seed=held["seed"])

    def copy(self) -> DiffusionAdapter:
        """The same settings and scheduler around a copy of the weights."""
        other = copying.copy(self)
        other.model = copying.deepcopy(self.model)
        return other


def _plain(config: Any) -> dict[str, Any]:
    """A configuration without what its library keeps there for itself."""
    return {k: v for k, v in dict(config).items() if not k.startswith("_")}


@contextmanager
def _captured(model: nn.Module, layers: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    """Collect the outputs of the named blocks as ``[N, D]``."""

    def keep(name: str, out: Any) -> None:
        state: Tensor = out if isinstance(out, Tensor) else out[0]
        found[f"features:{name}"] = state.flatten(1)

    handles = [
        model.get_submodule(layer).register_forward_hook(lambda _m, _i, out, name=layer: keep(name, out)) for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _conditioned(model: nn.Module, classes: Tensor) -> Iterator[None]:
    """While open, the model draws these classes, one for each picture: its pipeline knows of none."""
    handle = model.register_forward_pre_hook(lambda _m, args, given: (args, {**given, "class_labels": classes}), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
