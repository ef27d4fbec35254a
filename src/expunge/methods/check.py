"""Whether the parts of a recipe work together, found out before anything is trained."""

from __future__ import annotations

from expunge.core.access import Of, Stream
from expunge.core.errors import InputError
from expunge.engine.parts import Recipe
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


def _check_preparation(recipe: Recipe) -> None:
    """Terms find what they read by name, and a preparation makes nothing in vain."""
    part = recipe.preparation
    made = part.makes if part is not None else frozenset[str]()
    for term in recipe.terms():
        for name in sorted(term.uses - made):
            raise InputError(
                f"The term {term.name!r} reads {name!r}, which no preparation makes.", f"Add the preparation that makes {name!r}."
            )
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
    if not made & (read | {name for t in recipe.terms() for name in t.uses}):
        raise InputError(
            f"preparation={part.name} makes {', '.join(sorted(made))}, which no term of {recipe.name!r} reads.",
            "Use preparation=none, or a term that reads it.",
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
    teaching = [t for t in recipe.forget if isinstance(t, ForgetNLL)]
    if recipe.finish is None:
        if teaching:
            raise InputError(
                "'forget-nll' teaches the forget set.", "Add finish=negate to turn it around, or use forget=gradascent."
            )
        return
    name = f"finish={recipe.finish.name}"
    if recipe.retain or not teaching or not all(isinstance(t, ForgetNLL | AlternativeNLL) for t in recipe.forget):
        raise InputError(
            f"{name} turns around all that was learnt, so it can only follow forget-nll.", "Use forget=forget-nll retain=none."
        )
    if recipe.schedule.name == "fixed" and getattr(recipe.finish, "scale", 0.0) is None:
        raise InputError(f"{name} has no scale, and a fixed schedule does not look for one.", "Give finish.scale, for example 1.")


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
