"""Parametric traces: are the weights that carry a subject still where they were?

A feed-forward layer adds up *value vectors*, the columns of its output matrix, each as much as its unit fires. Some of them
write what is known of a subject. Unlearning that leaves them alone has hidden the knowledge and not removed it (Hong et al.
2024, arXiv 2406.11614).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from expunge.adapters.base import Adapter, Example
from expunge.adapters.head import base, head_of
from expunge.adapters.passes import evaluating
from expunge.audit.attacks.inside import Arrays, kept, record_number, target_of
from expunge.audit.attacks.registry import Access, Attack, Criterion, attack
from expunge.audit.evidence import Evidence, Values
from expunge.audit.metrics.papers import CONCEPT_VECTORS
from expunge.audit.metrics.registry import Range
from expunge.audit.probes import take_clusters
from expunge.audit.store import device_of
from expunge.core.access import Offer
from expunge.core.errors import InputError
from expunge.core.intervals import Floats
from expunge.core.results import Direction, Number
from expunge.engine.feedforward import FeedForward, output_matrix
from expunge.engine.gradients import fitting
from expunge.engine.objective import mean_losses
from expunge.engine.parts import Paper


@attack
class ParametricTraces(Attack):
    """The value vectors of the target that carry what is known of each forget subject, and how far they have moved.

    For each subject the vectors are those whose removal would raise the loss of its answers most, by attribution (the unit
    times the gradient of the loss along its vector, summed over tokens); the target with noise on them must lose answers of
    the subject, and more than retain answers, or the subject has no value. (The paper chooses vectors by the words they
    promote, by a language model and by hand.) Given are the cosine to the target's vectors (the value), the relative change,
    and the overlap (Jaccard) of the words that they promote most.

    Gradient-based unlearning hardly moves them, so values near 1 are the rule. Retrained models that began at other random
    weights have nothing in common with the target's vectors; so the number is shown and not judged.
    """

    name: ClassVar[str] = "parametric-traces"
    title: ClassVar[str] = "Traces in the weights"
    formula: ClassVar[str] = "mean over a subject's value vectors of cos(v, v_target)"
    paper: ClassVar[Paper] = CONCEPT_VECTORS
    access: ClassVar[Access] = Access.BOTH
    criterion: ClassVar[Criterion] = Criterion.REPRESENTATION
    convicts: ClassVar[bool] = False
    passes: ClassVar[str] = "none; of the target 1 backward pass, and 2 forward passes per subject"
    range: ClassVar[Range] = (-1.0, 1.0)
    offers: ClassVar[frozenset[Offer]] = frozenset({Offer.TEXT, Offer.LOSSES, Offer.SEQUENCE})

    vectors: int = Field(8, ge=1, description="value vectors of each subject")
    subjects: int = Field(20, ge=1, description="subjects at most")
    noise: float = Field(5.0, gt=0, description="noise that tests a vector, in units of its root mean square")
    words: int = Field(
        200, ge=1, description="words that a vector promotes most, of which the overlap is given; at most a tenth of all"
    )

    def lacks(self, evidence: Evidence, name: str) -> str:
        """A target and a retain set."""
        return "" if target_of(evidence) and "retain" in evidence.sets else "it needs the target model and a retain set"

    def depends(self, evidence: Evidence, label: str) -> Mapping[str, Any]:
        """The target."""
        return {"target": evidence.subject(target_of(evidence)).fingerprint}

    def chosen(self, evidence: Evidence, name: str) -> Arrays:
        """Of the target: ``places`` ``[subjects, vectors, 2]`` (layer and unit), ``harm`` ``[subjects, 2]`` (how noise raises the
        loss of the subject's answers and of retain answers), ``values`` ``[subjects, vectors, D]``, ``top`` ``[.., words]``."""
        target = target_of(evidence)

        def make() -> Arrays:
            adapter, at = evidence.adapter(target), evidence.protocol
            groups = self._groups(evidence, name)
            records, others = evidence.records(name), evidence.records("retain")
            kept_ = take_clusters(evidence.clusters("retain"), 64, at.seed)
            retain = [adapter.encode(others[int(i)]) for i in kept_]
            places, harm, values = [], [], []
            for number, members in enumerate(groups.values()):
                examples = [adapter.encode(records[i]) for i in members]
                found = strongest(attributions(adapter, examples, at.batch_tokens), self.vectors)
                places.append(found)
                noise = (self.noise, torch.Generator().manual_seed(1_000_003 * at.seed + number))
                harm.append(_harm(adapter, found, (examples, retain), noise=noise, batch_tokens=at.batch_tokens))
                values.append(columns(adapter, found))
            tensor = torch.stack(values)
            return {
                "places": np.array(places), "harm": np.array(harm), "values": tensor.numpy(),
                "top": promoted(adapter, tensor, self.words),
            }  # fmt: skip

        return kept(self, evidence, target, name, part="vectors", make=make)

    def _groups(self, evidence: Evidence, name: str) -> dict[str, list[int]]:
        """Records of each subject, of the first so many subjects."""
        out: dict[str, list[int]] = {}
        for i, cluster in enumerate(evidence.clusters(name)):
            out.setdefault(cluster, []).append(i)
        return dict(list(out.items())[: self.subjects])

    def compared(self, evidence: Evidence, label: str, name: str) -> dict[str, Floats]:
        """``cosine``, ``change`` and ``overlap`` of each record's subject; NaN where noise does not single it out."""

        def make() -> Arrays:
            held = self.chosen(evidence, name)
            groups, adapter = self._groups(evidence, name), evidence.adapter(label)
            out = {k: np.full(len(evidence.records(name)), np.nan) for k in ("cosine", "change", "overlap")}
            try:
                own = torch.stack([columns(adapter, p.tolist()) for p in held["places"]])
                top = promoted(adapter, own, self.words)
            except (InputError, IndexError, RuntimeError) as error:
                evidence.miss(f"{self.title} of {label!r} were not compared: {error}")
                return out
            full = torch.from_numpy(held["values"])
            numbers = {
                "cosine": torch.cosine_similarity(own, full, dim=-1).mean(-1).numpy(),
                "change": ((own - full).norm(dim=-1) / full.norm(dim=-1)).mean(-1).numpy(),
                "overlap": np.array(
                    [np.mean([jaccard(a, b) for a, b in zip(x, y, strict=True)]) for x, y in zip(top, held["top"], strict=True)]
                ),
            }
            for number, (members, harm) in enumerate(zip(groups.values(), held["harm"], strict=True)):
                if harm[0] > max(0.0, harm[1]):
                    for key, values in numbers.items():
                        out[key][members] = values[number]
            return out

        return {k: v.astype(np.float64) for k, v in kept(self, evidence, label, name, part="compared", make=make).items()}

    def per_record(self, evidence: Evidence, label: str, name: str) -> Values:
        """Cosine of the vectors of each record's subject to the target's."""
        values = self.compared(evidence, label, name)["cosine"]
        return Values(values, ~np.isnan(values))

    def compute(self, evidence: Evidence, label: str) -> dict[str, Number]:
        """The cosine, the relative change and the overlap of promoted words."""
        out = super().compute(evidence, label)
        if f"forget.{self.name}" not in out:
            return out
        held = self.compared(evidence, label, "forget")
        notes = {
            "change": "norm of the change of a vector relative to its own",
            "overlap": "Jaccard overlap of the words promoted most",
        }
        for key, note in notes.items():
            upper = 1.0 if key == "overlap" else None
            number = record_number(evidence, "forget", held[key], Direction.REFERENCE, range=(0.0, upper), note=note)
            if number is not None:
                out[f"forget.{self.name}.{key}"] = number
        return out


Places = Sequence[Sequence[int]]
Noise = tuple[float, torch.Generator]


def _outputs(adapter: Adapter) -> list[FeedForward]:
    inner = base(adapter.model)
    return [FeedForward.of(inner.get_submodule(layer), layer) for layer in adapter.layers()]


def attributions(adapter: Adapter, examples: Sequence[Example], batch_tokens: int) -> Tensor:
    """How much the mean loss would rise, to first order, without each value vector, ``[L, units]``.

    ``-sum_t a_t <v, dLoss/do_t>`` for a unit's value ``a_t`` and the output ``o_t`` of its layer at token t.

    Raises:
        InputError: a block has no feed-forward layer of the usual kind.
    """
    parts = _outputs(adapter)
    total = torch.zeros(len(parts), parts[0].units, dtype=torch.float64)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(index: int) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.requires_grad_(True)
            seen[index] = (inputs[0], output)
            return output

        return hook

    handles = [p.output.register_forward_hook(watch(i)) for i, p in enumerate(parts)]
    try:
        with evaluating(adapter.model), torch.enable_grad():
            for part in fitting(examples, batch_tokens):
                batch = adapter.collate(part).to(device_of(adapter.model))
                out = adapter.forward(adapter.model, batch, frozenset({"losses"}))
                loss = (out.per_example(out.losses) / out.lengths()).sum() / len(examples)
                slopes = torch.autograd.grad(loss, [seen[i][1] for i in range(len(parts))])
                for i, (slope, held) in enumerate(zip(slopes, parts, strict=True)):
                    units = seen[i][0].detach().reshape(-1, held.units)
                    along = slope.reshape(-1, slope.shape[-1]) @ output_matrix(held)
                    total[i] -= (units * along).sum(0).double().cpu()
    finally:
        for handle in handles:
            handle.remove()
    return total


def strongest(scores: Tensor, count: int) -> list[list[int]]:
    """Layer and unit of the ``count`` largest scores ``[L, units]``."""
    order = scores.flatten().argsort(descending=True)[:count].tolist()
    return [list(divmod(i, scores.shape[1])) for i in order]


def columns(adapter: Adapter, places: Places) -> Tensor:
    """The value vectors at some layers and units, ``[vectors, D]`` float32 on the CPU.

    Raises:
        InputError: a block has no feed-forward layer of the usual kind, or too few units.
    """
    parts = _outputs(adapter)
    _check(parts, places)
    return torch.stack([output_matrix(parts[layer])[:, unit].float().cpu() for layer, unit in places])


def _check(parts: Sequence[FeedForward], places: Places) -> None:
    for layer, unit in places:
        if layer >= len(parts) or unit >= parts[layer].units:
            raise InputError(
                f"The model has no unit {unit} in block {layer}: it has another shape than the one whose vectors are named.",
                "Compare models of one shape, or look for the vectors anew.",
            )


@torch.no_grad()
def promoted(adapter: Adapter, vectors: Tensor, words: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Ids of the tokens that vectors ``[..., D]`` promote most, by the model's own head, ``[..., min(words, V / 10)]``.

    Raises:
        InputError: the head has no weight that could be read.
    """
    head: Any = head_of(adapter.model)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape[1] != vectors.shape[-1]:
        raise InputError("The model's head has no matrix through which a vector could be read.")
    scores = vectors.to(weight.device, weight.dtype) @ weight.T
    found: np.ndarray[Any, np.dtype[np.int64]] = (
        scores.topk(max(1, min(words, weight.shape[0] // 10)), dim=-1).indices.cpu().numpy()
    )
    return found


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """Common members of two sets over all members, in [0, 1]."""
    first, second = set(map(int, a)), set(map(int, b))
    return len(first & second) / len(first | second)


def _harm(
    adapter: Adapter,
    places: Places,
    sides: Sequence[Sequence[Example]],
    *,
    noise: tuple[float, torch.Generator],
    batch_tokens: int,
) -> list[float]:
    """How much noise on some value vectors raises the mean loss of either side."""

    def losses() -> list[float]:
        return [float(np.mean(mean_losses(adapter, adapter.model, side, batch_tokens))) for side in sides]

    before = losses()
    with noised(adapter, places, *noise):
        after = losses()
    return [b - a for a, b in zip(before, after, strict=True)]


@contextmanager
def noised(
    adapter: Adapter, places: Places, noise: float, generator: torch.Generator, *, relative: bool = True
) -> Iterator[None]:
    """While open, some value vectors have Gaussian noise of standard deviation ``noise``; then they are as before.

    ``relative``: in units of the vector's root mean square.

    Raises:
        InputError: a block has no feed-forward layer of the usual kind, or there is no such vector.
    """
    parts = _outputs(adapter)
    _check(parts, places)
    held = []
    with torch.no_grad():
        for layer, unit in places:
            column = output_matrix(parts[layer])[:, unit]
            held.append((column, column.clone()))
            drawn = torch.randn(len(column), generator=generator).to(column)
            column.add_(drawn, alpha=noise * (float(column.float().pow(2).mean().sqrt()) if relative else 1.0))
    try:
        yield
    finally:
        with torch.no_grad():
            for column, before in held:
                column.copy_(before)
