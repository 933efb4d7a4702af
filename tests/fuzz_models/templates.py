"""Chat templates as strangers write them: the valid one with its tokens changed, and bombs of every kind known."""

from __future__ import annotations

import re
from random import Random

# each exceeds a bound that the language itself has not: of time, which takes all of it, or another
SLOW_BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a list nested": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "a wide text": "{{ 'x' | center(10**9) }}",
    "much lorem": "{{ lipsum(10**7) }}",
}
QUICK_BOMBS = {
    "a text multiplied": "{{ 'a' * 10**10 }}",
    "a text doubled": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a block doubled": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop that calls itself": "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "long output": "{{ 'a' * 20000000 }}",
    "deep brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
}
BOMBS = {**SLOW_BOMBS, **QUICK_BOMBS}
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}", "{{ self.__init__ }}", "{{ dict.__class__ }}", "{{ '{0.__class__}'.format(1) }}",
    "{{ namespace(__class__=1) }}", "{% import '/etc/passwd' as x %}", "{{ raise_exception.__globals__ }}",
    "{{ raise_exception('no') }}", "{{ messages | attr('__class__') }}", "{{ 1 / 0 }}", "{{ strftime_now('%Y') }}",
    "{{ undefined.x }}", "{{ messages | tojson }}", "{% generation %}x{% endgeneration %}", "{% break %}", "\x00", "{#",
)  # fmt: skip
# what a template can be and fit no model: each says another thing that Chat refuses
MISFITS = (
    "{{ messages | length }}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>other\n{% endif %}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ m.content[0].text | length }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # not refused: every function that transformers gives to templates
    "{% set n = namespace(x=1) %}{% set n.x = 2 %}{% set d = dict.fromkeys(['a']) %}{{ dict(b=n.x) | tojson }}"
    "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}{{ d }}{{ namespace({'a': 1}).a }}",
)
_TOKEN = re.compile(r"\{%-?|-?%\}|\{\{-?|-?\}\}|'[^']*'|\w+|\s+|.", re.DOTALL)


def template_case(rng: Random, valid: str) -> str:
    kind = rng.random()
    if kind < 0.006:
        bombs = SLOW_BOMBS if kind < 0.001 else QUICK_BOMBS
        return rng.choice(list(bombs.values())) + (valid if rng.random() < 0.5 else "")
    tokens = _TOKEN.findall(rng.choice(MISFITS) if kind < 0.08 else valid)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at, act = rng.randrange(len(tokens)), rng.randrange(5)
        if act == 0:
            del tokens[at]
        elif act == 1:
            tokens.insert(at, tokens[rng.randrange(len(tokens))])
        elif act == 2:
            tokens[at] = tokens[rng.randrange(len(tokens))]
        elif act == 3:
            tokens[at] = rng.choice(("'assistant'", "'<image>'", "''", "0", "messages", "loop.index", "\ue000", "not"))
        else:
            tokens.insert(at, rng.choice(ESCAPES))
        tokens = tokens or [" "]
    return "".join(tokens)
