"""scale-embeddings: embeddings at the size that the stream expects.

What it does
    Draws embedding tables from N(0, 1 / width), so that a token's vector has norm 1, where their root mean square
    lies above 3 or below 1e-3; the rows of padding tokens stay zero. Learned vectors of your own modules, as
    positions, where it lies above 3. Where positions drown their tokens (UP504), also where it is ten times as loud
    as the quietest table.

When it helps
    Embeddings are the beginning of the residual stream. Far too large, they drown every branch in a pre-norm
    transformer and saturate what follows in any other; near zero, the first normalisation divides by almost
    nothing and the gradient of the embedding explodes. nn.Embedding's own N(0, 1) is large for a wide table
    whose weights are also the head's.

Expected effect
    The first normalisation multiplies the gradient by sqrt(width) at most.

Safety
    Unsafe: trained embeddings are lost. Frozen ones are left alone; tied ones change with the head.

References
    Radford et al. 2019 (GPT-2: N(0, 0.02)); Huang et al. 2020, T-Fixup; Takase et al. 2023, arXiv:2312.16903.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from isograd.edit import Edit
from isograd.layers import rms
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.symptoms import unnormalised_input

SLUG = "scale-embeddings"
TREATS = ("embedding", "VG101", "EG201", "EG202", "EG205")
FAR = (1e-3, 3.0)
"""Published models start between 0.006 and 1."""
BESIDE = 10.0
"""Times the quietest table, where it is drowned: less than what drowns it (`unnormalised_input.DROWNED`)."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Tables whose root mean square is far off."""
    edits: list[Edit] = []
    tables = _tables(patient.model)
    sizes = {name: rms(table.weight) for name, table in tables.items()}
    loud = FAR[1]
    if unnormalised_input.CODE in patient.told:
        loud = min(loud, max(BESIDE * min(sizes.values(), default=math.inf), unnormalised_input.LOUD))
    for name, table in tables.items():
        if not FAR[0] < sizes[name] < loud:
            place = f"{name}.weight".lstrip(".")
            edits.append(_drawn(place, sizes[name], table.embedding_dim))
            if table.padding_idx is not None:
                row = table.padding_idx
                edits.append(Edit(place, "fill", ".zero_", rows=(row, row + 1)))
    held = {id(table.weight) for table in tables.values()}
    edits += [_drawn(name, size, width) for name, size, width in _vectors(patient, held) if size >= loud]
    if not edits:
        yield not_applicable(SLUG, "no trainable embedding has a root mean square below 1e-3 or above 3")
        return
    yield Prescription(
        SLUG,
        f"{sum(e.rows is None for e in edits)} tables of embeddings drawn at norm 1",
        tuple(edits),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected="token vectors of norm 1",
        references=("Takase et al. 2023, arXiv:2312.16903",),
    )


def _tables(model: nn.Module) -> dict[str, nn.Embedding | nn.EmbeddingBag]:
    """Those that are trained, once each: encoder and decoder may share one."""
    found: dict[int, tuple[str, nn.Embedding | nn.EmbeddingBag]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight.requires_grad:
            found.setdefault(id(module.weight), (name, module))
    return dict(found.values())


def _drawn(place: str, size: float, width: int) -> Edit:
    std = float(f"{width**-0.5:.6g}")
    return Edit(place, "fill", "nn.init.normal_", {"std": std}, before=f"rms {size:.3g}")


def _vectors(patient: Patient, held: set[int]) -> Iterator[tuple[str, float, int]]:
    """Learned vectors that modules of the user's own hold, no layer multiplies by and nothing pads: place, size and width."""
    free = {p.name for p in patient.flow.parameters if not p.fan_in and not p.bias and len(p.shape) > 1}
    for path, module in patient.model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            listed = isinstance(module, nn.ParameterList | nn.ParameterDict)
            own = listed or not type(module).__module__.startswith("torch.nn")
            if own and name in free and id(parameter) not in held and parameter.requires_grad:
                yield name, rms(parameter), parameter.shape[-1]
