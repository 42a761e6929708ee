# %% [markdown]
# # A real picture
#
# A picture that no model drew is inverted once: noise is sought from which the sampler draws it.
# Then any editor edits it. Here the picture is painted by a few lines of code, so that this runs
# offline; put your own in its place, of the size that your pipeline draws.

# %%
from PIL import Image, ImageDraw

import hookctl
from hookctl.inspect.show import grid
from hookctl.recipes import DirectInversion, PromptToPrompt

pipe = hookctl.load_shapes()
pipe.set_progress_bar_config(disable=True)

# %%
picture = Image.new("RGB", (512, 512), "white")
paint = ImageDraw.Draw(picture)
paint.ellipse((170, 50, 310, 190), fill=(230, 25, 25))
paint.rectangle((180, 320, 300, 440), fill=(40, 70, 240))
picture = picture.resize((128, 128), Image.Resampling.LANCZOS)  # or Image.open("photo.png")

# %% [markdown]
# The prompt says what is in the picture. Direct inversion leads the source back to the picture at
# every step, so that it stays what it is whatever the guidance of the edit.

# %%
prompt = "a red circle above a blue square on a white background"
inverted = DirectInversion(pipe, picture, prompt, steps=25, guidance=3.0).run()

# %% [markdown]
# Now edit it. The blend keeps all places that the named object does not cover; `self_resolution`
# says in which layers the layout lies, here in all, in a photograph's pipeline the default is
# right.

# %%
edited = []
for word, target in (
    ("circle", "a green circle above a blue square on a white background"),
    ("square", "a red circle above a striped blue square on a white background"),
):
    edit = PromptToPrompt([prompt, target], blend=(word, word), self_resolution=1.0)
    again, changed = inverted.edit(pipe, edit)
    edited.append(changed)

# %%
titles = ["picture", "drawn again", "green circle", "striped square"]
grid([[picture, again, *edited]], titles).save("real_picture.png")

# %% [markdown]
# ![the picture, drawn again, and two edits](../pictures/real_picture.png)
#
# From the shell it is one line:
#
# ```bash
# hookctl run inverted_edit --image photo.png \
#     --prompt "a red circle above a blue square" --edit "a green circle above a blue square"
# ```
#
# Six inversions, what each keeps, and what each costs: [the
# gallery](../../demos/gallery.md#inversion).
