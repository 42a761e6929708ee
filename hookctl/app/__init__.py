"""The page of `hookctl app`: editors put together by mouse, for people who would rather look.

forms     an editor's arguments as widgets, by its signature and docstring
stack     what is on the page as the stack that a file would hold
copying   that stack as a file, a program and a command
drawing   one run: pictures, maps, what the cards did
worker    a run in its own thread, told step by step, stopped when asked
person    one person's cards, boxes and last run
pictures  maps and boxes as pictures
page      the page itself; cards: of the editors. They alone need gradio, the extra "app"
"""
