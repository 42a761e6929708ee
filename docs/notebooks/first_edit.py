# %% [markdown]
# # A first edit
#
# A word of the prompt is changed, and the image stays what it was. This notebook is a plain
# script (`python docs/notebooks/first_edit.py`), and an editor that knows cells (`# %%`) runs it
# cell by cell. It needs no download: `shapes` is a small pipeline that comes along.

# %%
import hookctl
from hookctl.inspect.show import grid
from hookctl.recipes import PAG, PromptToPrompt

pipe = hookctl.load_shapes()
pipe.set_progress_bar_config(disable=True)
prompts = ["a red circle above a blue square", "a green circle above a blue square"]

# %% [markdown]
# Asked anew, with the same noise, the model draws another image: not the circle alone changes.

# %%
edit = PromptToPrompt(prompts, blend=("circle", "circle"))
options = {"num_inference_steps": 25, "guidance_scale": 3.0}
source, anew = pipe(prompts, generator=edit.generators(seed=0), **options).images

# %% [markdown]
# Under control it takes over the source's attention for a part of the schedule: what looks where
# stays, what is there changes. The blend keeps all places that neither circle looks at.

# %%
with hookctl.control(pipe, edit) as session:
    _, edited = pipe(prompts, generator=edit.generators(seed=0), **options).images
seen = session.maps["circle"].overlay(edited)

# %%
titles = ["source", "asked anew", "edited", "map of “circle”"]
grid([[source, anew, edited, seen]], titles).save("first_edit.png")

# %% [markdown]
# ![source, asked anew, edited, and what looks at the word](../pictures/first_edit.png)
#
# Editors stack: here is a guidance beside the edit. The report says who did what, where and when.

# %%
with hookctl.control(pipe, edit, PAG(2.0, sites="self @<=1/2")) as session:
    pipe(prompts, generator=edit.generators(seed=0), **options)
print(session.report()[:600])

# %% [markdown]
# A word can also be made weaker, or stronger: below zero its object goes.

# %%
less = PromptToPrompt([prompts[0]] * 2, reweight={"circle": -1.0}, self_replace=0.0)
with hookctl.control(pipe, less):
    _, without = pipe(less.prompts, generator=less.generators(seed=0), **options).images
grid([[source, without]], ["source", "circle weighed -1"]).save("reweighted.png")

# %% [markdown]
# ![the source and the same without its circle](../pictures/reweighted.png)
#
# Next: [a picture of your own](real_picture.py), or [your own editor](own_editor.py).
