"""Runnable demos on the embedded pipeline."""

DEMOS = {
    "prompt_to_prompt": "edit pictures by editing their prompts: colour, shape, added word, weight",
}
