"""Runnable demos on the embedded pipeline."""

DEMOS = {
    "attend_and_excite": "three objects and none left out: Attend-and-Excite",
    "guidance": "FreeU, PAG, SAG and SEG against plain sampling with the same noise",
    "layout": "objects in their boxes: layout guidance and BoxDiff",
    "multi_diffusion": "canvases three pictures wide, with a region for each third",
    "prompt_to_prompt": "edit pictures by editing their prompts: colour, shape, added word, weight",
    "real_compo": "a layout model and a text model mixed place by place: RealCompo",
    "regional": "objects in their own parts of a picture: regional prompts and their kin",
}
