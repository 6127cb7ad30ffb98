"""The stable form of a diagnosis: JSON with a schema. docs/diagnosis.md explains it."""

from __future__ import annotations

import math

import msgspec

import isograd
from isograd.diagnosis import Diagnosis, Effect, Finding
from isograd.flow import Flow
from isograd.render import numbers
from isograd.statistics import Parameter

SCHEMA = 1
"""Raised when a field changes its meaning or goes; a new field does not raise it."""

Number = float | None
"""null: not measured, or not finite; strict JSON knows neither NaN nor Infinity."""


class BackboneSite(msgspec.Struct):
    """One site of the backbone, input first."""

    site: str
    kind: str
    module: str
    source: str
    depth: int
    gain: Number
    decades: Number
    grad_norm_log10: Number
    activation_rms: Number
    expected: Number
    branch_ratio: Number


class ExpectedReport(msgspec.Struct):
    """What theory expects of random weights of the sizes found, over the sites that it applies to."""

    decades: Number
    spread: Number
    measured: Number
    layers: int
    whole: bool


class EffectReport(msgspec.Struct):
    """What one intervention, tried on a copy, gave back."""

    intervention: str
    cause: str
    decades_before: Number
    decades_after: Number
    given_back: Number
    note: str


class FindingReport(msgspec.Struct):
    """One thing that is wrong."""

    code: str
    name: str
    severity: str
    message: str
    cause: str
    sites: list[str]
    evidence: dict[str, float | int | str | None]
    remedies: list[str]
    effects: list[EffectReport]


class ParameterReport(msgspec.Struct):
    """One parameter and its gradient."""

    name: str
    shape: list[int]
    state: str
    grad_norm_log10: Number
    weight_norm: Number
    zeros: Number
    nonfinite: int
    first_update: Number


class Report(msgspec.Struct):
    """A diagnosis of isograd."""

    schema: int
    version: str
    target: str
    verdict: str
    decades: Number
    sigma: Number
    layers: int
    expected: ExpectedReport | None
    loss: Number
    backbone: list[BackboneSite]
    findings: list[FindingReport]
    healthy: dict[str, str]
    unexamined: dict[str, str]
    parameters: list[ParameterReport]
    notes: list[str]


def to_json(diagnosis: Diagnosis) -> str:
    """The diagnosis as JSON, two spaces a level."""
    return msgspec.json.format(msgspec.json.encode(_report(diagnosis)), indent=2).decode() + "\n"


def schema() -> str:
    """The JSON schema (2020-12) of `to_json`, as docs/diagnosis.schema.json holds it."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | msgspec.json.schema(Report)
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n"


def _report(diagnosis: Diagnosis) -> Report:
    flow = diagnosis.flow
    return Report(
        schema=SCHEMA,
        version=isograd.__version__,
        target=diagnosis.target,
        verdict=diagnosis.verdict,
        decades=flow.decades,
        sigma=flow.sigma,
        layers=flow.layers,
        expected=_expected(flow),
        loss=flow.loss,
        backbone=_backbone(flow),
        findings=[_finding(finding) for finding in diagnosis.findings],
        healthy=diagnosis.healthy,
        unexamined=diagnosis.unexamined | flow.unexamined,
        parameters=[_parameter(parameter) for parameter in flow.parameters],
        notes=list(flow.notes),
    )


def _expected(flow: Flow) -> ExpectedReport | None:
    part = flow.expected.over(slice(1, len(flow.sites)))
    return part and ExpectedReport(part.decades, part.spread, part.measured, part.layers, part.whole)


def _backbone(flow: Flow) -> list[BackboneSite]:
    names = ("gain", "decades", "grad_norm_log10", "activation_rms")
    columns = [numbers.column(flow, name) for name in names]
    splits = [flow.splits.get(i) for i in range(len(flow.sites))]
    columns += [flow.expected.decades, [math.nan if s is None else s.forward_ratio for s in splits]]
    return [
        BackboneSite(site.name, site.kind, site.module, site.source, site.depth, *values)
        for site, *values in zip(flow.sites, *columns, strict=True)
    ]


def _finding(finding: Finding) -> FindingReport:
    return FindingReport(
        code=finding.code,
        name=finding.name,
        severity=finding.severity.name.lower(),
        message=finding.message,
        cause=finding.cause,
        sites=list(finding.sites),
        evidence=dict(finding.evidence),
        remedies=list(finding.remedies),
        effects=[_effect(effect) for effect in finding.effects],
    )


def _effect(effect: Effect) -> EffectReport:
    return EffectReport(
        effect.intervention,
        effect.cause,
        effect.decades_before,
        effect.decades_after,
        effect.given_back,
        effect.note,
    )


def _parameter(parameter: Parameter) -> ParameterReport:
    return ParameterReport(
        name=parameter.name,
        shape=list(parameter.shape),
        state=parameter.state,
        grad_norm_log10=parameter.grad_norm_log10,
        weight_norm=parameter.weight_norm,
        zeros=parameter.zeros,
        nonfinite=parameter.nonfinite,
        first_update=parameter.first_update,
    )
