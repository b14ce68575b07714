"""The command that a report gives compares as much once more."""

from __future__ import annotations

import shlex

import pytest

from iapt_export.cli import main
from tests.bundles import TinyBuild
from validation import validate
from validation.judging.compare import Settings

SETTINGS = {
    "all of it": Settings(depth="full"),
    "quick": Settings(7, 5, depth="quick", peft_check=False, adapters=("a name=/a folder/it's", "other")),
    "one case": Settings(depth="full", case="prompts"),
    "in another runtime": Settings(depth="full", runner="openvino"),
    "on a GPU": Settings(depth="full", device="cuda"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_the_command_of_a_report_asks_for_the_same(
    settings: Settings, tiny_build: TinyBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Settings] = []

    class SeenError(Exception):
        pass

    def seen(bundle: object, manifest: object, backbone: object, settings: Settings, *given: object) -> None:
        asked.append(settings)
        raise SeenError

    monkeypatch.setattr(validate, "validate_bundle", seen)
    monkeypatch.setattr(validate, "compared_targets", lambda *_: [])  # no runtime and no device has to be here
    monkeypatch.chdir(tiny_build.bundle.parent)
    program, *words = shlex.split(validate.command_again(tiny_build.bundle.name, str(tiny_build.model), settings))
    assert program == "iapt-export"
    with pytest.raises(SeenError):
        main(words)
    assert asked == [settings]
