"""The page of `hookctl app`: editors put together by mouse, for people who would rather look.

forms     an editor's arguments as widgets, by its signature and docstring
tables    what those widgets hold as a preset's table, and back
places    boxes and masks drawn on the picture
stack     what is on the page as the stack that a file would hold
copying   that stack as a file, a program and a command
drawing   one run: pictures, what the cards did
reading   what is read meanwhile: words' maps, what each place looks at
worker    a run in its own thread, told step by step, stopped when asked
person    one person's cards, places and last run
hooks     learned weights as cards
pictures  maps and places as pictures
page      the page itself; cards: of the editors. They alone need gradio, the extra "app"
"""
