"""Collaborative Diffusion: several models on one latent, trusted place by place and step by step.

editor          the mixture of their predictions, an editor
collaborator    one modality, as it is given
models          how each model is asked
influence       the maps, as numbers and as pictures
files           the official checkpoint
"""

from hookctl.learned.collaborative.collaborator import Collaborator
from hookctl.learned.collaborative.editor import CollaborativeDiffusion
from hookctl.learned.collaborative.files import from_checkpoint
from hookctl.learned.collaborative.influence import InfluenceMaps

__all__ = ["Collaborator", "CollaborativeDiffusion", "InfluenceMaps", "from_checkpoint"]
