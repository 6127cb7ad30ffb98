"""Lightning Fabric: `with watch(fabric, model, optimizer) as monitor:` around the loop."""

from __future__ import annotations

from isograd.integrations.prepared import Watch

try:
    from lightning.fabric import Fabric
except ImportError:
    raise ImportError("this needs Lightning: pip install 'isograd[lightning]'") from None

watch = Watch[Fabric](lambda fabric: [logger.log_metrics for logger in fabric.loggers])
"""Watches what `fabric.setup` returned; the fabric's loggers get the scalars."""
