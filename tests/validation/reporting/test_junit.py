"""The JUnit file says what the report says, in the words of CI systems."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

from tests.bundles import NEW_TOKENS, TENANTS, TinyBuild, run
from tests.validation.fake_report import failing_report, passing_report
from tests.validation.sabotage import one_weight
from validation.reporting.junit import write_junit


def suites(path: Path) -> list[ElementTree.Element]:
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    return list(root)


def test_counts_and_failures(tmp_path: Path) -> None:
    report = failing_report()
    write_junit(report, tmp_path / "new" / "junit.xml")
    ran, checked = suites(tmp_path / "new" / "junit.xml")
    target = report.targets[0]
    assert (ran.get("tests"), ran.get("failures"), ran.get("skipped")) == (str(len(target.checks)), "2", "0")
    failed = [case for case in ran if case.find("failure") is not None]
    assert [case.get("name") for case in failed] == [
        "prefill cache: batch 8, mixed tenants, left padding, keys",
        "decode logits: batch 1, one row",
    ]
    failure = failed[0].find("failure")
    assert failure is not None and failure.get("message") == "relative 0.41, allowed 0.0001"
    assert checked.get("skipped") == "1"
    skipped = checked.find("testcase/skipped")
    assert skipped is not None and "not run: This machine has no NVIDIA GPU" in str(skipped.get("message"))


def test_hostile_text_stays_xml(tmp_path: Path) -> None:
    report = passing_report()
    check = dataclasses.replace(report.targets[0].checks[0], case='<a b="c">&\x00\ud800', passed=False)
    target = dataclasses.replace(report.targets[0], checks=[check])
    write_junit(dataclasses.replace(report, targets=[target]), tmp_path / "junit.xml")
    (suite,) = suites(tmp_path / "junit.xml")
    (case,) = suite.findall("testcase")
    assert case.get("name") == 'generator: <a b="c">&??'


def test_the_command_writes_it_also_when_it_fails(tiny_bundle: Path, tiny_build: TinyBuild, tmp_path: Path) -> None:
    from tests.bundles import rehash

    one_weight(tiny_bundle)
    rehash(tiny_bundle)
    junit = tmp_path / "junit.xml"
    outcome = run("validate", tiny_bundle, "--quick", "--quiet", f"--new-tokens={NEW_TOKENS}", f"--junit={junit}")
    assert outcome.code == 3
    assert "It starts at model.layers.1.mlp.down_proj.output, step 0: weight" in outcome.err
    assert "first difference: layer 1, model.layers.1.mlp.down_proj.output" in outcome.out
    for suite in suites(junit):
        assert int(suite.get("failures", 0)) > 3
        note = suite.findtext("system-out")
        assert note is not None and "1 of 1536 numbers differ" in note


def test_a_folder_that_is_missing_is_told_before_any_work(tiny_bundle: Path, tmp_path: Path) -> None:
    outcome = run("validate", tiny_bundle, f"--junit={tmp_path}/none/junit.xml")
    assert outcome.code == 1
    assert f"there is no folder {tmp_path}/none; make it first" in outcome.err
    assert "hashes" not in outcome.err and not (tmp_path / "none").exists()


def test_every_case_has_a_name_of_its_own_with_its_tenants(tiny_build: TinyBuild, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    outcome = run("validate", tiny_build.bundle, "--quick", "--quiet", "--new-tokens=4", f"--junit={junit}")
    assert outcome.code == 0
    cases = [case for suite in suites(junit) for case in suite.findall("testcase")]
    names = [(case.get("classname"), case.get("name")) for case in cases]
    assert len(names) > 40 and len(set(names)) == len(names)
    fed = [str(name) for _, name in names]
    assert all(any(f"({tenant}" in name or f", {tenant}" in name for tenant in TENANTS) for name in fed), fed
