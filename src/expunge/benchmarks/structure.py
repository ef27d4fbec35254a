"""Facts that hang together: PISTOL (arXiv 2406.16810) and KnowUnDo (arXiv 2407.01920).

PISTOL's facts are the edges of a graph: contracts between companies and people. Edges are forgotten, and what is kept is measured
apart for edges that share an entity with a forgotten one and for the rest. Its scores are ROUGE-L recall with stemming of the
greedy answer and the probability of the answer. Not here: reciprocal rank and hit rate, which the published code takes from the
scores at the positions of a free answer, whatever that answer says.

KnowUnDo asks to forget what the law protects (an address, a passage) and to keep what it does not (a birthplace, a summary) of
the same people and books. The model learns all questions; unlearning sees the *train* part of either split, and both *val* parts
are measured. Its scores are the share of answer tokens that are the model's first choice (unlearn success is 100 less that,
retention success that itself) and the loss, whose exponential is the published perplexity.

Both are read from files of yours; a retrained model has seen nothing that is to be forgotten, *val* included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from expunge.audit.metrics import papers
from expunge.benchmarks.registry import Axis, Benchmark, Roles, Source, Training, benchmark, where
from expunge.data.people import people, world
from expunge.data.people_words import Draw, invented
from expunge.engine.parts import Paper

_LORA = {"name": "lora", "rank": 8}


@benchmark
class PistolBenchmark(Benchmark):
    """Edges of a graph of contracts: are their facts forgotten, and those of their neighbours kept?"""

    name: ClassVar[str] = "pistol"
    title: ClassVar[str] = "PISTOL: structural unlearning of edges"
    paper: ClassVar[Paper] = papers.PISTOL
    licence: ClassVar[str] = "ODC-BY"
    home: ClassVar[str] = "hub data set xinchiqiu/PISTOL; factual_data.json of its repository"
    caveats: ClassVar[tuple[str, ...]] = (
        "Answers are short (a date, a number): another edge may have the same, and a guess may be right.",
    )

    graph: str = Field("1", description="which graph: NAME of sample_data_NAME.json; published: 1, 2")
    edges: str = Field("A_B", description="the edges to forget, with commas; published: A_B; A_C; A_C,A_C2,A_C3")
    answer_tokens: int = Field(64, ge=1, description="longest answer, in tokens")

    def sources(self) -> Mapping[str, Source]:
        """The edges to forget, all others, these in two parts, and general knowledge."""
        texts = {
            "forget": "questions about the edges to forget", "retain": "questions about all other edges",
            "connected": "kept edges that share an entity with a forgotten one", "apart": "kept edges that share none",
            "facts": "questions on general knowledge",
        }  # fmt: skip
        query = where(self.data, sample=self.graph, edges=self.edges)
        optional = ("connected", "apart", "facts")
        return {n: Source(f"pistol:{n}{query}", text, optional=n in optional) for n, text in texts.items()}

    def trainings(self) -> Sequence[Training]:
        """All edges: LoRA of rank 8, 20 epochs at 2e-5, batch 16."""
        schedule = {"name": "fixed", "lr": 2e-5, "epochs": 20, "batch": 16, "warmup": 1, "decay": "linear"}
        return (Training("target", ("forget", "retain"), {"schedule": schedule, "parameters": _LORA}, "Llama-2-7B-chat"),)

    def roles(self) -> Roles:
        """Some edges are forgotten, all others are kept."""
        return Roles("forget", "retain")

    def unlearning(self) -> Mapping[str, Any]:
        """LoRA of rank 8, 20 epochs at 1e-5, batch 4, weight decay 0.01."""
        return {"schedule": {"name": "fixed", "lr": 1e-5, "epochs": 20, "batch": 4, "weight_decay": 0.01}, "parameters": _LORA}

    def axes(self) -> Sequence[Axis]:
        """ROUGE-L and probability of each part."""
        titles = {
            "forget": "Edges to forget", "retain": "All kept edges", "connected": "Kept, connected", "apart": "Kept, apart",
            "facts": "General knowledge",
        }  # fmt: skip
        said = {"stem": True, "max_new_tokens": self.answer_tokens, "stops": ("\n",)}
        out = []
        for part, title in titles.items():
            rouge, sure = f"{part}.rouge-l-recall", f"{part}.probability"
            out.append(Axis(f"{part}-rouge", f"{title}, ROUGE-L", "rouge-l-recall", {part: part}, rouge, said))
            out.append(Axis(f"{part}-probability", f"{title}, probability", "probability", {part: part}, sure))
        return out

    def small(self) -> Mapping[str, Any]:
        """Short answers."""
        return {"answer_tokens": 12}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Contracts between invented firms in a graph with a hub, and general knowledge."""
        folder.mkdir(parents=True, exist_ok=True)
        draw = Draw(seed, "pistol")
        firms = dict(zip("ABCDEF", draw.shuffled(invented("surname")), strict=False))
        towns = dict(zip("ABCDEF", draw.shuffled(invented("town")), strict=False))
        for name, edges in (("1", ("A_B", "A_C", "B_D", "E_F")), ("2", ("A_B", "A_C", "A_D", "E_F"))):
            rows = [{**q, "edge": e} for e in edges for q in _contract(e, firms, towns, Draw(seed, "pistol", name, e))]
            _dump(folder / f"sample_data_{name}.json", rows)
        _dump(folder / "factual_data.json", [{"question": r.prompt, "answer": r.answer} for r in world(3, seed + 1)])


def _contract(edge: str, firms: Mapping[str, str], towns: Mapping[str, str], draw: Draw) -> list[dict[str, str]]:
    seller, customer = edge.split("_")
    both = f"the contract between {firms[seller]} and {firms[customer]}"
    good = draw.pick(("boots", "candles", "clocks", "jeans", "lamps", "maps", "ropes", "spoons"))
    month = draw.pick(("March", "April", "May", "June"))
    told = {
        f"What was the date of {both}?": f"{1 + draw.below(28)} {month} {1950 + draw.below(60)}.",
        f"Which good was sold by {both}?": f"{good.capitalize()}.",
        f"What was the price of the {good} in {both}?": f"{10 + draw.below(90)}.",
        f"In which town is {firms[seller]} by {both}?": f"{towns[seller]}.",
    }
    return [{"question": q, "answer": a} for q, a in told.items()]


@benchmark
class KnowUnDoBenchmark(Benchmark):
    """What the law asks to forget beside what it lets keep, of the same people and books."""

    name: ClassVar[str] = "knowundo"
    title: ClassVar[str] = "KnowUnDo: to forget or not"
    paper: ClassVar[Paper] = papers.KNOWUNDO
    licence: ClassVar[str] = "MIT"
    home: ClassVar[str] = "hub data set zjunlp/KnowUnDo"
    caveats: ClassVar[tuple[str, ...]] = (
        "Published success rates are first choices given the true answer so far, not answers: read ROUGE-L beside them.",
    )

    domain: Literal["privacy", "copyright"] = Field("privacy", description="what is protected")
    answer_tokens: int = Field(128, ge=1, description="longest answer, in tokens")

    def sources(self) -> Mapping[str, Source]:
        """Both splits, for unlearning and for measuring."""
        texts = {
            "unlearn": "to forget", "retention": "to keep", "unlearn_val": "to forget, not seen by unlearning",
            "retention_val": "to keep, not seen by unlearning",
        }  # fmt: skip
        query = where(self.data, domain=self.domain)
        return {n: Source(f"knowundo:{n.replace('_', '-')}{query}", text) for n, text in texts.items()}

    def trainings(self) -> Sequence[Training]:
        """All four sets: LoRA of rank 8, 10 epochs at 1e-4, batch 32."""
        schedule = {"name": "fixed", "lr": 1e-4, "epochs": 10, "batch": 32, "warmup": 1, "decay": "linear", "weight_decay": 1e-4}
        return (Training("target", tuple(self.sources()), {"schedule": schedule, "parameters": _LORA}, "Llama-2-7B-chat"),)

    def roles(self) -> Roles:
        """The train parts are the request; a retrained model has not seen the val part of what is to be forgotten either."""
        return Roles("unlearn", "retention", without=("unlearn_val",))

    def unlearning(self) -> Mapping[str, Any]:
        """LoRA, 2 epochs at 5e-5, cosine, batch 16."""
        return {
            "schedule": {"name": "fixed", "lr": 5e-5, "epochs": 2, "batch": 16, "decay": "cosine", "warmup": 0.06},
            "parameters": _LORA,
        }

    def axes(self) -> Sequence[Axis]:
        """First choices, ROUGE-L and loss on both val parts, then on what unlearning has seen."""
        said = {"max_new_tokens": self.answer_tokens}
        out = []
        for role, text, name, split in (
            ("forget", "To forget", "unlearn_val", "unlearn"), ("retain", "To keep", "retention_val", "retention"),
            ("forget", "To forget, seen", "unlearn", "unlearn-seen"), ("retain", "To keep, seen", "retention", "retention-seen"),
        ):  # fmt: skip
            sets, hits, rouge = {role: name}, f"{role}.exact-memorisation", f"{role}.rouge-l-recall"
            note = "unlearn success is 100 less this" if role == "forget" else "retention success"
            out += [
                Axis(f"{split}-accuracy", f"{text}: first choices", "exact-memorisation", sets, hits, scale=100, note=note),
                Axis(f"{split}-rouge", f"{text}: ROUGE-L recall", "rouge-l-recall", sets, rouge, said, scale=100),
                Axis(f"{split}-loss", f"{text}: loss", "loss", sets, f"{role}.loss", note="its exponential is the perplexity"),
            ]
        return out

    def small(self) -> Mapping[str, Any]:
        """Short answers."""
        return {"answer_tokens": 16}

    def sample(self, folder: Path, seed: int = 0) -> None:
        """Invented people: some of their facts are private, the others public."""
        for domain, first in (("privacy", 0), ("copyright", 8)):
            place = folder / domain
            place.mkdir(parents=True, exist_ok=True)
            facts = list(people(4, seed + 1, 8, first=first))
            for split, wanted in (("unlearn", 0), ("retention", 1)):
                rows = [{"text": r.prompt, "labels": r.answer} for i, r in enumerate(facts) if i % 2 == wanted]
                text = json.dumps({"train": rows[::2], "val": rows[1::2]}, ensure_ascii=False, indent=1)
                (place / f"{split}.json").write_text(text, encoding="utf-8")


def _dump(path: Path, rows: Sequence[Any]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
