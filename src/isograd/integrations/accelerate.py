"""Accelerate: `with watch(accelerator, model, optimizer) as monitor:` around the loop."""

from __future__ import annotations

from isograd.integrations.prepared import Watch

try:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]
except ImportError:
    raise ImportError("this needs Accelerate: pip install 'isograd[hf]'") from None

watch = Watch[Accelerator](
    lambda accelerator: (
        [lambda scalars, step: accelerator.log(scalars, step=step)] if accelerator.trackers else []
    )
)
"""Watches what `accelerator.prepare` returned; the accelerator's trackers get the scalars."""
