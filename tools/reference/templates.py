"""Write tests/data/reference/templates.json: what transformers makes of chat templates of all kinds.

Every template is rendered with every chat of `CHATS`, as a processor's `apply_chat_template` would; null where that
is an error. Needs transformers and jinja2 alone.
"""

import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

IMAGE = {"type": "image"}
TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<end_of_utterance>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
}


def text(text):
    return {"type": "text", "text": text}


def user(*content):
    return {"role": "user", "content": list(content)}


CHATS = {
    "picture": [user(IMAGE, text("What is it? "))],
    "system": [{"role": "system", "content": [text(" Be brief.\n")]}, user(IMAGE, text("Où? “Là” 😀 <b>&"))],
    "clip": [user(text("Two frames:\n"), IMAGE, text("\n00:01:"), IMAGE, text("\n\n"), text("Why?"))],
    "empty": [user(IMAGE, text(""))],
}

# The content of a message as text; what follows does something with `text`.
JOINED = (
    "{% for message in messages %}{% set ns = namespace(text='') %}{% for c in message.content %}"
    "{% set ns.text = ns.text ~ (c.text if c.type == 'text' else '<image>') %}{% endfor %}"
    "{% set text = ns.text %}{{ BODY }}|{% endfor %}"
)
# A loop over all parts.
PARTS = "{% for message in messages %}{% for c in message.content %}BODY{% endfor %}{% endfor %}"


def joined(body):
    return JOINED.replace("BODY", body)


def parts(body):
    return PARTS.replace("BODY", body)


TEMPLATES = {
    # Methods of strings.
    "strip": joined("text.strip() ~ text.lstrip() ~ text.rstrip() ~ text.strip(' W') ~ text.rstrip('\\n')"),
    "split": joined("text.split() ~ text.split(' ') ~ text.split(' ', 1) ~ text.split(' ')[-1]"),
    "split_keywords": joined("text.split(maxsplit=1) ~ text.split(sep=' ', maxsplit=1) ~ text.split(None, 1)"),
    "rsplit": joined("text.rsplit(' ', 1) ~ text.rsplit() ~ text.rsplit(maxsplit=1) ~ text.rsplit('zz')"),
    "partition": joined("text.partition(' ') ~ text.rpartition(' ') ~ text.partition('zz') ~ text.rpartition('zz')"),
    "splitlines": joined("text.splitlines() ~ text.splitlines(True) ~ text.splitlines(keepends=True)"),
    "case": joined("text.upper() ~ text.lower() ~ text.title() ~ text.capitalize() ~ text.swapcase() ~ text.casefold()"),
    "startswith": joined("text.startswith('<image>') ~ text.endswith((' ', '&')) ~ text.startswith(('a', '<'))"),
    "find": joined("text.find('i') ~ text.rfind('i') ~ text.find('zz') ~ text.count('i')"),
    "index": joined("(text ~ 'i').index('i') ~ (text ~ 'i').rindex('i')"),
    "replace": joined("text.replace('i', 'I') ~ text.replace('i', '', 1)"),
    "remove": joined("text.removeprefix('<image>') ~ text.removesuffix('&') ~ text.removeprefix('zz')"),
    "pad": joined("'7'.zfill(3) ~ '-7'.zfill(4) ~ 'a'.ljust(3) ~ 'a'.rjust(3, '.') ~ 'a'.center(4, '-') ~ text.ljust(1)"),
    "classes": joined(
        "text.isalpha() ~ 'ab'.isalpha() ~ 'a1'.isalnum() ~ '12'.isdigit() ~ '12'.isdecimal() ~ '12'.isnumeric() ~ ' '.isspace()"
        " ~ 'a'.islower() ~ 'A'.isupper() ~ 'Ab Cd'.istitle() ~ 'ab'.istitle() ~ 'é'.isascii()"
    ),
    "join": joined("', '.join(text.split()) ~ '-'.join(['a', 'b'])"),
    "format": joined("'{} and {}'.format('a', 1) ~ '{0}{0}'.format('a') ~ '{x}'.format(x=2)"),
    "percent_filter": joined("'%s=%d' | format('a', 3)"),
    "slices": joined("text[1:] ~ text[:-1] ~ text[::-1] ~ text[0:3] ~ text[-1:]"),
    "repeat": joined("'ab' * 3 ~ [1] * 2"),
    # Methods of dicts and lists.
    "items": parts("{% for k, v in c.items() %}{{ k }}={{ v }};{% endfor %}"),
    "keys": parts("{{ c.keys() | list }}{{ c.values() | list }}{{ c.items() | list }}"),
    "get": parts("{{ c.get('text', 'none') }}{{ c.get('zz') }}{{ c.get('zz') is none }}"),
    "copies": parts("{{ c.copy() }}{{ [1, 2].copy() }}{{ [1, 2, 1].index(2) }}{{ [1, 2, 1].count(1) }}"),
    "dict": parts("{{ dict(a=1, b=c.type) }}{{ dict({'x': 1}, y=2) }}{{ dict([('k', 'v')]).k }}"),
    "in": parts("{{ 'text' in c }}{{ 'zz' not in c }}{{ 'a' in 'abc' }}{{ 1 in [1, 2] }}"),
    "nested_items": "{% for m in messages %}{% for key, value in m.items() %}{{ key }}:{{ value | length }} {% endfor %}{% endfor %}",
    # As Python writes things.
    "printed": parts("{{ c }} {{ true }} {{ none }} {{ 1.0 }} {{ 7 / 2 }} {{ [1, 'a', none, true] }} {{ (1, 2) }} {{ (1,) }}"),
    "quotes": "{{ [\"it's\", 'a \"b\"', 'a\\\\b', 'a\\nb', 'é'] }}",
    "arithmetic": "{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** 3 }} {{ 4 / 2 }} {{ 1 < 2 < 3 }} {{ 1 + 2.5 }} {{ 10 ** 20 }}",
    "concat": "{{ 'a' ~ 1 ~ none ~ true ~ 1.5 }}{{ 'a' 'b' }}{{ [1] + [2] }}",
    # JSON.
    "tojson": "{{ messages | tojson }}",
    "tojson_indent": "{{ messages | tojson(indent=2) }}",
    "tojson_options": "{{ messages | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
    "tojson_values": "{{ [1, 1.5, 2.0, true, none, 'a\"b\\n</script>é😀', [], {}, {'a': {'b': []}}, (1, 2)] | tojson }}",
    "tojson_values_indented": "{{ [[], {}, {'a': {'b': [1, 2]}}, [[1], [2]]] | tojson(indent=4) }}",
    "tojson_keys": "{{ {1: 'a', 'b': 2, none: 3, true: 4} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent='--') }}",
    "tojson_positional": "{{ ['é'] | tojson(true) }}{{ ['é'] | tojson(false, 1) }}",
    # Loops.
    "break": parts("{% if c.type == 'image' %}{% break %}{% endif %}{{ c.text }}"),
    "continue": parts("{% if c.type == 'image' %}{% continue %}{% endif %}{{ c.text }}"),
    "loop": parts(
        "{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}"
        "{{ loop.cycle('a', 'b') }}{{ loop.previtem.type if loop.previtem is defined }}{{ loop.nextitem.type if not loop.last }}"
        "{{ loop.changed(c.type) }}{{ loop.depth }}"
    ),
    "loop_if": "{% for c in messages[-1].content if c.type == 'text' %}{{ loop.index }}{{ c.text }}{% else %}nothing{% endfor %}",
    "loop_else": "{% for c in [] %}x{% else %}nothing{% endfor %}{% for x in undefined_list %}x{% else %}none{% endfor %}",
    "recursive": "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
    "unpacking": "{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}{% set x, y = 1, 2 %}{{ x }}{{ y }}",
    "ranges": "{% for i in range(3) %}{{ i }}{% endfor %}{{ range(1, 10, 3) | list }}{{ messages[::-1] | length }}{{ [1, 2, 3][-2:] }}",
    "namespace": "{% set ns = namespace(n=0, seen=false) %}" + parts("{% set ns.n = ns.n + 1 %}{% set ns.seen = true %}") + "{{ ns.n }}{{ ns.seen }}",
    "scopes": "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}{% if true %}{% set x = 3 %}{% endif %}{{ x }}",
    "with": "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a is defined }}",
    # Blocks.
    "generation": "{% for m in messages %}{% if m.role == 'user' %}A{% generation %} {{ m.role }} {% endgeneration %}B{% endif %}{% endfor %}",
    "generation_trimmed": "a  {%- generation -%}  b  {%- endgeneration -%}  c {%- generation %} d {% endgeneration -%} e",
    "generation_lines": "a\n  {% generation %}\n  b\n  {% endgeneration %}\nc\n  {%+ generation %}\nd\n{%generation%}e{%endgeneration%}{% endgeneration +%}\n",
    "generation_scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation_elsewhere": "{# {% generation %} #}{% raw %}{% generation %}{% endraw %}{{ '{% generation %}' }}{{ {'a': {'b': '}}'}}['a']['b'] }}"
    "{%- raw -%}\n {% endgeneration %} {{ {%- endraw -%} {% if '{% generation %}' %}x{% endif %}{{ \"it's {% generation %}\" }}",
    "whitespace": "  {% if true %}\n    a\n  {% endif %}\n  b {{- ' c ' -}} d\n  {#- gone -#}  e\n{%- if true +%}\n f{% endif %}\n\n",
    "literals": "{{ True }}{{ None }}{{ False }}{{ 'x' if True }}{{ '\\u2581\\x41\\t\\n\\'' }}{{ 1_000 }}{{ 0x1f }}{{ 1.5e3 }}{{ [1, 2,] }}{{ {'a': 1,}.a }}{{ \"\\\\\" }}",
    "operators": "{% set a = true %}{% set b = false %}{{ a and (b or not b) }}{{ not a }}{{ 1 if a and b else 2 }}{{ 'a' not in 'bc' }}{{ a is not none }}{{ (messages | length) % 2 == 0 }}{{ 'x' or 'y' }}{{ '' or 'y' }}{{ 1 and 2 }}{{ 'a' < 'b' }}{{ [1, 2] == [1, 2] }}{{ {'a': 1} == {'a': 1} }}",
    "else_if": parts("{%- if c.type == 'image' -%} <image> {%- elif c.text -%} {{ c.text }} {%- else -%} nothing {%- endif -%}"),
    "indices": "{% for i in range(messages | length) %}{{ messages[i].role }}{{ messages[-1]['content'][-1].text[-5:] }}{% endfor %}{% for m in messages[:-1] %}{{ m.role }}{% endfor %}{{ messages[0]['content'][0]['type'] }}",
    "lists": "{% set ns = namespace(x=[]) %}{% for m in messages %}{% set ns.x = ns.x + [m.role] %}{% endfor %}{{ ns.x }}{{ ns['x'] | join }}{{ ns.x[0] }}",
    "sequences": "{{ 'a' is sequence }}{{ {} is sequence }}{{ [] is sequence }}{{ 1 is sequence }}{{ undefined_thing is iterable }}{{ none is iterable }}{{ 1 is iterable }}{{ undefined_thing is mapping }}{{ undefined_thing is string }}",
    "comments": "a{# a comment #}b\n{# a line #}\nc{#- trimmed -#} d",
    "set_block": "{% set x %}a {{ messages | length }}{% endset %}{{ x | upper }}{% set y | trim %}  b  {% endset %}{{ y }}",
    "macro": "{% macro f(a, b='x') %}[{{ a }}{{ b }}{{ caller() if caller }}]{% endmacro %}{{ f('1') }}{{ f(b='2', a='3') }}{% call f('4') %}in{% endcall %}",
    "macro_text": "{% macro parts(content) %}{% for c in content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text | trim }}{% endif %}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ bos_token + m.role + '\\n' }}{{ parts(m.content) }}{{ eos_token }}\n{% endfor %}",
    "filter_block": "{% filter upper %}abc{{ messages[0].role }}{% endfilter %}",
    "raw": "{% raw %}{{ not_this }}{% endraw %}",
    "inline_if": "{{ 'a' if messages | length > 5 }}|{{ 'a' if true else 'b' }}|{{ ('x' if false) is undefined }}",
    # Filters and tests.
    "select": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', '==', 'user') | map(attribute='role') | list }}"
    "{{ messages[-1].content | selectattr('type', 'in', ['text']) | map(attribute='text') | join('/') }}{{ [1, 2, 3] | select('odd') | list }}{{ [0, 1] | reject | list }}",
    "select_defined": "{{ messages[-1].content | selectattr('text') | list | length }}{{ messages[-1].content | selectattr('text', 'defined') | map(attribute='text') | first }}",
    "map": "{{ messages | map(attribute='role') | map('upper') | join(', ') }}{{ ['a', 'b'] | map('replace', 'a', 'c') | list }}{{ messages | map(attribute='zz', default='d') | list }}",
    "first_last": "{{ messages | first | length }}{{ (messages | last).role }}{{ [1, 2] | last }}{{ [] | first is undefined }}{{ messages[0]['role'] }}{{ messages.0.role }}",
    "trim": joined("text | trim ~ (text | trim | length)"),
    "default": "{{ zz | default('d') }}{{ '' | default('e', true) }}{{ zz | d('f') }}{{ none | default('g') }}{{ none | default('h', boolean=true) }}",
    "numbers": "{{ 3.7 | round }} {{ 3.14159 | round(2) }} {{ 3.5 | int }} {{ '3' | int + 1 }} {{ 3 | float }} {{ -3 | abs }} {{ [1, 2] | sum }} {{ [3, 1] | max }} {{ [3, 1] | min }}",
    "sorted": "{{ [3, 1, 2] | sort }}{{ ['b', 'A'] | sort }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 1, 2] | unique | list }}{{ [3, 1] | sort(reverse=true) }}{{ messages[-1] | items | list | length }}",
    "grouped": "{% for role, group in messages | groupby('role') %}{{ role }}{{ group | length }}{% endfor %}{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}",
    "reversed": "{{ [1, 2] | reverse | list }}{{ 'abc' | reverse }}{% for m in messages | reverse %}{{ m.role }}{% endfor %}",
    "escapes": joined("text | e ~ (text | escape) ~ (text | safe) ~ ('a b/c?é' | urlencode)"),
    "strings": joined("text | upper ~ (text | lower) ~ (text | title) ~ (text | capitalize) ~ (text | replace('i', 'I')) ~ (text | string) ~ (text | length)"),
    "more_strings": "{{ 'a\\nb' | indent(2) }}{{ 'a\\nb' | indent(2, true) }}{{ 'one two' | wordcount }}{{ 'abcdefghij' | truncate(6, true, '') }}{{ 'ab' | center(6) }}|{{ 'ab' | list }}",
    "tests": parts("{{ c is mapping }}{{ c.text is string }}{{ c.type is defined }}{{ c.text is undefined }}{{ c is sequence }}{{ c is iterable }}{{ c.text is not none }}"),
    "more_tests": "{{ 1 is number }}{{ 1 is integer }}{{ 1.0 is float }}{{ true is boolean }}{{ true is true }}{{ false is false }}{{ 'a' is string }}{{ 2 is even }}{{ 3 is odd }}"
    "{{ 4 is divisibleby 2 }}{{ 'a' is in 'ab' }}{{ 1 is eq 1 }}{{ 1 is ne 2 }}{{ 2 is gt 1 }}{{ 'a' is lower }}{{ 'A' is upper }}{{ none is none }}{{ 1 is sameas 1 }}{{ raise_exception is callable }}{{ messages is callable }}",
    "arguments": "{{ messages | join(', ', attribute='role') }}{{ messages | sort(attribute='role') | map(attribute='role') | list }}{{ 'x' | int(7) }}{{ 'x' | int(default=8) }}"
    "{{ [[1], [2]] | sum(start=[]) }}{{ 'aXbXc' | replace('X', '-', 1) }}{{ ['a '] | map('trim') | list }}{{ [{'n': 2}, {'n': 1}] | max(attribute='n') }}{{ [{'n': 2}] | sum(attribute='n') }}",
    "truncate": "{{ 'one two three four' | truncate(9) }}|{{ 'one two three four' | truncate(9, true) }}|{{ 'abcdefg' | truncate(5) }}|{{ 'abcdefg' | truncate(5, leeway=0, end='') }}",
    "filter_test": "{{ 'tojson' is filter }}{{ 'zz' is filter }}{{ 'mapping' is test }}",
    # What transformers gives a template.
    "tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token is defined }}{{ zz_token }}",
    "variables": "{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ add_generation_prompt }}{{ date_string is defined }}",
    "prompt": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "raised_not": "{% if messages[0].role not in ['user', 'system'] %}{{ raise_exception('Roles must be known') }}{% endif %}fine",
    "raised": "{{ raise_exception('Never ' ~ messages[0].role) }}",
    "raised_for_system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system') }}{% endif %}{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}{% endfor %}",
    "strftime": "{{ strftime_now('%%') }}{{ strftime_now is defined }}{{ strftime_now('%Y') | length }}{{ strftime_now('%d %b %Y') | length }}",
    "content_is_string": "{% for m in messages %}{% if m.content is string %}S{{ m.content }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}",
    "system_first": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'][0]['text'] | trim %}{% set rest = messages[1:] %}{% else %}{% set system = 'Default.' %}{% set rest = messages %}{% endif %}"
    "{{ '<|im_start|>System: ' + system + eos_token + '\\n' }}{% for m in rest %}{{ m.role | capitalize }}:{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}",
    "mutated": "{{ messages.append(1) }}",
    "unknown_attribute": "{{ messages[0].zz }}{{ messages[0].zz.zz }}",
    "unknown_index": "{{ messages[9] }}{{ messages[0]['zz'] is undefined }}",
    "unknown_filter": "{{ 1 | zz }}",
    "dropped_none": "{{ none ~ '' }}{{ '' ~ undefined_thing }}{{ undefined_thing }}{{ undefined_thing is defined }}{{ not undefined_thing }}",
    "glued_to_number": "{{ 'a' + 1 }}",
    "smolvlm": "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
}  # fmt: skip


def render(template, chat):
    try:
        (prompt,), _ = render_jinja_template([chat], chat_template=template, add_generation_prompt=True, **TOKENS)
        return prompt
    except Exception as error:  # Whatever it is, transformers has no prompt.
        print(f"{template[:60]!r}: {type(error).__name__}: {error}")
        return None


if __name__ == "__main__":
    cases = [
        {"name": name, "template": template, "prompts": {chat: render(template, messages) for chat, messages in CHATS.items()}}
        for name, template in TEMPLATES.items()
    ]
    path = Path(__file__).resolve().parents[2] / "tests" / "data" / "reference" / "templates.json"
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    head = json.dumps({"tokens": TOKENS, "chats": CHATS}, ensure_ascii=False, separators=(",", ":"))
    path.write_text(head[:-1] + ',"templates":[\n' + lines + "\n]}\n", encoding="utf-8")
