"""Learned modules: official weights, as they are published, become editors.

    grounding = hookctl.learned.load("gligen.bin", pipe, boxes=..., phrases=...)
    with hookctl.control(pipe, grounding):
        pipe("a photo")

files, reading     where weights are, and how they are read without running what is in a file
names              LDM's and training's names become diffusers'
recognise, kinds   what a file is, by its names and shapes
fit                weights into modules, or what does not fit and why
load               all of it
"""

from hookctl.learned.load import load

__all__ = ["load"]
