"""What LangChain and LiteLLM make of a server; runs in the environment that has them and prints JSON.

``python chat_clients.py LIBRARY '{"url": "http://HOST:PORT/v1", "model": MODEL, "text": TEXT, "tokens": N}'``
"""

import json
import sys

SCHEMA = {
    "title": "label",
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}},
    "required": ["a"],
    "additionalProperties": False,
}


def langchain(asked):
    """Whole, streamed, in the form of a schema, and with a tool, which is refused."""
    from langchain_openai import ChatOpenAI

    def model(tokens):
        return ChatOpenAI(
            model=asked["model"],
            base_url=asked["url"],
            api_key="none",
            max_retries=0,
            temperature=0,
            max_tokens=tokens,
        )

    whole = model(asked["tokens"]).invoke(asked["text"])
    structured = model(40).with_structured_output(SCHEMA, method="json_schema").invoke(asked["text"])
    try:
        refused = model(40).with_structured_output(SCHEMA, method="function_calling").invoke(asked["text"])
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    return {
        "whole": whole.content,
        "tokens": whole.usage_metadata["output_tokens"],
        "streamed": [chunk.content for chunk in model(asked["tokens"]).stream(asked["text"])],
        "structured": structured,
        "refused": refused,
    }


def litellm(asked):
    """Whole, streamed, and a model that is not there."""
    from litellm import completion

    said = {"messages": [{"role": "user", "content": asked["text"]}], "api_base": asked["url"], "api_key": "none"}
    said |= {"temperature": 0, "max_tokens": asked["tokens"], "num_retries": 0}
    whole = completion(model=f"openai/{asked['model']}", **said)
    chunks = completion(model=f"openai/{asked['model']}", stream=True, **said)
    try:
        refused = str(completion(model="openai/nobody", **said))
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    return {
        "whole": whole.choices[0].message.content,
        "tokens": whole.usage.completion_tokens,
        "streamed": [chunk.choices[0].delta.content or "" for chunk in chunks],
        "refused": refused,
    }


print(json.dumps({"langchain": langchain, "litellm": litellm}[sys.argv[1]](json.loads(sys.argv[2]))))
