"""``pytest --iapt-bundle DIR`` runs a bundle's comparison with PyTorch and shows each check as a test.

The plugin is found by its entry point where iapt-export is installed, and does nothing without the flag: it imports
nothing heavy before.

    pytest --iapt-bundle bundle                      # every case, tests of the current folder as well
    pytest --iapt-bundle bundle --iapt-quick -k decode
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flags."""
    group = parser.getgroup("iapt-export", "parity of a bundle with PyTorch")
    group.addoption("--iapt-bundle", metavar="DIR", help="run this bundle's comparison with PyTorch as tests")
    group.addoption("--iapt-model", metavar="M", help="where the bundle's backbone is now")
    group.addoption("--iapt-quick", action="store_true", help="few prompts, few tokens, no long cases")
    group.addoption("--iapt-case", metavar="NAME", help="this case alone")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Compare the bundle, and add a test for each check."""
    bundle = config.getoption("--iapt-bundle")
    if bundle:
        suite = BundleSuite.from_parent(session, name=str(bundle), path=Path(bundle))
        items.extend(suite.collect())


class BundleSuite(pytest.Collector):
    """A bundle, whose checks are tests."""

    def __init__(self, *, path: Path, **arguments: Any) -> None:
        super().__init__(nodeid=f"iapt-bundle {path}", **arguments)
        self.bundle = path

    def collect(self) -> Iterator[pytest.Item]:
        """Run the comparison once and give out its checks."""
        report = _compare(self.bundle, self.config)
        for target in report.targets:
            where = _where(target)
            for number, check in enumerate(target.checks):
                name = f"{target.name}:{target.dtype} {check.stage}: {check.fed} [{number}]"
                yield CheckItem.from_parent(self, name=name, check=check, where=where)
            if target.status not in ("pass", "fail"):
                name = f"{target.name}:{target.dtype} parity with PyTorch"
                yield CheckItem.from_parent(self, name=name, check=None, where=target.reason)


class CheckItem(pytest.Item):
    """One stage of one case held against its limits."""

    def __init__(self, *, check: Any, where: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.check = check
        self.where = where

    def runtest(self) -> None:
        """Fail where the check did, skip where nothing was run."""
        if self.check is None:
            pytest.skip(f"not run: {self.where}")
        self.user_properties += [(name, figure) for name, figure in self.check.measured.items()]
        if not self.check.passed:
            raise ParityFailure(self.check, self.where)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The figures and the place of the fault, not a stack trace of this plugin."""
        if isinstance(excinfo.value, ParityFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the test stands."""
        assert isinstance(self.parent, BundleSuite)
        return self.parent.bundle, None, self.name


class ParityFailure(Exception):  # noqa: N818
    """A check that does not hold."""

    def __init__(self, check: Any, where: str) -> None:
        limits = check.limits.items()
        figures = ", ".join(f"{name} {check.measured[name]:.3g}, allowed {limit:.3g}" for name, limit in limits)
        super().__init__("\n".join([f"{check.stage}, {check.fed}: {figures}", check.detail, where]))


def _compare(bundle: Path, config: pytest.Config) -> Any:
    from iapt_export.contract.errors import IaptError
    from iapt_export.contract.integrity import open_manifest
    from validation.judging.compare import Settings
    from validation.validate import loader_for, validate_bundle

    depth = "quick" if config.getoption("--iapt-quick") else "full"
    try:
        manifest = open_manifest(bundle, allow_unproven=True)
        name = config.getoption("--iapt-model") or manifest.backbone.name_or_path
        backbone = loader_for(manifest)(name, revision=manifest.backbone.revision)
        return validate_bundle(bundle, manifest, backbone, Settings(depth=depth, case=config.getoption("--iapt-case")))
    except IaptError as error:
        raise pytest.UsageError(f"--iapt-bundle {bundle}: {error}") from error


def _where(target: Any) -> str:
    from validation.reporting.summary import whereabouts

    return "" if target.bisection is None else "\n".join(whereabouts(target.bisection))
