"""Models beside the one that is controlled, asked in the same step for the same latents.

denoiser      another denoiser, told what the pipeline tells its own, or something else
pipeline      a whole pipeline, through its own call (`call_beside`)
prediction    what a model predicts in a step
"""
