"""A bundle that is moved or replaced beneath a session: the same answers, or a refusal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engines.serving.session import Request, Session
from iapt_export.contract.errors import BundleError
from tests.bundles import TinyBuild

ASKED = Request("alpha", "yes", max_new_tokens=6, ignore_eos=True)


@pytest.fixture
def bundle(tiny_build: TinyBuild, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_build.bundle, tmp_path / "bundle"))


def test_a_moved_bundle_answers_as_before(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under a relative path, from another folder."""
    monkeypatch.chdir(bundle.parent)
    with Session.open("bundle") as session, Session.open("bundle") as other:
        wanted = session.submit(ASKED).result()
        assert wanted.text and other.bundle == bundle
        monkeypatch.chdir("/")
        assert other.submit(ASKED).result() == wanted
        bundle.rename(tmp_path / "elsewhere")
        assert session.submit(ASKED).result() == wanted


@pytest.mark.parametrize("name", ["weights.data", "tokenizer.json", "manifest.json"])
def test_another_bundle_in_its_place_is_not_activated(bundle: Path, name: str) -> None:
    session = Session.open(bundle)
    with session:
        wanted = session.submit(ASKED).result()
    with session:
        assert session.submit(ASKED).result() == wanted, "it may be opened and closed as often as one likes"
    content = (bundle / name).read_bytes()
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"was changed after it was opened .{name}, at least.; open it again"):
        session.activate()
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match="was changed after it was opened"):
        session.activate()
    with Session.open(bundle) as again:
        assert again.submit(ASKED).result() == wanted


def test_a_tokenizer_is_read_from_the_bundle_that_was_opened(bundle: Path) -> None:
    with Session.open(bundle) as session:
        (bundle / "tokenizer.json").write_text("{}", encoding="utf-8")
        with pytest.raises(BundleError, match=r"was changed after it was opened .tokenizer.json"):
            session.submit(ASKED)
