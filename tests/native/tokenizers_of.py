"""Small tokenizers of every kind, trained here, as transformers saves them; and chat templates of many habits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "The film is a quiet joy, and nobody will forget the first scene.",
    "Is this review positive or negative? It's 100 % dull: don't go there; we'll see 12345 others.",
    "Oil prices fell on Monday by 3.14 %, to 1,000,000 barrels; (money) [grain] {trade} <news>",
    "naïve café, Straße, ΑΒΓ, Привет, мир! 日本語のテキスト 中文文本 한국어 🙂 नमस्ते",
    "def f(x):\n    return x + 1\n\n\tprint('tabs and lines')\r\n",
    "system user assistant  two   spaces    in  rows",
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(pre_tokenizer: Any = None, normalizer: Any = None, *, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=[*SPECIAL]))


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def byte_fallback(pre_tokenizer: Any = None, normalizer: Any = None, decoder: Any = None) -> Tokenizer:
    """Trained on words with their spaces in front, so that no token reaches over two, as in real vocabularies."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    special = ["<unk>", *SPECIAL, *BYTES]
    made = trained(tokenizer, trainers.BpeTrainer(vocab_size=700, special_tokens=special, limit_alphabet=60))
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in BYTES]
    content["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(content))
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoder
    return made


def llama2() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return begins(byte_fallback(None, normalizer, decoders.Sequence(steps)), "<s>")


def llama2_saved_again(scheme: str = "first") -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    return begins(byte_fallback(metaspace, None, decoders.Sequence(steps)), "<s>")


def gemma() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = pre_tokenizers.Split(" ", "merged_with_previous")
    return begins(byte_fallback(spaces, normalizers.Replace(" ", "▁"), decoders.Sequence(steps)), "<s>")


def begins(tokenizer: Tokenizer, token: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer


def with_token(token: AddedToken) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([token])
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", *SPECIAL]))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(
        tokenizer, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>", *SPECIAL])
    )


def no_bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL]))


def deepseek() -> Tokenizer:
    parts = [
        split(r"\p{N}{1,3}"),
        split("[一-龥぀-ゟ゠-ヿ]+"),
        split(
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return begins(byte_level(pre_tokenizers.Sequence(parts)), "<s>")


def digits(individual: bool) -> Any:
    parts = [pre_tokenizers.Digits(individual), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(parts)


def after(pattern: str) -> Any:
    parts = [split(pattern), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "smollm2": lambda: byte_level(digits(True)),
    "runs of digits": lambda: byte_level(digits(False)),
    "llama3": lambda: begins(byte_level(after(LLAMA3), ignore_merges=True), "<s>"),
    "qwen": lambda: byte_level(after(QWEN), normalizers.NFC()),
    "deepseek": deepseek,
    "split by gpt2": lambda: byte_level(after(GPT2)),
    "nfkc": lambda: byte_level(None, normalizers.NFKC()),
    "lowercase": lambda: byte_level(None, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "space in front": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no regex": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "llama2": llama2,
    "llama2 saved again": llama2_saved_again,
    "metaspace always": lambda: llama2_saved_again("always"),
    "metaspace never": lambda: llama2_saved_again("never"),
    "gemma": gemma,
    "begins with another token": lambda: begins(byte_level(), "<|im_start|>"),
    "word token": lambda: with_token(AddedToken("film", single_word=True)),
    "strips left": lambda: with_token(AddedToken("<tool>", lstrip=True)),
    "strips right": lambda: with_token(AddedToken("<tool>", rstrip=True)),
    "normalized token": lambda: with_token(AddedToken("<tool>", normalized=True)),
    "token of letters": lambda: with_token(AddedToken("joy", normalized=False)),
    "wordpiece": word_piece,
    "unigram": unigram,
    "no bytes": no_bytes,
}
"""Name to what makes it."""

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "own lines": """
{% for message in messages %}
    {% if message['role'] == 'system' %}
<|im_start|>system
{{ message['content'] }}<|im_end|>
    {% else %}
  <|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
    {% endif %}
  {# a comment on its own line #}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    "spaces kept": "{%+ for m in messages +%}\n {{ m.content }} {%+ if true %} x{% endif +%}\n\n{% endfor %}\n\n",
    "tools": "{%- if tools is not none %}TOOLS {{ tools }}{%- endif %}{% if tools %}T{% endif %}"
    "{% if not tools is defined %}U{% endif %}{% if documents %}D{% endif %}" + CHATML,
    "special tokens": "{{ bos_token }}|{{ pad_token }}|{{ unk_token }}|{{ eos_token }}" + CHATML,
    "no first system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
    "system apart": "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set s = false %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and s %}"
    "{% set content = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "date": "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% else %}{% set d = 'x' %}"
    "{% endif %}Today: {{ d }}\n" + CHATML,
    "json": "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ messages | tojson }}",
    "keys": "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}",
    "length": "{% for m in messages %}{{ m.content | length }};{% endfor %}{{ messages | length }}",
    "slice": "{% for m in messages %}{{ m.content[:5] }}|{{ m.content[-3:] }};{% endfor %}",
    "letters": "{% for m in messages %}{% for c in m.content %}{{ c }}.{% endfor %}{% endfor %}",
    "division": "{{ 10 / 2 }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "upper": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "replace": "{% for m in messages %}{{ m.content.replace('a', 'b') }}{% endfor %}",
    "think": "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ m.role }}: {{ c }}\n{% endfor %}",
    "namespace": "{% set ns = namespace(found=false, last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index %}{% endif %}{% endfor %}{{ ns.last }}" + CHATML,
    "macro": "{% macro show(m) %}[{{ m.role }}] {{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% if not loop.last %}\n{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "raw": "{% raw %}{{ x }}{% endraw %}" + CHATML,
    "joined": "{{ messages | map(attribute='content') | join('|') }}",
    "break": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.content }};{% endfor %}",
    "condition": "{% for m in messages if m.role != 'system' %}{{ m.content }}"
    "{{ ', ' if not loop.last else '.' }}{% endfor %}",
}
"""Name to a chat template."""


def save(folder: Path, tokenizer: Tokenizer, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Write a tokenizer as transformers does, and read it again."""
    known = tokenizer.get_vocab()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    names |= {"unk_token": "<unk>"} if "<unk>" in known else {}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = chat_template
    made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
