"""Short chat templates with the markup of the usual families, and a tokenizer for each."""

from tokenizers import AddedToken
from tokenizers_at_hand import make

# Qwen2.5 and 3, and others that learned from Hermes: tagged objects.
QWEN = r"""
{%- macro turn(role) -%}<|im_start|>{{ role }}
{% endmacro -%}
{%- if tools %}
    {{- turn('system') }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}Be helpful.{% endif %}
    {{- '\n\n<tools>' }}
    {%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\n</tools>\nFor each function call, write:\n<tool_call>\n{"name": ...}\n</tool_call>' }}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- turn('system') + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- turn(m.role) + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if m.content %}{{ '\n' + m.content }}{% elif not m.tool_calls %}{{ '\n' }}{% endif %}
        {%- for call in m.tool_calls %}
            {%- if call.function is defined %}{% set call = call.function %}{% endif %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}"""

# Llama 3.1 and later: one bare object, whose arguments are parameters.
LLAMA = r"""
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<s><|im_start|>system\n\n' }}
{%- if tools %}Environment: ipython
{% endif %}
{{- 'Today: ' + (date_string or '26 Jul 2024') + '\n' + system + '<|im_end|>' }}
{%- if tools %}
    {%- set first = messages[0].content | trim %}{% set messages = messages[1:] %}
    {{- '<|im_start|>user\n\nRespond in the format {"name": function name, "parameters": ' }}
    {{- 'dictionary of argument name and its value}.\n\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}
    {{- first + '<|im_end|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|im_start|>assistant\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ '}<|im_end|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>ipython\n\n' }}
        {%- if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% endif %}
        {{- '<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"""

# Hermes: tagged objects, arguments first, tools described in a line of Python; and what results
# are is told by their name.
HERMES = r"""
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\nYou may call functions within <tools></tools>:\n<tools> ' }}
    {%- for tool in tools %}{{ tool.function | string }}{{ ' ' }}{% endfor %}
    {{- '</tools> Return a json object within <tool_call></tool_call>:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-dict>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in m.tool_calls %}
            {{- '\n<tool_call>\n{"arguments": ' + call.function.arguments | tojson }}
            {{- ', "name": "' + call.function.name + '"}\n</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>tool\n<tool_response>\n{"name": "' + (m.name or '') + '", "content": ' }}
        {{- m.content | tojson + '}\n</tool_response>' }}
    {%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# SmolLM2: the format of a list of calls is told in the system message; calls are not written back.
SMOLLM = r"""
{%- for m in messages %}
    {%- if loop.first and (tools or m.role != 'system') %}
        {{- '<|im_start|>system\n' }}
        {%- if tools %}You have these tools:
<tools>{{ tools }}</tools>
The format is:
<tool_call>[
{"name": "func_name1", "arguments": {"argument1": "value1"}},
]</tool_call>
        {%- else %}You are a helpful AI assistant{% endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "hermes": HERMES, "smollm": SMOLLM}
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|python_tag|>")


def tokenizer_of(template, **options):
    """A tokenizer with this template, whose tags of tools are tokens that are not special."""
    tokenizer = make(template=template, **options)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"$ref": "#/$defs/city"},
                "days": {"type": "integer"},
            },
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"type": "string", "enum": ["Ulm", "Bonn"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}
TOOLS = [WEATHER, CLOCK]
CALLED = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Ulm", "days": 2}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "sunny"}
