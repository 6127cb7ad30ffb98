"""scale-embeddings: embeddings at the size that the stream expects.

What it does
    Draws embedding tables from N(0, 1 / width), so that a token's vector has norm 1, where their root mean square
    lies above 3 or below 1e-3; the rows of padding tokens stay zero. Learned vectors of your own modules, as
    positions, where it lies above 3.

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

from collections.abc import Iterator

from torch import nn

from isograd.edit import Edit
from isograd.layers import rms
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "scale-embeddings"
TREATS = ("embedding", "VG101", "EG201", "EG202", "EG205")
FAR = (1e-3, 3.0)
"""Published models start between 0.006 and 1."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Tables whose root mean square is far off."""
    edits: list[Edit] = []
    seen = set[int]()
    for name, module in patient.model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or not module.weight.requires_grad:
            continue
        if id(module.weight) in seen:  # encoder and decoder share one table
            continue
        seen.add(id(module.weight))
        size = rms(module.weight)
        if not FAR[0] < size < FAR[1]:
            std = float(f"{module.embedding_dim**-0.5:.6g}")
            place = f"{name}.weight".lstrip(".")
            edits.append(Edit(place, "fill", "nn.init.normal_", {"std": std}, before=f"rms {size:.3g}"))
            if module.padding_idx is not None:
                row = module.padding_idx
                edits.append(Edit(place, "fill", ".zero_", rows=(row, row + 1)))
    edits += _vectors(patient, seen)
    if not edits:
        yield not_applicable(SLUG, "no trainable embedding has a root mean square below 1e-3 or above 3")
        return
    yield Prescription(
        SLUG,
        f"{sum(e.rows is None for e in edits)} embedding tables of vectors drawn at norm 1",
        tuple(edits),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected="token vectors of norm 1",
        references=("Takase et al. 2023, arXiv:2312.16903",),
    )


def _vectors(patient: Patient, seen: set[int]) -> Iterator[Edit]:
    """Learned vectors that modules of the user's own hold, no layer multiplies by and nothing pads."""
    free = {p.name for p in patient.flow.parameters if not p.fan_in and not p.bias and len(p.shape) > 1}
    for path, module in patient.model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            own = not type(module).__module__.startswith("torch.nn")
            if own and name in free and id(parameter) not in seen and parameter.requires_grad:
                size = rms(parameter)
                if size >= FAR[1]:
                    std = float(f"{parameter.shape[-1] ** -0.5:.6g}")
                    yield Edit(name, "fill", "nn.init.normal_", {"std": std}, before=f"rms {size:.3g}")
