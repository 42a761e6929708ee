"""Attend-and-Excite: no subject of the prompt may be left out.

Chefer et al., "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion
Models", arXiv 2301.13826 (SIGGRAPH 2023). With A the mean map of the layout's sites, of all tokens
but the first and the last,

    p = softmax(100 A) over tokens,  m_j = max of (G * p_j),  L = max_j max(0, 1 - m_j)
    x <- x - rho_i grad_x L,  rho_i = 20 linspace(1, 0.5)_i

in the first half of the schedule; at 0, 1/5 and 2/5 of it the step is repeated until every
m_j reaches 0.05, 0.5 and 0.8, at most 20 times. G is a Gaussian of 3 x 3 cells.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hookctl.loop.energy import ImageMaps
from hookctl.recipes.common.energy.energy_guidance import Stage
from hookctl.recipes.common.energy.excited_maps import ExcitedMaps
from hookctl.recipes.common.energy.word_energy import Subject


class AttendAndExcite(ExcitedMaps):
    """Raise the attention of every subject in at least one place.

        AttendAndExcite(["circle", "square"])

    words: the subjects, for every prompt or a list for each; the others: see `ExcitedMaps`.
    paper: as there, and each token of a word is a subject of its own, where else the word is their
    sum. scale=0, or no words, leaves a run bit for bit as it was.

    Costs one partial forward and backward of the conditional rows per step, and as many again for
    each round of a refinement.
    """

    def energy(self, image: ImageMaps, subjects: Sequence[Subject], stage: Stage) -> Tensor:
        if self.paper:
            subjects = [Subject(s.word, (column,)) for s in subjects for column in s.columns]
        highest = self.excited(image, subjects).flatten(1).amax(1)
        return (1 - highest).clamp_min(0).amax()
