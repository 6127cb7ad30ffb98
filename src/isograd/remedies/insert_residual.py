"""insert-residual: skip connections, h + f(h) / sqrt(L), around parts that lacked them.

What it does
    Cuts the backbone between input layer and head into the smallest parts that keep the signal's shape, such as a
    layer with its activation or a whole attention, and adds their input to their output. Where no part keeps the
    shape, the skip is a linear projection or a strided 1x1 convolution, drawn orthogonal. Branches are scaled by
    1/sqrt(L), L parts in all. Modules whose own skip is damped get a whole one around them, if they keep the shape.

When it helps
    A product of many Jacobians becomes a product of sums 1 + J: the gradient has a direct path. It cures almost any
    chain, batch normalisation without skips among them, and is therefore no sign that its absence was the fault.

Expected effect
    A gain of about sqrt(1 + chi / L) a part, within a factor exp(chi / 2) over any depth, where chi is what a part did
    to the squared norm before.

Safety
    Unsafe: the model computes another function.

References
    He et al. 2016, arXiv:1512.03385; Hanin and Rolnick 2018, arXiv:1803.01719; Hayou et al. 2021, arXiv:2010.12859, on
    1/sqrt(L).
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd import theory
from isograd.anatomy import Part, expected, in_words, keeps, parts, shared
from isograd.edit import Edit, Value
from isograd.graph.operations import ACTIVATIONS
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.symptoms.damped_skips import DAMPED

SLUG = "insert-residual"
TREATS = ("missing-residual", "batchnorm-without-skips", "VG101", "VG105", "VG107", "EG201")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Skips around every part that can have one."""
    flow, model = patient.flow, patient.model
    found = [part for part in parts(flow, model) if not _input_layer(part, patient)]
    outside = [part for part in found if _flattened_outside(part)]
    if outside:
        yield _in_calls(outside)
        return
    if flow.splits and len(found) < 2:
        yield _damped(patient) or not_applicable(
            SLUG, "the backbone has residual connections wherever it keeps its width"
        )
        return
    scale = len(found) ** -0.5 if found else 1.0
    edits = [*_modules(found, model_names(patient), scale), *_runs(found, model_names(patient), scale)]
    if not edits:
        yield not_applicable(
            SLUG, "no part between input layer and head keeps its shape or could be projected to it"
        )
        return
    chain = [layer for part in found for layer in part.layers]
    bare = any(part.run is None and part.place == part.layers[-1].place for part in found)
    decades, spread = expected(
        flow, [] if bare else chain, lambda layer: [theory.Residual(layer.operations(), scale=scale)]
    )
    skipped = [part for part in found if not part.keeps and _projection(part) is None]
    yield Prescription(
        SLUG,
        f"skip connections around {len(found) - len(skipped)} parts, branches scaled by {scale:.3g}",
        tuple(edits),
        reach=Reach.RESIDUAL,
        treats=TREATS,
        expected=in_words(decades, spread, len(found)),
        decades=decades,
        references=("He et al. 2016, arXiv:1512.03385", "Hayou et al. 2021, arXiv:2010.12859"),
        advice=tuple(
            f"{part.place}: no skip, {part.entered} -> {part.left} is no projection" for part in skipped
        ),
    )


def _in_calls(found: list[Part]) -> Prescription:
    """For activations called as functions: the calls are watched, and the line for the user's own hand is told."""
    layer, scale = found[0].layers[-1], len(found) ** -0.5
    site = next(s for s in layer.between if s.kind == "activation")
    options: dict[str, Value] = {"activation": site.operation, "scale": scale}
    return Prescription(
        SLUG,
        f"skip connections around {len(found)} layers and the {site.operation} called behind them",
        (Edit(shared(site.module, layer.place), "alter", "calls.skip_calls", options, source=site.source),),
        reach=Reach.RESIDUAL,
        treats=TREATS,
        expected=f"a gain of sqrt(1 + chi / {len(found)}) a layer",
        references=("He et al. 2016, arXiv:1512.03385",),
        advice=(f"by hand, {site.source}: h = h + {scale:.3g} * {site.operation}({layer.place}(h))",),
    )


def _damped(patient: Patient) -> Prescription | None:
    """Skips that are there and let too little by get a whole one around them."""
    splits, sites = patient.flow.splits, patient.flow.sites
    weak = sorted(d for d, split in splits.items() if split.skip < DAMPED and not split.projected)
    if not weak:
        return None
    skip = max(splits[depth].skip for depth in weak)
    modules = dict.fromkeys(sites[depth].module for depth in weak)
    places = [module for module in modules if keeps(patient.flow, module)]
    said = f"{len(weak)} of {len(splits)} skip connections let only {skip:.2g} of the signal by"
    source = sites[weak[0]].source or sites[weak[0]].place
    by_hand = f"by hand, {source}: x + branch(x), the skip not multiplied"
    if not places:
        return not_applicable(SLUG, said, by_hand)
    scale = len(places) ** -0.5
    return Prescription(
        SLUG,
        f"a whole skip around {len(places)} modules, scaled by {scale:.3g}: {said}",
        tuple(Edit(place, "wrap", "modules.Residual", {"scale": scale}) for place in places),
        reach=Reach.RESIDUAL,
        treats=TREATS,
        expected=f"a gain of sqrt(1 + chi / {len(places)}) a module",
        references=("He et al. 2016, arXiv:1512.03385",),
        advice=(by_hand,),
    )


def model_names(patient: Patient) -> dict[str, list[str]]:
    """Names of the children of every module, in their order."""
    return {name: list(dict(module.named_children())) for name, module in patient.model.named_modules()}


def _input_layer(part: Part, patient: Patient) -> bool:
    """Reads the data itself: what comes before it is no signal of the network's."""
    before = patient.flow.sites[: part.layers[0].index]
    return all(site.kind in ("input", "reshape") for site in before)


def _flattened_outside(part: Part) -> bool:
    """Its saturating activation is called outside of the part: a skip before it would not get round it."""
    last = part.layers[-1]
    known = ACTIVATIONS.get(last.activation)
    if known is None or not known.bounded or part.run is not None:
        return False
    site = next(s for s in last.between if s.kind == "activation")
    return not (site.module == part.place or site.module.startswith(f"{part.place}."))


def _projection(part: Part) -> dict[str, tuple[int, ...] | int] | None:
    """Arguments of the skip's projection; None: there is no linear map from one shape to the other."""
    if len(part.entered) != len(part.left):
        return None
    dims = part.layers[-1].dims
    if not dims:
        alike = part.entered[:-1] == part.left[:-1]
        return {"features": (part.entered[-1], part.left[-1])} if alike else None
    strides = {-(-a // b) for a, b in zip(part.entered[2:], part.left[2:], strict=True)}
    exact = all(-(-a // min(strides)) == b for a, b in zip(part.entered[2:], part.left[2:], strict=True))
    if len(strides) != 1 or not exact:
        return None
    return {"features": (part.entered[1], part.left[1]), "dims": dims, "stride": strides.pop()}


def _modules(found: list[Part], names: dict[str, list[str]], scale: float) -> Iterator[Edit]:
    """Parts that are one module."""
    for part in found:
        place = _single(part, names)
        projection = {} if part.keeps else _projection(part)
        if place is not None and projection is not None:
            yield Edit(place, "wrap", "modules.Residual", {"scale": scale, **projection})


def _runs(found: list[Part], names: dict[str, list[str]], scale: float) -> Iterator[Edit]:
    """Parts that are several children of an `nn.Sequential`: one edit for each container."""
    runs: dict[str, list[tuple[int, int]]] = {}
    for part in found:
        if part.keeps and part.run is not None and _single(part, names) is None:
            runs.setdefault(part.place, []).append(part.run)
    for place, spans in sorted(runs.items(), reverse=True):  # a container after what lies in it
        starts, stops = zip(*spans, strict=True)
        yield Edit(place, "wrap", "modules.Residuals", {"starts": starts, "stops": stops, "scale": scale})


def _single(part: Part, names: dict[str, list[str]]) -> str | None:
    if part.run is None:
        return part.place
    first, last = part.run
    if last - first > 1:
        return None
    return f"{part.place}.{names[part.place][first]}".lstrip(".")
