"""Runnable demos on the embedded pipeline."""

DEMOS = {
    "attend_and_excite": "three objects and none left out: Attend-and-Excite",
    "collaboration": "colours from a text, places from a mask: Collaborative Diffusion",
    "concepts": "where an image shows what: ConceptAttention, on the flow-matching pipeline",
    "flow": "real images recoloured on a flow-matching model, by seven methods",
    "grounding": "objects at boxes, points, scribbles and masks: a trained InstanceDiffusion",
    "guidance": "FreeU, ScaleU, PAG, SAG and SEG against plain sampling with the same noise",
    "identity": "a look that no word names, read off a reference and drawn anew: InstantID",
    "imagic": "an image fitted to a text, then changed by degrees: Imagic",
    "inversion": "real images inverted, drawn again and recoloured, by six methods",
    "layout": "objects in their boxes: layout guidance and BoxDiff",
    "masactrl": "other layouts, one appearance: MasaCtrl, StyleAligned and reference-only",
    "multi_diffusion": "canvases three images wide, with a region for each third",
    "one_way": "a scene grown round a given image: cyclic and selective one-way diffusion",
    "prompt_to_prompt": "edit images by editing their prompts: colour, shape, added word, weight",
    "real_compo": "a layout model and a text model mixed place by place: RealCompo",
    "regional": "objects in their own parts of an image: regional prompts and their kin",
    "stacks": "six stacks of methods in one run each, measured for what their parts do",
}

# Those that either embedded pipeline draws, and those of the flow-matching one; the others are of
# what the UNet alone has.
ON_BOTH = (
    "attend_and_excite",
    "inversion",
    "layout",
    "masactrl",
    "prompt_to_prompt",
    "regional",
)
OF_FLOW = ("concepts", "flow")
