"""How large whole numbers may be: more is a mistake, and would take all memory or for ever."""

SEED = 2**63 - 1
STEPS = 10_000
IMAGES = 1024  # of each prompt
SIDE = 16_384  # of an image or a canvas, px
REFINEMENTS = 1000  # of one step of an inversion
COUNT = 1_000_000  # of anything else
