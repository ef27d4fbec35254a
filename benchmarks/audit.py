"""The TOFU audit of one model: our one pass against every metric with its own passes, in one run.

Both sides audit the same model (Llama shape, 6 blocks of width 256, vocabulary 32,000, untied, float32) on the same
generated records in TOFU's layout (forget and retain with paraphrases and five wrong answers each, two utility sets with
three, a holdout set for membership) and must arrive at the same numbers, which is checked.

The baseline does what metric-by-metric toolkits do, with care: every metric runs its own forward passes over its sets in
batches of 32 in the order of the data, right padding, logits at every position, one pass per metric and text (LOSS, zlib,
Min-K and Min-K++ one each, though some do two); generation is transformers' own, in left-padded batches of 32. It is timed
twice: ``own``, where model utility and forget quality compute their components themselves, and ``shared``, where metrics
that are made of others take what those have computed under the same name. Neither computes confidence intervals. Ours is the
whole audit as users get it: fingerprint of the weights, writing the cache, intervals, curves and samples included, with
batches of the same padded size.

Run: ``python benchmarks/audit.py [--threads 2] [--persons 2] [--vocabulary 32000] [--repeats 1] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build
from expunge.adapters.words import word_tokenizer
from expunge.audit.attacks.membership import min_k, min_k_plus_plus, zlib_length
from expunge.audit.metrics.memorisation import exact_memorisation, extraction_strength
from expunge.audit.metrics.truth_ratio import truth_ratio_score
from expunge.audit.metrics.words import words
from expunge.audit.run import AuditedModel, audit
from expunge.audit.settings import AuditSettings
from expunge.core.statistics import auc, harmonic_mean
from expunge.data.people import split_people, world, writers
from expunge.data.records import Record, RecordSet

BATCH = 32
NEW_TOKENS = 200
METRICS = (
    "probability", "option-probability", "rouge-l-recall", "truth-ratio", "model-utility", "exact-memorisation",
    "extraction-strength", "membership",
)  # fmt: skip
ATTACKS = ("loss", "zlib", "min-k", "min-k-plus-plus")


def longer(records: RecordSet, wrong: int | None = None) -> RecordSet:
    """Answers of one to five sentences (TOFU's have some 50 words): further facts about the same subject follow the asked one."""
    rows = list(records)
    out = []
    for i, r in enumerate(rows):
        others = [o for o in rows if o.subject == r.subject and o.id != r.id][: i % 5]
        tail = "".join(" " + o.answer for o in others)
        texts = tuple(p + tail for p in r.perturbed[:wrong])
        out.append(replace(r, answer=r.answer + tail, paraphrase=r.paraphrase + tail, perturbed=texts))
    return RecordSet(records.name, tuple(out))


def bare(records: RecordSet, *, paraphrase: bool, perturbed: bool) -> RecordSet:
    """Records without what TOFU's files of that set do not have."""
    cut = [replace(r, paraphrase=r.paraphrase if paraphrase else "", perturbed=r.perturbed if perturbed else ()) for r in records]
    return RecordSet(records.name, tuple(cut))


def data(persons: int) -> dict[str, RecordSet]:
    """In TOFU's proportions: as many retain as forget records are evaluated, holdout as many, two smaller utility sets."""
    split = split_people(persons=3 * persons, forget=persons, holdout=persons)
    utility = {"real-authors": writers(max(2, persons)), "world-facts": world(max(2, persons))}
    return {
        "forget": longer(split.forget),
        "retain": longer(split.retain),
        **{n: bare(r, paraphrase=False, perturbed=True) for n, r in utility.items()},
        "holdout": bare(longer(split.holdout), paraphrase=False, perturbed=False),
    }


def trained(sets: dict[str, RecordSet], vocabulary: int, steps: int) -> LanguageAdapter:
    """A model that has learnt how answers look and where they end, so that generations end as those of real models do."""
    texts = [t for s in sets.values() for r in s for t in (r.prompt, r.answer, r.paraphrase, *r.perturbed)]
    tokenizer = word_tokenizer(["Question: ", "\nAnswer: ", *texts])
    adapter = LanguageAdapter(build("llama-medium", tokenizer, vocab_size=vocabulary, tie_word_embeddings=False), tokenizer)
    examples = [adapter.encode(r) for name in ("forget", "retain", "real-authors", "world-facts") for r in sets[name]]
    optimiser = torch.optim.AdamW(adapter.model.parameters(), lr=1e-3)
    draw = np.random.default_rng(0)
    for _ in range(steps):
        chosen = draw.choice(len(examples), min(8, len(examples)), replace=False)
        batch = adapter.collate([examples[i] for i in chosen])
        loss = adapter.forward(adapter.model, batch, frozenset({"losses"})).losses.mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    adapter.model.eval()
    return adapter


class Baseline:
    """Metric by metric."""

    def __init__(self, adapter: LanguageAdapter, sets: dict[str, RecordSet], *, share: bool) -> None:
        self.adapter, self.sets, self.share = adapter, sets, share
        self.made: dict[tuple, object] = {}
        self.forwards = self.generations = 0

    # ---- passes ------------------------------------------------------------------------------------------------------

    def batches(self, records: Sequence[Record], answers: Sequence[str]):
        """Right-padded ids, mask and labels."""
        encoded = [self.adapter.encode(r, answer=a).data for r, a in zip(records, answers, strict=True)]
        for at in range(0, len(encoded), BATCH):
            part = encoded[at : at + BATCH]
            width = max(len(d.ids) for d in part)
            ids, labels = torch.zeros(len(part), width, dtype=torch.long), torch.full((len(part), width), -100)
            mask = torch.zeros_like(ids)
            for i, d in enumerate(part):
                row = torch.from_numpy(d.ids.astype(np.int64))
                ids[i, : len(row)], mask[i, : len(row)] = row, 1
                labels[i, d.start : len(row)] = row[d.start :]
            yield ids, mask, labels

    @torch.no_grad()
    def logits(self, records: Sequence[Record], answers: Sequence[str]):
        """Shifted logits ``[B, L, V]`` and labels ``[B, L]`` of each batch."""
        for ids, mask, labels in self.batches(records, answers):
            self.forwards += len(ids)
            out = self.adapter.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            yield out[:, :-1].float(), labels[:, 1:]

    def nll(self, records: Sequence[Record], answers: Sequence[str]) -> np.ndarray:
        """Mean loss of each answer."""
        out = []
        for scores, labels in self.logits(records, answers):
            losses = functional.cross_entropy(scores.transpose(1, 2), labels, ignore_index=-100, reduction="none")
            out.append(losses.sum(1) / (labels != -100).sum(1))
        return torch.cat(out).double().numpy()

    def hits(self, name: str) -> list[np.ndarray]:
        """Argmax hits of each answer, without the end token."""
        out = []
        for scores, labels in self.logits(self.sets[name], [r.answer for r in self.sets[name]]):
            right = scores.argmax(-1) == labels
            out += [h[seen].numpy()[:-1] for h, seen in zip(right, labels != -100, strict=True)]
        return out

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def once(self, key: tuple, make):
        """Take what another metric has computed under the same name, if sharing is allowed."""
        if not self.share:
            return make()
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def probability(self, name: str) -> np.ndarray:
        records = self.sets[name]
        return self.once(("p", name), lambda: np.exp(-self.nll(records, [r.answer for r in records])))

    def paraphrased(self, name: str) -> np.ndarray:
        records = self.sets[name]
        return self.once(("q", name), lambda: np.exp(-self.nll(records, [r.paraphrase or r.answer for r in records])))

    def perturbed(self, name: str) -> np.ndarray:
        def make() -> np.ndarray:
            rows = [(r, w) for r in self.sets[name] for w in r.perturbed]
            return np.exp(-self.nll([r for r, _ in rows], [w for _, w in rows])).reshape(len(self.sets[name]), -1)

        return self.once(("w", name), make)

    def options(self, name: str) -> np.ndarray:
        right, wrong = self.probability(name), self.perturbed(name)
        return right / (right + wrong.sum(1))

    def ratio(self, name: str) -> np.ndarray:
        goal = "forget" if name == "forget" else "utility"
        return truth_ratio_score(np.exp(np.log(self.perturbed(name)).mean(1)) / self.paraphrased(name), goal)

    @torch.no_grad()
    def rouge(self, name: str) -> np.ndarray:
        from rouge_score.rouge_scorer import RougeScorer

        def make() -> np.ndarray:
            scorer, tokenizer = RougeScorer(["rougeL"], use_stemmer=True), self.adapter.tokenizer
            out = []
            for at in range(0, len(self.sets[name]), BATCH):
                records = self.sets[name][at : at + BATCH]
                prompts = [d.ids[: d.start] for d in (self.adapter.encode(r).data for r in records)]
                width = max(map(len, prompts))
                ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
                for i, p in enumerate(prompts):
                    ids[i, width - len(p) :], mask[i, width - len(p) :] = torch.from_numpy(p.astype(np.int64)), 1
                self.generations += len(prompts)
                made = self.adapter.model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
                    eos_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
                texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
                out += [scorer.score(r.answer, t)["rougeL"].recall for r, t in zip(records, texts, strict=True)]
            return np.array(out)

        return self.once(("r", name), make)

    def utility(self) -> float:
        found = [self.probability("retain"), self.rouge("retain"), self.ratio("retain")]
        for name in ("real-authors", "world-facts"):
            found += [self.options(name), self.rouge(name), self.ratio(name)]
        return harmonic_mean([f.mean() for f in found])

    def membership(self, attack: str) -> float:
        sides = [self.attack(attack, name) for name in ("holdout", "forget")]
        return auc(*sides)

    def attack(self, attack: str, name: str) -> np.ndarray:
        records = self.sets[name]
        answers = [r.answer for r in records]
        if attack in ("loss", "zlib"):
            nll = self.nll(records, answers)
            return nll if attack == "loss" else nll / np.array([zlib_length(a) for a in answers])
        out = []
        for scores, labels in self.logits(records, answers):
            logp = functional.log_softmax(scores, dim=-1)
            own = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            if attack == "min-k":
                out += [min_k(o[seen].numpy()[:-1]) for o, seen in zip(own, labels != -100, strict=True)]
                continue
            p = logp.exp()
            mean = (p * logp).sum(-1)
            std = ((p * logp.square()).sum(-1) - mean.square()).clamp(min=0).sqrt()
            for rows in zip(own, mean, std, labels != -100, strict=True):
                seen = rows[3]
                out.append(min_k_plus_plus(*(t[seen].numpy()[:-1] for t in rows[:3])))
        return np.array(out)

    def run(self) -> dict[str, float]:
        """All numbers, keyed as in our document."""
        out = {"forget.probability": self.probability("forget").mean(), "retain.probability": self.probability("retain").mean()}
        for name in ("real-authors", "world-facts"):
            out[f"{name}.option-probability"] = self.options(name).mean()
        for name in ("forget", "retain", "real-authors", "world-facts"):
            out[f"{name}.rouge-l-recall"] = self.rouge(name).mean()
            out[f"{name}.truth-ratio"] = self.ratio(name).mean()
        out["model-utility"] = self.utility()
        out["forget.exact-memorisation"] = np.mean([exact_memorisation(h) for h in self.hits("forget")])
        out["forget.extraction-strength"] = np.mean([extraction_strength(h) for h in self.hits("forget")])
        self.ratio("forget")  # what forget quality compares with a retrained model
        return out | {f"membership.{a}": self.membership(a) for a in ATTACKS}


def ours(adapter: LanguageAdapter, sets: dict[str, RecordSet], cache: Path, budget: int) -> dict[str, float | None]:
    """The audit, as a user runs it."""
    settings = AuditSettings(
        metrics=METRICS, options={"membership": {"attacks": ATTACKS}}, batch_tokens=budget, relearn=None, quantise=()
    )
    document = audit([AuditedModel("target", "target", adapter)], sets, settings, cache=cache)
    return {k: n.value for k, n in document.models[0].numbers.items()}


def compare(mine: dict[str, float | None], theirs: dict[str, float]) -> float:
    """Largest difference between both sides; a missing number is an error."""
    worst = 0.0
    for key, value in theirs.items():
        got = mine[key]
        if got is None or not np.isclose(got, value, atol=2e-3):
            sys.exit(f"{key}: ours {got}, own passes {value}")
        worst = max(worst, abs(got - value))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--persons", type=int, default=2, help="persons to forget, ten questions each")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--train", type=int, default=40, help="training steps of the model")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sets = data(options.persons)
    adapter = trained(sets, options.vocabulary, options.train)
    longest = max(adapter.encode(r).size for s in sets.values() for r in s)
    words("A word to load the stemmer, which both sides use.", True)
    seconds: dict[str, list[float]] = {"ours": [], "cached": [], "own": [], "shared": []}
    cpu: dict[str, list[float]] = {k: [] for k in seconds}
    worst, passes = 0.0, {}

    def timed(kind: str, run: Callable[[], dict]) -> dict:
        wall, busy = time.perf_counter(), time.process_time()
        found = run()
        seconds[kind].append(time.perf_counter() - wall)
        cpu[kind].append(time.process_time() - busy)
        return found

    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("ours", "cached"):
                mine = timed(kind, lambda folder=folder: ours(adapter, sets, Path(folder), BATCH * longest))
        for kind in ("own", "shared"):
            baseline = Baseline(adapter, sets, share=kind == "shared")
            worst = max(worst, compare(mine, timed(kind, baseline.run)))
            passes[kind] = {"forward": baseline.forwards, "generation": baseline.generations}
    median, busy = ({k: statistics.median(v) for k, v in times.items()} for times in (seconds, cpu))
    result = {
        "benchmark": "audit",
        "records": {n: len(s) for n, s in sets.items()},
        "parameters": sum(p.numel() for p in adapter.model.parameters()),
        "threads": options.threads,
        "seconds": median,
        "cpu_seconds": busy,
        "passes": passes,
        "largest_difference": worst,
        "ratio": median["own"] / median["ours"],
        "ratio_shared": median["shared"] / median["ours"],
        "ratio_cpu": busy["own"] / busy["ours"],
        "ratio_shared_cpu": busy["shared"] / busy["ours"],
        "target": 3.0,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    again = f"again from the cache {median['cached']:.1f} s"
    print(
        f"Audit: {median['ours']:.1f} s; every metric with its own passes {median['own']:.1f} s: {result['ratio']:.1f} times "
        f"(with shared components {median['shared']:.1f} s: {result['ratio_shared']:.1f} times); {again}. "
        f"By processor time {result['ratio_cpu']:.1f} and {result['ratio_shared_cpu']:.1f} times. Target: 3."
    )


if __name__ == "__main__":
    main()
