"""What a watched run sends reaches each logger: the real library, offline, values read back."""

from __future__ import annotations

import csv
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import isograd
from isograd.monitor.host import Sink
from isograd.monitor.reading import Reading
from isograd.sinks import tensorboard

STEPS = 3


def train(sink: Sink) -> list[Reading]:
    """A short training with this sink, and its readings."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    readings: list[Reading] = []
    with isograd.watch(model, optimizer, sinks=[sink]) as monitor:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 4)).square().mean()
            loss.backward()
            monitor.log(loss=loss)
            optimizer.step()
            readings.append(monitor.latest())
    return readings


def same(found: dict[int, float], readings: list[Reading], name: str) -> None:
    """Found values by step are those of the readings, as float32."""
    expected = {r.step: r.flat()[name] for r in readings}
    assert found.keys() == expected.keys()
    for step, value in expected.items():
        assert found[step] == pytest.approx(value, rel=1e-6)


NAMES = ("isograd/loss", "isograd/grad_norm", "isograd/grad_norm/0.weight")


def test_scalars_leave_out_what_was_not_measured_and_keep_what_is_not_finite() -> None:
    reading = Reading(
        0, ("a", "b"), {"grad_norm": torch.tensor([math.nan, math.inf])}, scalars={"loss": math.inf}
    )
    assert reading.flat() == {"isograd/loss": math.inf, "isograd/grad_norm/b": math.inf}
    assert reading.flat(prefix="", sites=False) == {"loss": math.inf}


def test_any_callable_is_a_sink() -> None:
    got: dict[int, dict[str, float]] = {}
    readings = train(lambda values, step: got.__setitem__(step, values))
    assert [got[r.step] for r in readings] == [r.flat() for r in readings]
    assert readings[0].scalars["loss"] > 0


def test_a_sink_that_fails_is_one_warning() -> None:
    def fails(values: dict[str, float], step: int) -> None:
        raise OSError("no network")

    with pytest.warns(UserWarning, match="no network") as told:
        readings = train(fails)
    assert len(readings) == STEPS
    assert len([w for w in told if "no network" in str(w.message)]) == 1


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    readings = train(tensorboard(writer))
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in NAMES:
        same({e.step: e.value for e in events.Scalars(name)}, readings, name)


def records(file: bytes) -> Iterator[bytes]:
    """Records of an offline run's file: a log of LevelDB's format behind a header of 7 bytes."""
    at, whole, block = 7, b"", 32 * 1024
    while at + 7 <= len(file):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", file, at + 4)
        whole += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(mode="offline", silent=True, console="off", disable_git=True)
    run = wandb.init(project="isograd", dir=str(tmp_path), settings=settings)
    readings = train(run.log)
    run.finish()
    wandb.teardown()  # its service writes the file
    from wandb.proto import wandb_internal_pb2

    found: dict[str, dict[int, float]] = {name: {} for name in NAMES}
    for data in records(next(tmp_path.rglob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        for name in NAMES:
            if name in row:
                found[name][record.history.step.num] = json.loads(row[name])
    for name in NAMES:
        same(found[name], readings, name)


def test_mlflow_in_sqlite(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    try:
        experiment = mlflow.create_experiment("isograd", artifact_location=str(tmp_path))
        with mlflow.start_run(experiment_id=experiment) as run:
            readings = train(mlflow.log_metrics)
        client = mlflow.MlflowClient()
        for name in NAMES:
            history = client.get_metric_history(run.info.run_id, name)
            same({m.step: m.value for m in history}, readings, name)
    finally:
        mlflow.set_tracking_uri(before)


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trackio.init(project="isograd", name="run", embed=False)
    readings = train(trackio.log)
    trackio.finish()
    rows = {row["step"]: row for row in SQLiteStorage.get_logs("isograd", "run")}
    for name in NAMES:
        same({step: row[name] for step, row in rows.items()}, readings, name)


def test_a_logger_of_lightning(tmp_path: Path) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(str(tmp_path))
    readings = train(logger.log_metrics)
    logger.finalize("success")
    with open(next(tmp_path.rglob("metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    for name in NAMES:
        same({int(row["step"]): float(row[name]) for row in rows}, readings, name)


def test_a_tracker_of_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("isograd")
    readings = train(lambda values, step: accelerator.log(values, step=step))
    accelerator.end_training()
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    for name in NAMES:
        same({e.step: e.value for e in events.Scalars(name)}, readings, name)
