"""Two tenants of one bundle answer in one batch: ``ask_two_tenants.py BUNDLE TENANT PROMPT TENANT PROMPT``."""

import sys

from engines.serving.session import Request, Session

if len(sys.argv) != 6:
    sys.exit("usage: ask_two_tenants.py BUNDLE TENANT PROMPT TENANT PROMPT")
bundle, *words = sys.argv[1:]
requests = [Request(tenant, prompt, max_new_tokens=8) for tenant, prompt in zip(words[::2], words[1::2], strict=True)]
answers = [""] * len(requests)
with Session.open(bundle) as session:
    for token in session.stream(requests):  # as each token comes, rows in turn
        answers[token.index] += token.text
for request, answer in zip(requests, answers, strict=True):
    print(f"{request.tenant}: {answer}")
