"""Runnable demos on the embedded pipeline."""

DEMOS = {
    "guidance": "FreeU, PAG, SAG and SEG against plain sampling with the same noise",
    "multi_diffusion": "canvases three pictures wide, with a region for each third",
    "prompt_to_prompt": "edit pictures by editing their prompts: colour, shape, added word, weight",
    "regional": "objects in their own parts of a picture: regional prompts and their kin",
}
