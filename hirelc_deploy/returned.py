"""In: the records of finished jobs. Out: what Python's calls return."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hirelc_deploy.deliver.read import load
from hirelc_deploy.jobs.inspect import inspection_text
from hirelc_deploy.outcome import Outcome, outcome_from_dict
from hirelc_deploy.plan import CompressionPlan
from hirelc_deploy.results.layer_text import why_text
from hirelc_deploy.results.summary import family_summary, summary
from hirelc_deploy.runs import PARETO, RESULT


@dataclass(frozen=True)
class Result:
    """A finished job.

    Attributes:
        directory: The run: journal, bundle, report.
        record: Everything that was found, as in its result.json.
    """

    directory: Path
    record: Mapping[str, Any] = field(repr=False)

    @property
    def bundle(self) -> Path:
        """The folder to deploy."""
        return self.directory / "bundle"

    @property
    def report(self) -> Path:
        """One HTML file."""
        return self.directory / "report.html"

    @property
    def front(self) -> list[tuple[CompressionPlan, Outcome]]:
        """The recovered plans that no other one beats in time and divergence; empty after `apply`."""
        path = self.directory / PARETO
        if not path.is_file():
            return []
        fronts = json.loads(path.read_text("utf-8"))["fronts"]
        return [
            (CompressionPlan.from_dict(item["plan"]), outcome_from_dict(item["outcome"]))
            for item in fronts.get("F3", [])
        ]

    @property
    def summary(self) -> str:
        """What a person wants to know first."""
        return summary(self.record, self.directory)

    def model(self, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
        """Return the cut float model; see `load`."""
        return load(self.bundle, factory)

    def __str__(self) -> str:
        """Return the summary."""
        return self.summary

    def _repr_html_(self) -> str:
        """Return the report, framed, for notebooks."""
        import html

        page = html.escape(self.report.read_text("utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:640px;border:0"></iframe>'


@dataclass(frozen=True)
class Family:
    """Finished searches at several limits.

    Attributes:
        directory: It holds a run for each of the limits, and the page.
        record: As in its family.json.
    """

    directory: Path
    record: Mapping[str, Any] = field(repr=False)

    @property
    def results(self) -> Mapping[str, Result]:
        """What was found, by what tells the limits apart, such as `speedup-4`; in the order in which they were given.

        Those that nothing keeps are not among them.
        """
        return {
            member["name"]: Result(Path(member["run"]), json.loads((Path(member["run"]) / RESULT).read_text("utf-8")))
            for member in self.record["members"]
            if not member["missed"]
        }

    @property
    def missed(self) -> Mapping[str, str]:
        """Limits that nothing keeps, and why."""
        return {member["name"]: member["missed"] for member in self.record["members"] if member["missed"]}

    @property
    def page(self) -> Path:
        """One HTML file with the curve."""
        return self.directory / "family.html"

    def __str__(self) -> str:
        """Return a line for each of the limits."""
        return family_summary(self.record, self.page)


@dataclass(frozen=True)
class Inspection:
    """What a model consists of.

    Attributes:
        record: `units`, `kept_whole`, `blocks`, `params`, `macs`, `matched`, and `verdict` where it was asked for; as
            `inspect --json` prints them.
    """

    record: Mapping[str, Any]

    @property
    def units(self) -> Sequence[Mapping[str, Any]]:
        """What can be cut, with sizes and costs."""
        units: Sequence[Mapping[str, Any]] = self.record["units"]
        return units

    @property
    def foretold(self) -> Sequence[Mapping[str, Any]]:
        """What INT8, bf16, cutting and other runtimes can bring, by pieces; empty without `verdict=True`."""
        found: Sequence[Mapping[str, Any]] = self.record.get("verdict", {}).get("foretold", [])
        return found

    def __str__(self) -> str:
        """Return what `inspect` prints."""
        return inspection_text(self.record)


@dataclass(frozen=True)
class Why:
    """Which layers of an integer file lost what, and what would help.

    Attributes:
        record: As `why --json` prints it.
    """

    record: Mapping[str, Any] = field(repr=False)

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        """Every layer, those whose rounding costs most first."""
        layers: Sequence[Mapping[str, Any]] = self.record["layers"]
        return layers

    @property
    def options(self) -> str:
        """What is added to the command of the run, to make all suggested changes; empty where none surely helps."""
        together = self.record["together"]
        return str(together["how"]) if together else ""

    def __str__(self) -> str:
        """Return what `why` prints."""
        return why_text(self.record)
