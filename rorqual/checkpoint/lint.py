"""`rorqual lint`: whether a V3-shaped checkpoint is right, for whom it is not, and what to do.

Most faults of a checkpoint are silent. A save leaves out one key and the router becomes another function; a block left over
in config.json turns plain weights into noise; and a file that one engine reads rightly makes another abort. Each such
trap is one row of `RULES`: an id that stays, a severity, the engines it bites, and a small function that says what is
wrong *here* with its numbers. Where a change of config.json is the cure, the row has that too.

Severity follows what happens. error: somebody computes something else, or cannot load. warning: it is right, but an
engine refuses it, or loses precision or speed. note: worth knowing. Rules that need what cannot be read are left out,
so a missing shard is reported once and not as thousands of missing tensors.

Only headers are read, and the values of quantisation scales; a checkpoint of hundreds of gigabytes takes seconds.

Left out: whether the weights are *good* (`rorqual verify` compares logits), and remote code.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.checkpoint import lint_config, lint_quant, lint_rope, lint_side, lint_weights
from rorqual.checkpoint.lint_subject import ENGINES, SEVERITIES, Config, Rule, Severity, Subject, open_subject
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError

FIXED = "config.fixed.json"


def _refused(s: Subject) -> str | None:
    """The safety net: what `ModelConfig` refuses and no finer rule told."""
    known = {"model_type", "rope_parameters", *(f.name for f in dataclasses.fields(ModelConfig))} - {"extra"}
    try:
        ModelConfig.from_released({k: v for k, v in s.raw.items() if k in known})
    except ConfigError as error:
        return str(error.args[0]).removeprefix("config.json: ")
    return None


REFUSED = Rule(
    "config-refused", "error", ("rorqual",), "rorqual refuses this configuration", "see the message", "config", _refused
)
RULES: tuple[Rule, ...] = (
    *lint_config.RULES, *lint_rope.RULES, *lint_weights.RULES, *lint_quant.RULES, *lint_side.RULES, REFUSED,
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A rule that fired, and what it found."""

    id: str
    severity: Severity
    engines: tuple[str, ...]
    found: str
    wrong: str
    fix: str
    repairable: bool

    def affects(self, engine: str | None) -> bool:
        return engine is None or engine in self.engines


@dataclass(frozen=True)
class Report:
    """What a directory was found to be. Findings are sorted by severity, then in the order of the rules."""

    subject: Subject
    findings: tuple[Finding, ...]

    @property
    def ids(self) -> list[str]:
        return [finding.id for finding in self.findings]

    def for_engine(self, engine: str | None) -> Report:
        return Report(self.subject, tuple(f for f in self.findings if f.affects(engine)))

    def count(self, severity: str) -> int:
        return sum(f.severity == severity for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.subject.directory),
            "shards": len(self.subject.files),
            "tensors": len(self.subject.entries),
            "counts": {f"{severity}s": self.count(severity) for severity in SEVERITIES},
            "findings": [{**dataclasses.asdict(f), "engines": list(f.engines)} for f in self.findings],
        }


def lint(directory: str | Path, progress: Callable[[int], None] | None = None) -> Report:
    """Check a model directory. `progress` is told how many shards are read. Raises CheckpointError if there is none."""
    return check(open_subject(Path(directory), progress))


def check(subject: Subject, rules: Sequence[Rule] = RULES) -> Report:
    findings: list[Finding] = []
    told = False  # whether a finer rule says what rorqual would refuse
    for rule in rules:
        if not subject.has(rule.needs):
            continue
        if rule is REFUSED and told:
            continue
        if (found := rule.check(subject)) is not None:
            facts = (rule.id, rule.severity, rule.engines, found, rule.wrong, rule.fix)
            findings.append(Finding(*facts, repairable=rule.repair is not None))
            told |= rule.needs in ("config", "sizes") and rule.severity == "error" and "rorqual" in rule.engines
    findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    return Report(subject, tuple(findings))


def fix(report: Report) -> tuple[Config, list[str], Report]:
    """(mended config, ids of the rules that no longer fire, what is left). Unknown keys are kept; nothing is written."""
    by_id = {rule.id: rule for rule in RULES}
    subject = report.subject
    for finding in report.findings:
        repair = by_id[finding.id].repair
        if repair is not None:
            raw = copy.deepcopy(subject.raw)
            repair(raw, subject)
            subject = with_config(subject, raw)
    if subject.raw == report.subject.raw:
        return subject.raw, [], report
    # What a change of config cannot touch need not be looked at again: scales take the longest.
    kept = [f for f in report.findings if by_id[f.id].repair is None and by_id[f.id].needs in ("nothing", "headers")]
    again = [rule for rule in RULES if rule.repair is not None or rule.needs not in ("nothing", "headers")]
    findings = sorted([*check(subject, again).findings, *kept], key=lambda f: SEVERITIES.index(f.severity))
    after = Report(subject, tuple(findings))
    return subject.raw, [f.id for f in report.findings if f.id not in after.ids], after


def with_config(subject: Subject, raw: Config) -> Subject:
    """The same directory under another config."""
    return dataclasses.replace(subject, raw=raw)


def write_config(config: Config, path: Path) -> None:
    """Whole or not at all. Raises CheckpointError where it cannot be written."""
    building = path.with_name(f".{path.name}.writing")
    try:
        with building.open("w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)
    except OSError as error:
        building.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}", remedy="choose another --fix-to file") from None


__all__ = ["ENGINES", "FIXED", "RULES", "Finding", "Report", "check", "fix", "lint", "with_config", "write_config"]
