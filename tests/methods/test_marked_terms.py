"""Terms on marked targets, or on the others: for every registered term, by leaving the rest out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from synthetic import LAYERS, One, Step, step

from expunge.adapters.language import LanguageAdapter
from expunge.adapters.presets import build as preset
from expunge.adapters.words import word_tokenizer
from expunge.core.access import Stream
from expunge.core.errors import InputError
from expunge.data.records import Record
from expunge.engine.objective import Objective
from expunge.engine.parts import Term
from expunge.methods.recipe import build
from expunge.methods.registry import TERMS
from expunge.methods.terms.distribution import CEU
from expunge.methods.terms.likelihood import NLL, ForgetNLL, GradientAscent
from expunge.methods.terms.preference import NPO

close = torch.testing.assert_close
ALL = [cls for _, cls in TERMS.items()]
MARKS = [[True, False, False], [True], [False, True, True, False, True]]
FAVOURS = [[False, True, False], [False], [True, False, False, False, False]]


def marked_step(seed: int = 0) -> Step:
    """A step whose forget and retain examples have marked targets, among them one that is marked as a whole."""
    made = step((3, 1, 5), (3, 1, 5), seed)
    for stream in (Stream.FORGET, Stream.RETAIN, Stream.ALTERNATIVE):
        for item, marks in zip(made.items[stream], MARKS, strict=True):
            item.marked = torch.tensor(marks[: len(item.targets)] + [False] * (len(item.targets) - len(marks)))
    return Step(made.items)


def favoured_step() -> Step:
    """The same with favoured targets among those that are not marked."""
    made = marked_step()
    for stream in (Stream.FORGET, Stream.RETAIN, Stream.ALTERNATIVE):
        for item, flags in zip(made.items[stream], FAVOURS, strict=True):
            item.favoured = torch.tensor(flags[: len(item.targets)] + [False] * (len(item.targets) - len(flags)))
    return Step(made.items)


def cut(item: One, which: str) -> One:
    """The example without the other targets and their tokens."""
    favoured = torch.zeros_like(item.marked) if item.favoured is None else item.favoured
    kept = {"marked": item.marked, "favoured": favoured, "unmarked": ~(item.marked | favoured)}[which]
    held = copy.copy(item)
    for name in ("logits", "reference", "targets", "marked"):
        setattr(held, name, getattr(item, name)[kept])
    held.favoured = favoured[kept]
    for name in ("states", "reference_states"):
        states = getattr(item, name)
        setattr(held, name, torch.cat([states[:2], states[2:][kept]]))
    return held


@pytest.mark.parametrize("which", ["marked", "unmarked"])
@pytest.mark.parametrize("cls", [c for c in ALL if c.per != "token" and not c.whole and c.selective], ids=lambda c: c.name)
def test_a_term_on_some_targets_is_the_term_on_examples_without_the_others(cls: type[Term], which: str):
    term = cls(targets=which)
    whole = marked_step()
    alone = Step({s: [cut(i, which) if s is term.stream else i for i in items] for s, items in whole.items.items()})
    close(term.total(whole.views()), cls().values(alone.views()).sum(), rtol=1e-5, atol=1e-5)
    kept = [e for e in alone.examples(term.stream) if e.n_targets]
    assert term.divisor(whole.examples(term.stream)) == max(1, cls().count(kept))


@pytest.mark.parametrize("which", ["marked", "favoured", "unmarked"])
@pytest.mark.parametrize("cls", [c for c in ALL if c.per != "token" and not c.whole and c.selective], ids=lambda c: c.name)
def test_three_kinds_of_targets_are_told_apart(cls: type[Term], which: str):
    term = cls(targets=which)
    whole = favoured_step()
    alone = Step({s: [cut(i, which) if s is term.stream else i for i in items] for s, items in whole.items.items()})
    close(term.total(whole.views()), cls().values(alone.views()).sum(), rtol=1e-5, atol=1e-5)
    kept = [e for e in alone.examples(term.stream) if e.n_targets]
    assert term.divisor(whole.examples(term.stream)) == max(1, cls().count(kept))


def test_the_gradient_is_on_the_chosen_targets_alone():
    made = marked_step()
    marked = torch.cat([i.marked for i in made.items[Stream.FORGET]])
    for which, mask in (("marked", marked), ("unmarked", ~marked)):
        for cls in (GradientAscent, ForgetNLL, NPO):
            term = cls(targets=which)
            gradient = made.gradient(lambda v, t=term: t.total(v) / t.divisor(made.examples(Stream.FORGET)))
            assert (gradient[mask].abs().sum(1) > 0).all()
            assert (gradient[~mask] == 0).all()


def test_means_are_over_the_chosen_targets():
    made = marked_step()
    losses, marked = made.views().current(Stream.FORGET).losses, torch.cat([i.marked for i in made.items[Stream.FORGET]])
    owner = made.views().current(Stream.FORGET).owner
    examples = made.examples(Stream.FORGET)

    def mean(**settings) -> float:
        term = ForgetNLL(**settings)
        return (term.total(made.views()) / term.divisor(examples)).item()

    assert mean(targets="marked") == pytest.approx(losses[marked].mean().item())
    assert mean(targets="unmarked") == pytest.approx(losses[~marked].mean().item())
    rest = [losses[(owner == i) & ~marked] for i in (0, 2)]  # the second example is marked as a whole: it does not count
    assert mean(targets="unmarked", reduction="sequence") == pytest.approx(torch.stack([r.mean() for r in rest]).mean().item())
    assert mean(targets="unmarked", reduction="sum") == pytest.approx(torch.stack([r.sum() for r in rest]).mean().item())


def test_tokens_are_chosen_too():
    made = marked_step()
    term = TERMS.get("rmu")()
    views = made.views()
    feature = views.current(Stream.FORGET).features(LAYERS[1])
    spoken = torch.cat([torch.cat([torch.zeros(2, dtype=torch.bool), i.marked]) for i in made.items[Stream.FORGET]])
    for which, mask in (("marked", spoken), ("unmarked", ~spoken)):
        chosen = TERMS.get("rmu")(targets=which)
        assert chosen.divisor(made.examples(Stream.FORGET)) == int(mask.sum())
        assert chosen.values(views.only(Stream.FORGET, which)).shape == (int(mask.sum()),)
        close(chosen.total(views), term.values(views)[mask].sum(), rtol=1e-5, atol=1e-5)
    assert len(feature) == len(spoken)
    three, shared = favoured_step(), 0
    for which in ("marked", "favoured", "unmarked"):
        chosen = TERMS.get("rmu")(targets=which)
        assert len(chosen.values(three.views().only(Stream.FORGET, which))) == chosen.divisor(three.examples(Stream.FORGET))
        shared += chosen.divisor(three.examples(Stream.FORGET))
    assert shared == len(spoken)


def test_leading_targets_are_counted_among_the_chosen():
    """CE-U leaves the first target out: of the marked ones alone, the first of these."""
    made = marked_step()
    values = CEU().values(made.views().only(Stream.FORGET, "marked"))
    assert (values == 0).tolist() == [False, False, True, False, False]


def test_without_marks_they_are_refused():
    records = [Record("a", "pin 12 34", spans=((4, 6),)), Record("b", "pin 12 34", spans=((0, 9),)), Record("c", "pin 12 34")]
    tokenizer = word_tokenizer(["pin 12 34"])
    adapter = LanguageAdapter(preset("llama-tiny", tokenizer, context=16), tokenizer)
    one, whole, none = [adapter.encode(r) for r in records]

    def objective(first, second, **parts):
        return Objective(adapter, build("graddiff", parts), {Stream.FORGET: [first], Stream.RETAIN: [second]})

    for parts in ({"forget": {"targets": "marked"}}, {"retain": {"targets": "unmarked"}}):
        with pytest.raises(InputError, match="tells marked spans from the rest") as error:
            objective(none, none, **parts)
        assert "spans.patterns" in error.value.remedy
    with pytest.raises(InputError, match="no forget example has any"):
        objective(none, one, forget={"targets": "marked"})
    with pytest.raises(InputError, match="but all are marked"):
        objective(whole, one, forget={"targets": "unmarked"})
    with pytest.raises(InputError, match="reads favoured forget targets, which no preparation marks"):
        objective(one, none, forget={"targets": "favoured"})
    objective(one, none, forget={"targets": "marked"})
    objective(one, none, retain={"targets": "unmarked"})


def test_what_a_recipe_watches_follows_from_its_forget_terms():
    assert build("npo").watched == "all"
    assert build("npo", {"forget.targets": "marked"}).watched == "marked"
    assert build("npo", {"retain.targets": "unmarked"}).watched == "all"
    assert NLL().targets == "all"
