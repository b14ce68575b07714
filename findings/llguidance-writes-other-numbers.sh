#!/usr/bin/env bash
# llguidance makes an answer of a JSON schema whose number is another one than the schema fixes: it reads every number in
# 64-bit floating point, and not always to the nearest.
#
# Expected: {"const": N} lets N through and nothing else, or is refused, as the schema's other keywords are that cannot be
# carried out. JSON Schema compares numbers by their mathematical value.
# Seen in llguidance 1.9.1: {"const": 9007199254740993} lets ...992 through and not ...993; of the two ids
# 1234567890123456789 and ...790 in an enum neither can be written, but ...768 can. Fractions of 12 digits and more with
# small powers of ten (1.23456789012e-12) often come out a digit apart. Whole numbers up to 2^53 and short fractions are
# written as they are. Nothing is said: the grammar compiles, and the answer ends as usual.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet llguidance==1.9.1 numpy
cat > "$folder/run.py" <<'PYTHON'
import json
import random
from decimal import Decimal

import numpy as np
from llguidance import LLMatcher, LLTokenizer, grammar_from
from llguidance import numpy as masks

TOKENIZER = LLTokenizer("byte")


def answer(schema):
    """The first text that the grammar lets through, byte by byte."""
    matcher = LLMatcher(TOKENIZER, grammar_from("json_schema", json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    mask, text = masks.allocate_token_bitmask(1, TOKENIZER.vocab_size), b""
    while not matcher.is_stopped() and len(text) < 300:
        masks.fill_next_token_bitmask(matcher, mask)
        logits = np.zeros((1, TOKENIZER.vocab_size), np.float32)
        masks.apply_token_bitmask_inplace(logits, mask)
        token = int(logits[0].argmax())
        matcher.consume_token(token)
        text += TOKENIZER.decode_bytes([token]) if token != TOKENIZER.eos_token else b""
    return text.decode()


def takes(schema, text):
    matcher = LLMatcher(TOKENIZER, grammar_from("json_schema", json.dumps(schema)))
    return matcher.validate_tokens(list(text.encode())) == len(text)


print("2^53:", answer({"const": 2**53}), "2^53 + 1:", answer({"const": 2**53 + 1}))
ids = [1234567890123456789, 1234567890123456790]
print("ids:", [takes({"enum": ids}, str(number)) for number in ids], "other:", takes({"enum": ids}, str(ids[0] - 21)))
draw, other = random.Random(0), {}
for digits in (3, 15):
    texts = [f"{draw.uniform(1, 10):.{digits - 1}f}e-{draw.randint(12, 15)}" for _ in range(200)]
    other[digits] = sum(Decimal(answer({"const": float(text)})) != Decimal(text) for text in texts)
print("fractions that came out as others: of 3 digits", other[3], "of 15 digits", other[15] > 20)
PYTHON
said=$("$folder/env/bin/python" "$folder/run.py")
echo "$said"
wanted="2^53: 9007199254740992 2^53 + 1: 9007199254740992
ids: [False, False] other: True
fractions that came out as others: of 3 digits 0 of 15 digits True"
if [ "$said" = "$wanted" ]; then echo "as described"; else echo "this has changed"; exit 1; fi
