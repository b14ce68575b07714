"""A chat template is code of the model's author: it is stopped where it does not end, and refused where it fails."""

from __future__ import annotations

import threading
import time

import pytest

from engines.serving import chat_template as module
from engines.serving.chat_template import ChatTemplate
from iapt_export.contract.errors import BundleError

TALK = [{"role": "user", "content": "hello"}]
ENDLESS = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"


def refusal(source: str) -> str:
    with pytest.raises(BundleError) as caught:
        ChatTemplate(source, {}).render(TALK)
    return str(caught.value)


def test_a_template_that_does_not_end_is_stopped_and_leaves_no_thread() -> None:
    began = time.process_time()
    assert "the bundle's chat template was stopped after 0.5 s of computing" in refusal(ENDLESS)
    assert time.process_time() - began < 2
    end = time.monotonic() + 10
    while any(thread.name == "iapt-template" for thread in threading.enumerate()):
        assert time.monotonic() < end, "its thread goes on"
        time.sleep(0.01)
    assert ChatTemplate("{{ messages[0].content }}", {}).render(TALK) == "hello"


def test_a_template_cannot_catch_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_SECONDS", 0.1)
    assert "was stopped after 0.1 s" in refusal("{% macro f() %}" + ENDLESS + "{% endmacro %}{{ f() }}{{ f() }}")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 1 / 0 }}", "the bundle's chat template failed: division by zero"),
        ("{{ messages[3].content.x }}", "the bundle's chat template failed: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the bundle's chat template failed: maximum recursion"),
        ("{{ raise_exception('no') }}", "the bundle's chat template failed: no"),
        ("{% for %}", "the bundle's chat template is not valid: "),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "the bundle's chat template is not valid: "),
        ("{% for i in range(90000) %}" + "x" * 200 + "{% endfor %}", "made 18000000 characters, expected at most"),
        ("{{ ''.__class__.__mro__ }}", "the bundle's chat template failed: access to attribute '__class__'"),
    ],
)
def test_a_template_that_fails_is_refused_in_words(source: str, text: str) -> None:
    assert text in refusal(source)
