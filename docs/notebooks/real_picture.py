# %% [markdown]
# # A real picture
#
# A picture that no model drew is inverted once: noise is sought from which the sampler draws it. Then any
# editor edits it. Here the picture is painted by a few lines of code, so that this runs offline; put your
# own in its place, of the size that your pipeline draws.

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
paint.ellipse((180, 60, 330, 210), fill=(220, 40, 40))
paint.rectangle((190, 290, 330, 430), fill=(40, 70, 220))
picture = picture.resize((128, 128), Image.Resampling.LANCZOS)  # or Image.open("photo.png")

# %% [markdown]
# The prompt says what is in the picture. Direct inversion leads the source back to the picture at every
# step, so that it stays what it is whatever the guidance of the edit.

# %%
prompt = "a red circle above a blue square"
inverted = DirectInversion(pipe, picture, prompt, steps=25, guidance=3.0).run()

# %% [markdown]
# Now edit it: another colour, another shape.

# %%
drawn = [picture]
for target in ("a green circle above a blue square", "a red star above a blue square"):
    blend = ("circle", "star" if "star" in target else "circle")
    edit = PromptToPrompt([prompt, target], blend=blend, self_resolution=1.0)
    again, edited = inverted.edit(pipe, edit)
    drawn.append(edited)

# %%
titles = ["picture", "drawn again", "green circle", "star"]
grid([[picture, again, *drawn[1:]]], titles).save("real_picture.png")

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
# Six inversions, what each keeps, and what each costs: [the gallery](../../demos/gallery.md#inversion).
