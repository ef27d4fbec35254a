"""Whether the parts of a recipe work together, found out before anything is trained."""

from __future__ import annotations

from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.finish import FINISHES
from expunge.engine.parts import Join, Recipe, Reweigh
from expunge.engine.projection import ProjectedStates
from expunge.engine.reference import choose
from expunge.methods.registry import PLACEHOLDER_LAYERS
from expunge.methods.terms.likelihood import AlternativeNLL, ForgetNLL


def check(recipe: Recipe) -> None:
    """Refuse parts that cannot work together.

    What depends on the model or the data (a layer that it does not have, alternatives that are not there) is found by the
    engine, also before training.

    Raises:
        InputError: naming the two parts and what to change.
    """
    _check_terms(recipe)
    _check_preparation(recipe)
    _check_sides(recipe)
    _check_finish(recipe)
    choose(recipe, recipe.needs(PLACEHOLDER_LAYERS))
    _check_start(recipe)


def _check_terms(recipe: Recipe) -> None:
    if not recipe.terms():
        raise InputError(f"The recipe {recipe.name!r} has no loss term.", "Give one, for example forget=npo retain=nll.")
    for term in recipe.forget:
        if term.stream is Stream.RETAIN:
            raise InputError(f"{term.name!r} is a retain term, but was given as a forget term.", f"Write retain={term.name}.")
    for term in recipe.retain:
        if term.stream is not Stream.RETAIN:
            raise InputError(f"{term.name!r} is a forget term, but was given as a retain term.", f"Write forget={term.name}.")
    for term in recipe.terms():
        if term.targets != "all" and not term.selective:
            raise InputError(f"{term.name!r} reads whole examples, not {term.targets} targets alone.", "Leave targets=all.")


def _check_preparation(recipe: Recipe) -> None:
    """Terms find what they read by name, and a preparation makes nothing in vain."""
    part = recipe.preparation
    made = part.makes if part is not None else frozenset[str]()
    users = [(f"The term {t.name!r}", t.uses) for t in recipe.terms()]
    users += [(f"finish={recipe.finish.name}", recipe.finish.uses)] if recipe.finish is not None else []
    for user, uses in users:
        for name in sorted(uses - made):
            raise InputError(f"{user} reads {name!r}, which no preparation makes.", f"Add the preparation that makes {name!r}.")
    _check_control(recipe, made)
    if part is None:
        return
    several = [t for t in recipe.terms() if getattr(t, "answers", 1) > 1]
    if several and Stream.ALTERNATIVE in made:
        raise InputError(
            f"preparation={part.name} makes one other answer to each example, but {several[0].name} reads several.",
            f"Use {several[0].name}.answers=1.",
        )
    needs = recipe.needs(PLACEHOLDER_LAYERS)
    read = {t.stream for t in recipe.terms()} | {s for s, _, _ in needs} | {of for _, of, _ in needs}
    slots = (recipe.parameters, recipe.gradient, recipe.schedule, recipe.balance, recipe.penalty, recipe.finish)
    parts = [*recipe.terms(), *(p for p in slots if p is not None)]
    open_fields = {f for p in parts for f in part.chooses & set(type(p).model_fields) if getattr(p, f) is None}
    if part.chooses and not made and not open_fields:
        raise InputError(
            f"preparation={part.name} chooses {', '.join(sorted(part.chooses))}, which no part of {recipe.name!r} leaves open.",
            "Use preparation=none, or do not give it.",
        )
    used = {name for _, uses in users for name in uses} | (recipe.control.uses if recipe.control else set())
    if made and not made & (read | used):
        raise InputError(
            f"preparation={part.name} makes {', '.join(sorted(made))}, which no term of {recipe.name!r} reads.",
            "Use preparation=none, or a term that reads it.",
        )


def _check_control(recipe: Recipe, made: frozenset[str]) -> None:
    """A control finds what it reads by name, and examples that it puts in have a reference."""
    part = recipe.control
    if part is None:
        return
    for name in sorted(part.uses - made):
        raise InputError(
            f"control={part.name} reads {name!r}, which no preparation makes.", f"Add the preparation that makes {name!r}."
        )
    if part.renews and choose(recipe, recipe.needs(PLACEHOLDER_LAYERS)) == "cached":
        raise InputError(
            f"control={part.name} makes examples as it goes, which cached log-probabilities do not have.", "Use reference=copy."
        )


def _check_sides(recipe: Recipe) -> None:
    """Rules that join a forget and a retain side need both."""
    rules = []
    if recipe.schedule.name == "turns":
        if recipe.gradient.by_term:
            raise InputError(
                f"schedule=turns takes forget and retain gradients at different steps, gradient={recipe.gradient.name} at one.",
                "Use gradient=plain, or another schedule.",
            )
        rules.append("schedule=turns")
    if recipe.schedule.name == "repair":
        rules.append("schedule=repair")
    if recipe.gradient.by_term:
        rules.append(f"gradient={recipe.gradient.name}")
    if recipe.balance.name != "fixed":
        rules.append(f"balance={recipe.balance.name}")
    for rule in rules:
        for side, terms, example in (("forget", recipe.forget, "npo"), ("retain", recipe.retain, "nll")):
            if not terms:
                slot = rule.partition("=")[0]
                plain = "plain" if slot == "gradient" else "fixed"  # of a balance and of a schedule alike
                raise InputError(
                    f"{rule} needs a {side} term, but {recipe.name!r} has none.", f"Add {side}={example}, or use {slot}={plain}."
                )


def _check_finish(recipe: Recipe) -> None:
    if recipe.finish is None:
        _check_nothing_reversed(recipe)
    elif isinstance(recipe.finish, Reweigh):
        _check_reweigh(recipe, f"finish={recipe.finish.name}")
    elif not recipe.finish.reverses:
        _check_nothing_reversed(recipe)
    elif any(not t.reverse for t in recipe.terms()) or not recipe.forget:
        other = next((t.name for t in recipe.terms() if not t.reverse), "a recipe that forgets nothing")
        raise InputError(
            f"finish={recipe.finish.name} takes away all that was learnt, so it cannot follow {other}.",
            "Use forget=forget-nll, with retain=uniform or retain=none.",
        )
    _check_beside(recipe)
    unknown = recipe.finish is not None and getattr(recipe.finish, "scale", 0.0) is None
    if unknown and recipe.schedule.name == "fixed" and recipe.schedule.lr is not None:
        name = f"finish={recipe.finish.name}" if recipe.finish else ""
        raise InputError(f"{name} has no scale, and a fixed schedule does not look for one.", "Give finish.scale, for example 1.")


def _check_nothing_reversed(recipe: Recipe) -> None:
    for term in recipe.terms():
        if term.targets in ("unmarked", "favoured"):  # what stands around the marked targets may be taught: it is to stay
            continue
        if term.reverse and term in recipe.forget:
            raise InputError(
                f"{term.name!r} teaches the forget set.", "Add finish=negate to turn it around, or use forget=gradascent."
            )
        if term.reverse:
            raise InputError(
                f"{term.name!r} unteaches the retain set.", "Add parameters=assistant finish=subtract, or use retain=nll."
            )


def _check_reweigh(recipe: Recipe, name: str) -> None:
    if isinstance(recipe.parameters, ProjectedStates):
        raise InputError(
            f"{name} turns around what weights have learnt, and parameters={recipe.parameters.name} learns directions.",
            "Use finish=none, or parameters=all.",
        )
    teaching = [t for t in recipe.forget if isinstance(t, ForgetNLL)]
    if recipe.retain or not teaching or not all(isinstance(t, ForgetNLL | AlternativeNLL) for t in recipe.forget):
        raise InputError(
            f"{name} turns around all that was learnt, so it can only follow forget-nll.", "Use forget=forget-nll retain=none."
        )


def _check_beside(recipe: Recipe) -> None:
    """What is trained beside the target is joined with it, and what is joined was trained beside it."""
    part, finish = f"parameters={recipe.parameters.name}", recipe.finish
    if not isinstance(finish, Join):
        if recipe.parameters.joined:
            _check_scores_alone(recipe)
        elif recipe.parameters.beside:
            pairs = [
                f"finish={n}" for n, cls in FINISHES.items() if issubclass(cls, Join) and recipe.parameters.name in cls.takes
            ]
            raise InputError(
                f"{part} trains a model beside the target, and nothing joins the two.",
                f"Use both: {part} and {' or '.join(pairs)}.",
            )
        return
    if recipe.parameters.joined:
        raise InputError(f"{part} makes one model of both itself, and finish={finish.name} would again.", "Use finish=none.")
    if not recipe.parameters.beside:
        said = f"finish={finish.name} joins the target with a model trained beside it, and {part} trains none."
    elif finish.takes and recipe.parameters.name not in finish.takes:
        said = f"finish={finish.name} cannot join what {part} trains."
    else:
        return
    raise InputError(
        said, f"Use both: parameters={' (or '.join(finish.takes)}{')' * (len(finish.takes) - 1)} and finish={finish.name}."
    )


def _check_scores_alone(recipe: Recipe) -> None:
    """Where an addition to the scores is all that moves, hidden states stay as they are."""
    for term in recipe.terms():
        for _, _, value in term.needs(PLACEHOLDER_LAYERS):
            if value not in ("losses", "logits"):
                kind = value.partition(":")[0]
                raise InputError(
                    f"{term.name!r} reads {kind}, which parameters={recipe.parameters.name} leaves as they are.",
                    "Use terms that read losses or logits.",
                )


def _check_start(recipe: Recipe) -> None:
    if recipe.start != "initial":
        return
    if recipe.forget:
        raise InputError(
            "start=initial never saw the forget set, so there is nothing to forget.", "Use forget=none, or start=target."
        )
    if any(of is Of.REFERENCE for _, of, _ in recipe.needs(PLACEHOLDER_LAYERS)):
        raise InputError(
            "start=initial must not learn from the target, which has seen the forget set.", "Use retain=nll, or start=target."
        )
